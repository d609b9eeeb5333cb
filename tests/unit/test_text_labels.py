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
        ("she\u02bcd say", "she'd say"),
        ("don`t, can\u00b4t", "don't can't"),
        ("\u2018fine\u2019", "fine"),
        ("rock \u2019n\u2019 roll", "rock 'n' roll"),
        ("\u2019cause", "'cause"),
        ("\u201cHello,\u201d she said", "hello she said"),
        ("\u00abHello\u00bb", "hello"),
        ("na\u00efve", "naive"),
        ("nai\u0308ve", "naive"),
        ("CAF\u00c9", "cafe"),
        ("\u0130stanbul", "istanbul"),
        ("well\u2014yes", "well yes"),
        ("well--yes", "well yes"),
        ("mother\u2013daughter", "mother daughter"),
        ("self\u2011help", "self-help"),
        ("wait\u2026what", "wait what"),
        ("wait...what", "wait what"),
        ("yes.No", "yes no"),
        ("don't.stop", "don't stop"),
        ("no\u00a0break\u2009thin\u3000wide", "no break thin wide"),
        ("tab\tand\nline\u2028end", "tab and line end"),
        ("co\u00adoperate", "cooperate"),
        ("\ufeffhello\u200b you\u200e", "hello you"),
        ("\ufb01nd the \ufb02ag", "find the flag"),
        ("\uff57\uff49\uff44\uff45", "wide"),
        ("(aside) [noise] {x}", "aside noise x"),
        ("Mr. Smith", "mr smith"),
        ("birds\u2019 wings", "birds' wings"),
        ("- yes -", "yes"),
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
        ("you xqzzt and qqrx", "qqrx, xqzzt; add lines"),
        ("see 3 birds", "'3' has digits; spell numbers out"),
        ("\u00bd cup", "has digits"),
        ("Louis \u2163", "has digits"),
        ("x\u00b2", "has digits"),
        ("\u0663 birds", "has digits"),
        ("rock & roll", "'&' has '&'"),
        ("and/or", "'and/or' has '/'"),
        ("100 %", "has digits"),
        ("\u20ac uro", "has '\u20ac'"),
        ("me@home", "'me@home' has '@'"),
        ("\u043f\u0440\u0438\u0432\u0435\u0442", "has '\u043f'"),
        ("c\u0430t", "has '\u0430'"),  # a Cyrillic a
        ("hello\U0001f600", "has '\U0001f600'"),
        ("zero\u200bwidth", "how to pronounce zerowidth"),
        ("\u2116 one", "has '\u2116'"),
        ("", "it has no words"),
        (" ... ", "it has no words"),
        ("\u2014\u2026\u201d", "it has no words"),
    ],
)
def test_what_is_not_certain_is_named(sentence, reason):
    with pytest.raises(DataError, match=reason):
        text_phonemes(sentence)
