"""Decoding, edit counts and error rates against plain renderings of their definitions."""

from __future__ import annotations

from functools import partial
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from brain_to_text.labels.diphones import collapse_to_phonemes, marginalise_log_probs
from brain_to_text.model.losses import ctc_nll
from brain_to_text.scoring import decoding
from brain_to_text.scoring.decoding import DecodedSplit, Inference, decode, greedy_decode
from brain_to_text.scoring.error_rates import ErrorCounts
from hypothesis import given
from hypothesis import strategies as st
from support.decoded_trials import dataset_of
from support.training_examples import build, example_batch, of_phonemes, rows_of, small_config


@given(st.lists(st.lists(st.integers(0, 3), min_size=8, max_size=8), min_size=1, max_size=4))
def test_greedy_decoding_merges_repeats_before_it_drops_blanks(frames: list[list[int]]) -> None:
    lengths = np.array([(3 * i) % 9 for i in range(len(frames))])
    expected = [
        [c for c, _ in groupby(row[:length]) if c != 0]
        for row, length in zip(frames, lengths.tolist(), strict=True)
    ]
    assert greedy_decode(np.array(frames), lengths) == expected


def best(scores: torch.Tensor, frames: torch.Tensor) -> list[list[int]]:
    return greedy_decode(scores.argmax(-1).numpy(), frames.numpy())


def decoded(parts, dataset, **options) -> DecodedSplit:
    """The pass over (batch, its logits, its frames) that a model would have given."""
    inference = SimpleNamespace(over=lambda _: (part for part in parts), ctc_kernel="auto")
    result = decode(inference, dataset, **options)
    assert result is not None
    return result


def scored(n_batches: int = 1):
    batch = example_batch([40, 28, 33, 21, 36, 30], [2, 0, 0, 2, 1, 1])
    frames = torch.tensor([18, 12, 15, 9, 16, 13])
    logits = 3 * torch.randn(6, 18, 1681, generator=torch.Generator().manual_seed(0))
    for trial in range(6):  # half of each trial's labels are there
        for position in range(0, 7, 2):
            logits[trial, position, batch.labels[trial, position]] += 20
    rows = [part.tolist() for part in np.array_split(np.arange(6), n_batches)]
    parts = [(rows_of(batch, part), logits[part], frames[part]) for part in rows]
    result = decoded(parts, dataset_of([batch]), loss=True)
    return logits, batch, frames, result


def edits(references: torch.Tensor, hypotheses: list[list[int]]) -> int:
    pairs = zip(references.tolist(), hypotheses, strict=True)
    return sum(ErrorCounts.between(r, h).edits for r, h in pairs)


def test_rates_are_sums_of_edits_over_sums_of_labels() -> None:
    logits, batch, frames, result = scored()
    log_probs = logits.log_softmax(-1)
    diphones = best(logits, frames)
    phonemes = best(marginalise_log_probs(log_probs), frames)
    path = [collapse_to_phonemes(d) for d in diphones]
    numbers, n_phonemes = result.numbers, batch.phoneme_labels.numel()
    der = edits(batch.labels, diphones) / batch.labels.numel()
    assert numbers["der"] == pytest.approx(der) and der > 0
    assert numbers["per"] == pytest.approx(edits(batch.phoneme_labels, phonemes) / n_phonemes)
    assert numbers["per_path"] == pytest.approx(edits(batch.phoneme_labels, path) / n_phonemes)
    nats = ctc_nll(log_probs, batch.labels, frames, batch.label_lengths).sum()
    assert numbers["ctc_loss"] == pytest.approx(float(nats / frames.sum()), rel=1e-5)
    per_session, rows = numbers["per_session"], [1, 2]
    assert per_session.keys() == set("abc") and numbers["n_trials"] == 6
    der = edits(batch.labels[rows], [diphones[row] for row in rows]) / batch.labels[rows].numel()
    assert per_session["a"]["DER"] == pytest.approx(der)
    assert sum(s["n_trials"] for s in per_session.values()) == 6


def test_the_result_does_not_depend_on_how_trials_are_batched() -> None:
    whole, parts = scored(1)[-1].numbers, scored(3)[-1].numbers
    assert whole["counts"] == parts["counts"] and whole["n_trials"] == parts["n_trials"]
    assert whole["ctc_loss"] == pytest.approx(parts["ctc_loss"], rel=1e-6)
    for session, rates in whole["per_session"].items():
        assert rates == pytest.approx(parts["per_session"][session], rel=1e-6)


def test_a_phoneme_model_has_one_error_rate() -> None:
    _, batch, frames, _ = scored()
    batch = of_phonemes(batch)
    logits = torch.randn(6, 18, 41, generator=torch.Generator().manual_seed(1))
    dataset = dataset_of([batch], form="phoneme")
    numbers = decoded([(batch, logits, frames)], dataset, loss=True).numbers
    assert numbers["per"] == numbers["der"] and "per_path" not in numbers
    assert "DER" not in numbers["per_session"]["a"]


def tensors_in(value) -> list[torch.Tensor]:
    """Every tensor within nested containers and objects."""
    if isinstance(value, torch.Tensor):
        return [value]
    if hasattr(value, "__dict__"):
        value = vars(value)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for item in value for tensor in tensors_in(item)]


def test_nothing_heavier_than_class_ids_waits_to_be_scored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, waiting = example_batch([40, 28], [0, 1]), []
    take = decoding._best
    monkeypatch.setattr(
        decoding, "_best", lambda *given: waiting.append(take(*given)) or waiting[0]
    )
    parts = [(batch, torch.randn(2, 18, 1681), torch.tensor([18, 12]))]
    decoded(parts, dataset_of([batch]), loss=True)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors_in(waiting)}
    ids = 2 * 18 * 2 * 2  # int16 diphones and phonemes
    per_trial = 2 * (4 + 2 * 8)  # a loss, frames, index
    assert sum(storage.nbytes() for storage in storages.values()) == ids + per_trial


# --- the forward pass -----------------------------------------------------------------------------


def test_autocast_is_obeyed():
    batch = example_batch([60, 40], [0, 1])
    step = build(small_config())
    cast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    logits = Inference(step.model, step.augmentation, cast).logits(batch)
    assert logits.dtype == torch.bfloat16
