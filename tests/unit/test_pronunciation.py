"""Words are normalised as the field scores them and pronounced as the dictionary says."""

from __future__ import annotations

import pytest
from brain_to_text.errors import DataError, StorageError
from brain_to_text.labels.phonemes import phoneme_ids, phoneme_symbols
from brain_to_text.labels.pronunciation import (
    dictionary_words,
    lexicon_of,
    normalise_text,
    pronunciations_of,
    read_lexicon,
)


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


def test_the_dictionary_is_whole():
    assert len(set(dictionary_words())) == 126_052
    assert spoken("zywicki") == ["Z", "IH", "W", "IH", "K", "IY"]  # one of the last


def test_unknown_words_are_named():
    lexicon, unknown = lexicon_of(["cat", "xqzzt"])
    assert list(lexicon) == ["cat"]
    assert unknown == ["xqzzt"]


def test_a_users_lexicon_is_read(tmp_path):
    path = tmp_path / "lexicon.txt"
    path.write_text("# mine\nXqzzt K AE1 T |\nxqzzt(2) D AO G\n\n")
    lexicon = read_lexicon(path)
    assert lexicon == {
        "xqzzt": [
            tuple(phoneme_ids(["K", "AE", "T"]).tolist()),
            tuple(phoneme_ids(["D", "AO", "G"]).tolist()),
        ]
    }


def test_mistakes_in_a_lexicon_are_named(tmp_path):
    path = tmp_path / "lexicon.txt"
    path.write_text("cat K QQ T\n")
    with pytest.raises(DataError, match="line 1: 'QQ'"):
        read_lexicon(path)
    path.write_text("cat\n")
    with pytest.raises(DataError, match="'cat' has 0 phonemes"):
        read_lexicon(path)
    path.write_bytes(b"na\xefve N AY IY V\n")
    with pytest.raises(DataError, match=r"not UTF-8 text .byte 2."):
        read_lexicon(path)
    with pytest.raises(StorageError, match="--lexicon"):
        read_lexicon(tmp_path / "absent")
