"""Encoding and decoding are inverse in both forms, wrong sequences are refused, sums are right."""

import math

import numpy as np
import pytest
import torch
from brain_to_text.errors import DataError
from brain_to_text.labels.diphones import (
    LABEL_FORMS,
    N_DIPHONES,
    collapse_to_phonemes,
    decode_diphones,
    detect_label_form,
    encode_diphones,
    marginalise_log_probs,
)
from hypothesis import given
from hypothesis import strategies as st

phonemes = st.lists(st.integers(1, 40), max_size=60)
some_phonemes = st.lists(st.integers(1, 40), min_size=1, max_size=60)
forms = st.sampled_from(LABEL_FORMS)


def test_self_loop_form_by_hand():
    # 0→1, 1→1, 1→2, 2→2, 2→0
    assert encode_diphones([1, 2], "self_loop").tolist() == [1, 42, 43, 84, 82]


def test_transition_form_by_hand():
    assert encode_diphones([1, 2], "transition").tolist() == [1, 43, 82]
    assert encode_diphones([1, 2], "transition", closing=False).tolist() == [1, 43]


@given(phonemes, forms, st.booleans())
def test_decode_undoes_encode(sequence, form, closing):
    encoded = encode_diphones(sequence, form, closing)
    assert decode_diphones(encoded, form).tolist() == sequence
    assert encoded.dtype == np.int32
    expected = (2 if form == "self_loop" else 1) * len(sequence) + closing
    assert len(encoded) == (expected if sequence else 0)


@given(some_phonemes, forms)
def test_every_label_is_a_class_and_never_the_blank(sequence, form):
    encoded = encode_diphones(sequence, form)
    assert encoded.min() >= 1
    assert encoded.max() < N_DIPHONES


@given(some_phonemes, forms)
def test_the_form_is_recognised(sequence, form):
    assert detect_label_form(encode_diphones(sequence, form), sequence) == form


@given(some_phonemes)
def test_an_open_self_loop_label_is_not_taken_for_a_whole_one(sequence):
    cut = encode_diphones(sequence, "self_loop", closing=False)
    assert detect_label_form(cut, sequence) is None


@given(some_phonemes, some_phonemes, forms)
def test_labels_of_another_sentence_are_recognised_as_such(sequence, other, form):
    def doubled(phonemes):  # its transitions are the self-loop form of `phonemes`
        return [p for p in phonemes for _ in range(2)]

    if other not in (sequence, doubled(sequence)) and sequence != doubled(other):
        assert detect_label_form(encode_diphones(sequence, form), other) is None


@given(phonemes, forms, st.booleans())
def test_collapse_undoes_encode(sequence, form, closing):
    assert collapse_to_phonemes(encode_diphones(sequence, form, closing), form) == sequence


@given(st.lists(st.integers(0, N_DIPHONES - 1), max_size=80), forms)
def test_collapse_takes_any_sequence(sequence, form):
    result = collapse_to_phonemes(sequence, form)
    assert all(1 <= phoneme <= 40 for phoneme in result)
    assert len(result) <= len(sequence)


@given(some_phonemes, forms, st.integers(0, 200), st.integers(0, N_DIPHONES - 1))
def test_decode_is_strict(sequence, form, position, wrong):
    encoded = encode_diphones(sequence, form)
    position %= len(encoded)
    changed = encoded.copy()
    changed[position] = wrong
    try:
        decoded = decode_diphones(changed, form)
    except DataError as error:
        assert "Diphone label" in str(error)
    else:  # then it is a label sequence, open or closed
        closed = changed[-1] % 41 == 0
        assert np.array_equal(encode_diphones(decoded, form, closed), changed)


@pytest.mark.parametrize("bad", [[0], [41 * 3], [-1], [N_DIPHONES], [5, 6], [1, 42, 43]])
def test_what_is_no_self_loop_label_is_refused(bad):
    with pytest.raises(DataError, match="Diphone label"):
        decode_diphones(bad, "self_loop")


@pytest.mark.parametrize("bad", [[0], [41], [3, 0, 4], [1, 2 * 41 + 3]])
def test_what_is_no_transition_label_is_refused(bad):
    with pytest.raises(DataError, match="Diphone label"):
        decode_diphones(bad, "transition")


@pytest.mark.parametrize("bad", [0, 41, -2])
def test_encode_refuses_what_is_no_phoneme(bad):
    with pytest.raises(DataError, match=f"Phoneme label 1 is {bad}, outside 1 … 40"):
        encode_diphones([4, bad])


def test_encode_refuses_an_unknown_form():
    with pytest.raises(DataError, match="'triphone' is unknown"):
        encode_diphones([4], "triphone")


def test_marginals_agree_with_brute_force_in_float64():
    logits = torch.randn(3, 2, N_DIPHONES, dtype=torch.float64, generator=torch.manual_seed(0)) * 4
    log_probs = logits.log_softmax(-1)
    marginal = marginalise_log_probs(log_probs)
    assert marginal.shape == (3, 2, 41)
    for i in range(3):
        for j in range(2):
            for current in range(41):
                total = math.fsum(
                    math.exp(log_probs[i, j, 41 * previous + current]) for previous in range(41)
                )
                assert math.log(total) == pytest.approx(float(marginal[i, j, current]), abs=1e-12)
    assert torch.allclose(marginal.exp().sum(-1), torch.ones(3, 2, dtype=torch.float64))


def test_blank_and_every_boundary_class_become_blank():
    log_probs = torch.full((N_DIPHONES,), -math.inf)
    log_probs[[0, 41 * 7, 41 * 40]] = math.log(1 / 3)
    assert marginalise_log_probs(log_probs)[0] == pytest.approx(0.0, abs=1e-6)
