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
    ("typed", "plain"),
    [
        ("we\u2019ll go", "we'll go"),
        ("rock \u2019n\u2019 roll", "rock 'n' roll"),
        ("\u201cHello,\u201d she said", "hello she said"),
        ("na\u00efve", "naive"),
        ("CAF\u00c9", "cafe"),
        ("well\u2014yes", "well yes"),
        ("self\u2011help", "self-help"),
        ("wait\u2026what", "wait what"),
        ("yes.No", "yes no"),
        ("no\u00a0break\u2009thin\u3000wide", "no break thin wide"),
        ("co\u00adoperate", "cooperate"),
        ("\ufeffhello\u200b you\u200e", "hello you"),
        ("\ufb01nd the \ufb02ag", "find the flag"),
        ("(aside) [noise] {x}", "aside noise x"),
    ],
)
def test_text_as_people_type_it_is_labelled_as_its_plain_form(typed, plain):
    assert text_phonemes(typed).tolist() == text_phonemes(plain).tolist()


def test_accents_decide_between_two_words():
    resume = [phoneme_symbols(text_phonemes(word)) for word in ("resume", "r\u00e9sum\u00e9")]
    assert [way[-2] for way in resume] == ["M", "EY"]
    with pytest.raises(DataError, match="how to pronounce ros\u00e9"):
        text_phonemes("a ros\u00e9")  # the dictionary has "rose" alone
    own = {"ros\u00e9": [tuple(text_phonemes("row say")[[0, 1, 3, 4]])]}
    assert text_phonemes("rose", own).tolist() == text_phonemes("rose").tolist()
    assert text_phonemes("Ros\u00c9", own).tolist() == [*own["ros\u00e9"][0], 40]


def test_letters_are_spelt_out():
    assert phoneme_symbols(text_phonemes("the U.S."))[3:] == ["Y", "UW", "EH", "S", "|"]


@pytest.mark.parametrize(
    ("sentence", "reason"),
    [
        ("you xqzzt and qqrx", "xqzzt, qqrx; spell out numbers and signs, or add lines"),
        ("see 3 birds", "pronounce 3;"),
        ("Louis \u2163", "pronounce \u2173;"),
        ("rock & roll", "pronounce &;"),
        ("and/or", "pronounce and/or;"),
        ("c\u0430t", "pronounce c\u0430t;"),  # a Cyrillic a
        ("zero\u200bwidth", "pronounce zerowidth;"),
        ("\u2014\u2026\u201d", "has no words"),
    ],
)
def test_what_is_not_certain_is_named(sentence, reason):
    with pytest.raises(DataError, match=reason):
        text_phonemes(sentence)
