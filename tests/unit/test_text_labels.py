"""Phoneme labels from sentences: silence after each word, unknown words named."""

import pytest
from brain_to_text.errors import DataError
from brain_to_text.labels.phonemes import phoneme_symbols
from brain_to_text.labels.pronunciation import text_phonemes


def test_silence_follows_each_word_and_punctuation_does_not_matter():
    symbols = phoneme_symbols(text_phonemes("Hello, YOU!"))
    assert symbols == ["HH", "AH", "L", "OW", "|", "Y", "UW", "|"]


def test_synthetic_sentences_are_labelled_alike():
    import numpy as np
    from brain_to_text.dataset.synthetic import random_sentences, sentence_phonemes

    for sentence in random_sentences(100, np.random.default_rng(0)):
        assert text_phonemes(sentence).tolist() == sentence_phonemes(sentence).tolist()


def test_own_words_take_precedence():
    own = {"hello": [(1, 2)], "brand": [(5,)]}
    assert text_phonemes("hello brand", own).tolist() == [1, 2, 40, 5, 40]


@pytest.mark.parametrize(
    ("sentence", "reason"),
    [
        ("you xqzzt and qqrx", "qqrx, xqzzt; add lines"),
        ("see 3 birds", "digits; spell numbers out"),
        ("", "it has no words"),
        (" ... ", "it has no words"),
    ],
)
def test_what_cannot_be_pronounced_is_named(sentence, reason):
    with pytest.raises(DataError, match=reason):
        text_phonemes(sentence)
