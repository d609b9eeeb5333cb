"""How good the decoder is: error rates, words, tables, reports."""
