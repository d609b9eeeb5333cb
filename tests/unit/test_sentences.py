"""Sentences stay in their vocabulary, cover the alphabet, and come with silence after each word."""

import numpy as np
from brain_to_text.dataset.synthetic import random_sentences, sentence_phonemes, vocabulary
from brain_to_text.labels.phonemes import SILENCE


def test_the_vocabulary_covers_every_phoneme():
    used = np.unique(np.concatenate([sentence_phonemes(word) for word in vocabulary()]))
    assert used.tolist() == list(range(1, 41))


def test_silence_follows_every_word():
    assert sentence_phonemes("you see").tolist() == [37, 34, SILENCE, 29, 18, SILENCE]


def test_a_small_vocabulary_is_kept_to():
    sentences = random_sentences(200, np.random.default_rng(0), size=60)
    words = {word for sentence in sentences for word in sentence.split()}
    assert words <= set(vocabulary(60))
    assert 50 <= len(vocabulary(60)) <= 70


def test_length_is_that_of_the_real_data():
    """About 29 phonemes with silences per sentence in the copy-task recordings."""
    lengths = [len(sentence_phonemes(s)) for s in random_sentences(500, np.random.default_rng(0))]
    assert 26 < np.mean(lengths) < 32
