"""The alphabet is the public dataset's, and names and numbers convert into each other."""

import pytest
from brain_to_text.errors import DataError
from brain_to_text.labels.phonemes import (
    BLANK,
    N_PHONEMES,
    PHONEMES,
    SILENCE,
    phoneme_ids,
    phoneme_symbols,
)


def test_alphabet_has_blank_39_phonemes_and_silence():
    assert N_PHONEMES == len(set(PHONEMES)) == 41
    assert PHONEMES[BLANK] == "BLANK"
    assert PHONEMES[SILENCE] == " | "
    assert PHONEMES[1] == "AA" and PHONEMES[39] == "ZH"
    assert list(PHONEMES[1:SILENCE]) == sorted(PHONEMES[1:SILENCE])


def test_symbols_and_ids_are_inverse():
    ids = list(range(N_PHONEMES))
    assert phoneme_ids(phoneme_symbols(ids)).tolist() == ids


def test_stress_and_spaces_do_not_matter():
    assert phoneme_ids(["AH0", "AH1", " | ", "|"]).tolist() == [3, 3, 40, 40]


@pytest.mark.parametrize("symbol", ["QQ", "", "ah", "A H"])
def test_unknown_symbol_is_named(symbol):
    with pytest.raises(DataError, match=f"'{symbol}' is not a phoneme"):
        phoneme_ids([symbol])


@pytest.mark.parametrize("index", [-1, 41])
def test_id_outside_the_alphabet_is_named(index):
    with pytest.raises(DataError, match=f"{index} is outside 0 … 40"):
        phoneme_symbols([index])
