"""Floor 1, vocabulary: phonemes, diphones, words, configuration, errors. Knows nothing of ours."""
