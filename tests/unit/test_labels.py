"""Phonemes, diphones and pronunciations: inverse, strict, and as the dictionary says."""

import math

import numpy as np
import pytest
import torch
from brain_to_text.dataset.synthetic import random_sentences, sentence_phonemes
from brain_to_text.errors import DataError, StorageError
from brain_to_text.labels.diphones import (
    LABEL_FORMS,
    N_DIPHONES,
    collapse_to_phonemes,
    decode_diphones,
    encode_diphones,
    marginalise_log_probs,
)
from brain_to_text.labels.phonemes import (
    N_PHONEMES,
    PHONEMES,
    SILENCE,
    phoneme_ids,
    phoneme_symbols,
)
from brain_to_text.labels.pronunciation import (
    UnknownWordsError,
    dictionary_words,
    lexicon_of,
    normalise_text,
    pronunciations_of,
    read_lexicon,
    text_phonemes,
)
from hypothesis import given
from hypothesis import strategies as st

some_phonemes = st.lists(st.integers(1, 40), min_size=1, max_size=60)
forms = st.sampled_from(LABEL_FORMS)


# --- phonemes -------------------------------------------------------------------------------------


def test_the_alphabet_is_the_public_datasets():
    assert N_PHONEMES == len(set(PHONEMES)) == 41
    assert (PHONEMES[0], PHONEMES[1], PHONEMES[39], PHONEMES[40]) == ("BLANK", "AA", "ZH", " | ")
    assert list(PHONEMES[1:SILENCE]) == sorted(PHONEMES[1:SILENCE])
    ids = list(range(N_PHONEMES))
    assert phoneme_ids(phoneme_symbols(ids)).tolist() == ids
    assert phoneme_ids(["AH0", "AH1", " | ", "|"]).tolist() == [3, 3, 40, 40]


def test_what_is_not_in_the_alphabet_is_named():
    for symbol in ("QQ", "", "ah", "A H"):
        with pytest.raises(DataError, match=f"'{symbol}' is not a phoneme"):
            phoneme_ids([symbol])
    for index in (-1, 41):
        with pytest.raises(DataError, match=f"{index} is outside 0 … 40"):
            phoneme_symbols([index])


# --- diphones -------------------------------------------------------------------------------------


def test_both_forms_by_hand():
    # 0→1, 1→1, 1→2, 2→2, 2→0
    assert encode_diphones([1, 2], "self_loop").tolist() == [1, 42, 43, 84, 82]
    assert encode_diphones([1, 2], "transition").tolist() == [1, 43, 82]
    assert encode_diphones([1, 2], "transition", closing=False).tolist() == [1, 43]
    assert encode_diphones([], "self_loop").tolist() == []


@given(some_phonemes, forms, st.booleans())
def test_decoding_undoes_encoding(sequence, form, closing):
    encoded = encode_diphones(sequence, form, closing)
    assert encoded.dtype == np.int32 and encoded.min() >= 1 and encoded.max() < N_DIPHONES
    assert len(encoded) == (2 if form == "self_loop" else 1) * len(sequence) + closing
    assert collapse_to_phonemes(encoded, form) == sequence
    if closing or form == "transition":
        assert decode_diphones(encoded, form).tolist() == sequence
    else:
        with pytest.raises(DataError):  # a label was cut off at the end
            decode_diphones(encoded, form)


@given(some_phonemes, forms, st.integers(0, 200), st.integers(0, N_DIPHONES - 1))
def test_decoding_is_strict(sequence, form, position, wrong):
    changed = encode_diphones(sequence, form)
    changed[position % len(changed)] = wrong
    try:
        decoded = decode_diphones(changed, form)
    except DataError as error:
        assert "Diphone label" in str(error)
    else:  # then it is a label sequence, open or closed
        assert np.array_equal(encode_diphones(decoded, form, changed[-1] % 41 == 0), changed)


@given(st.lists(st.integers(0, N_DIPHONES - 1), max_size=80), forms)
def test_collapse_takes_any_sequence(sequence, form):
    result = collapse_to_phonemes(sequence, form)
    assert all(1 <= phoneme <= 40 for phoneme in result) and len(result) <= len(sequence)


def test_encoding_refuses_what_is_no_phoneme_or_form():
    for bad in (0, 41, -2):
        with pytest.raises(DataError, match=f"Phoneme label 1 is {bad}, outside 1 … 40"):
            encode_diphones([4, bad])
    with pytest.raises(DataError, match="'triphone' is unknown"):
        encode_diphones([4], "triphone")


def test_marginals_agree_with_brute_force_in_float64():
    logits = torch.randn(3, N_DIPHONES, dtype=torch.float64, generator=torch.manual_seed(0)) * 4
    log_probs = logits.log_softmax(-1)
    marginal = marginalise_log_probs(log_probs)
    assert marginal.shape == (3, 41)
    for row in range(3):
        for current in range(41):
            total = math.fsum(math.exp(log_probs[row, 41 * p + current]) for p in range(41))
            assert math.log(total) == pytest.approx(float(marginal[row, current]), abs=1e-12)


# --- pronunciations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Not too controversial.", "not too controversial"),
        ("What's  up,   Doc?", "what's up doc"),
        ("A well-known fact - really, yes!", "a well-known fact really yes"),
        ("rock 'n' roll", "rock'n' roll"),
        ("It\u2019s na\u00efve\u2014no\u2026 yes", "it's naive no yes"),
        ("", ""),
    ],
)
def test_text_is_normalised(sentence, expected):
    assert normalise_text(sentence) == expected
    assert normalise_text(expected) == expected


def spoken(word: str) -> list[str]:
    return phoneme_symbols(pronunciations_of(word)[0])


def test_words_compounds_and_possessives():
    assert spoken("cat") == ["K", "AE", "T"]
    assert len(pronunciations_of("either")) > 1
    assert spoken("cat-dog") == spoken("cat") + spoken("dog")
    assert spoken("aardvark's") == [*spoken("aardvark"), "S"]
    assert spoken("walrus's")[-2:] == ["IH", "Z"]
    assert lexicon_of(["cat", "xqzzt"]) == ({"cat": pronunciations_of("cat")}, ["xqzzt"])
    assert len(set(dictionary_words())) == 126_052
    assert spoken("zywicki") == ["Z", "IH", "W", "IH", "K", "IY"]  # one of the last


def test_sentences_become_phonemes_with_silence_after_each_word():
    symbols = phoneme_symbols(text_phonemes("Hello, YOU!"))
    assert symbols == ["HH", "AH", "L", "OW", "|", "Y", "UW", "|"]
    assert phoneme_symbols(text_phonemes("the U.S."))[3:] == ["Y", "UW", "EH", "S", "|"]
    own = {"hello": [(1, 2)], "brand": [(5,)]}
    assert text_phonemes("hello brand", own).tolist() == [1, 2, 40, 5, 40]
    for sentence in random_sentences(100, np.random.default_rng(0)):
        assert text_phonemes(sentence).tolist() == sentence_phonemes(sentence).tolist()


@pytest.mark.parametrize(
    ("typed", "plain"),
    [
        ("we\u2019ll go", "we'll go"),
        ("\u201cHello,\u201d she said", "hello she said"),
        ("CAF\u00c9", "cafe"),
        ("well\u2014yes", "well yes"),
        ("self\u2011help", "self-help"),
        ("wait\u2026what", "wait what"),
        ("yes.No", "yes no"),
        ("no\u00a0break\u2009thin\u3000wide", "no break thin wide"),
        ("\ufeffco\u00adoperate\u200b", "cooperate"),
        ("\ufb01nd the \ufb02ag", "find the flag"),
        ("(aside) [noise] {x}", "aside noise x"),
    ],
)
def test_text_as_people_type_it_is_labelled_as_its_plain_form(typed, plain):
    assert text_phonemes(typed).tolist() == text_phonemes(plain).tolist()


def test_accents_decide_between_two_words():
    resume = [phoneme_symbols(text_phonemes(word)) for word in ("resume", "r\u00e9sum\u00e9")]
    assert [way[-2] for way in resume] == ["M", "EY"]
    with pytest.raises(DataError, match="is known for ros\u00e9"):
        text_phonemes("a ros\u00e9")  # the dictionary has "rose" alone
    own = {"ros\u00e9": [(28, 25, 38, 13)]}
    assert text_phonemes("rose", own).tolist() == text_phonemes("rose").tolist()
    assert text_phonemes("Ros\u00c9", own).tolist() == [*own["ros\u00e9"][0], SILENCE]


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("you xqzzt and qqrx", ["xqzzt", "qqrx"]),
        ("see 3 birds", ["3"]),
        ("Louis \u2163", ["\u2173"]),
        ("rock & roll", ["&"]),
        ("and/or", ["and/or"]),
        ("c\u0430t", ["c\u0430t"]),  # a Cyrillic a
        ("zero\u200bwidth", ["zerowidth"]),
    ],
)
def test_words_that_are_not_certain_are_named(sentence, words):
    reason = f"known for {', '.join(words)}; spell out numbers and signs, or add lines 'word PHO"
    with pytest.raises(UnknownWordsError, match=reason) as refused:
        text_phonemes(sentence)
    assert refused.value.words == words
    with pytest.raises(DataError, match="has no words"):
        text_phonemes("\u2014\u2026\u201d")


def test_a_users_lexicon_is_read_and_its_mistakes_are_named(tmp_path):
    path = tmp_path / "lexicon.txt"
    path.write_text("# mine\nXqzzt K AE1 T |\nxqzzt(2) D AO G\n\n")
    ways = [tuple(phoneme_ids(sounds).tolist()) for sounds in (["K", "AE", "T"], ["D", "AO", "G"])]
    assert read_lexicon(path) == {"xqzzt": ways}
    for text, reason in (
        (b"cat K QQ T\n", "line 1: 'QQ'"),
        (b"cat |\n", "'cat' has 0 phonemes"),
        (b"na\xefve N AY IY V\n", r"not UTF-8 text .byte 2."),
    ):
        path.write_bytes(text)
        with pytest.raises(DataError, match=reason):
            read_lexicon(path)
    with pytest.raises(StorageError, match="--lexicon"):
        read_lexicon(tmp_path / "absent")
