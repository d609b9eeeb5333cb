"""The maths: the decoder, its losses, its training step."""
