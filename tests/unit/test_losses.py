"""CTC feasibility, the joint objective and its schedule."""

from __future__ import annotations

import math
from itertools import groupby

import numpy as np
import pytest
import torch
from brain_to_text.config import ObjectiveConfig, PhonemeWeightSchedule
from brain_to_text.labels.diphones import marginalise_log_probs
from brain_to_text.model.losses import JointObjective, ctc_nll, min_frames
from support.training_examples import example_batch


def case(seed: int = 0):
    batch = example_batch([30, 24, 27], [0, 0, 1], seed=seed)
    logits = torch.randn(3, 14, 1681, generator=torch.Generator().manual_seed(seed))
    return logits, batch, torch.tensor([14, 11, 12])


def objective(weight: float = 0.0, schedule=None) -> JointObjective:
    return JointObjective(ObjectiveConfig(phoneme_weight=weight, schedule=schedule), 1681)


def test_min_frames_is_labels_plus_repeats() -> None:
    random = np.random.default_rng(0)
    labels = torch.from_numpy(random.integers(1, 4, (50, 12)))
    lengths = torch.from_numpy(random.integers(0, 13, 50))
    expected = [
        length + sum(sum(1 for _ in run) - 1 for _, run in groupby(row[:length]))
        for row, length in zip(labels.tolist(), lengths.tolist(), strict=True)
    ]
    assert min_frames(labels, lengths).tolist() == expected


def test_a_label_sequence_fits_exactly_from_min_frames_on() -> None:
    labels = torch.tensor([[3, 3, 5, 5, 5]])
    log_probs = torch.zeros(1, 12, 7).log_softmax(-1)
    need = int(min_frames(labels, torch.tensor([5])))
    for frames in range(5, 12):
        nll = ctc_nll(log_probs, labels, torch.tensor([frames]), torch.tensor([5]))
        assert torch.isfinite(nll).item() == (frames >= need)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_loss_is_the_weighted_mean_over_trials(weight: float) -> None:
    logits, batch, frames = case()
    terms = objective(weight)(logits, batch, frames, step=0)
    log_probs = logits.log_softmax(-1)
    diphone = ctc_nll(log_probs, batch.labels, frames, batch.label_lengths)
    phoneme = ctc_nll(
        marginalise_log_probs(log_probs), batch.phoneme_labels, frames, batch.phoneme_lengths
    )
    expected = (weight * phoneme + (1 - weight) * diphone).mean()
    torch.testing.assert_close(terms.total, expected)
    torch.testing.assert_close(terms.nats_per_frame, expected * 3 / frames.sum())
    if weight < 1:
        torch.testing.assert_close(terms.diphone, diphone.sum() / frames.sum())
    if weight > 0:
        torch.testing.assert_close(terms.phoneme, phoneme.sum() / frames.sum())


def test_a_term_of_weight_zero_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    import brain_to_text.model.losses as losses

    seen: list[int] = []
    original = losses.ctc_nll
    monkeypatch.setattr(
        losses, "ctc_nll", lambda p, *rest: (seen.append(p.shape[-1]), original(p, *rest))[1]
    )
    logits, batch, frames = case()
    only_diphone = objective(0.0)(logits, batch, frames, 0)
    only_phoneme = objective(1.0)(logits, batch, frames, 0)
    assert seen == [1681, 41]
    assert only_diphone.phoneme is None and only_phoneme.diphone is None


def test_alpha_grows_stepwise_by_global_step() -> None:
    scheduled = objective(schedule=PhonemeWeightSchedule(0.1, 0.6, 0.2, 1000))
    wanted = {0: 0.1, 999: 0.1, 1000: 0.3, 2500: 0.5, 3000: 0.6, 10**6: 0.6}
    for step, alpha in wanted.items():
        assert scheduled.alpha(step) == pytest.approx(alpha)
    assert objective(0.25).alpha(7) == 0.25 and objective().alpha(7) == 0
    assert scheduled.is_joint and objective(0.25).is_joint and not objective().is_joint


def test_a_phoneme_model_has_one_term() -> None:
    logits, batch, frames = case()
    batch.labels, batch.label_lengths = batch.phoneme_labels, batch.phoneme_lengths
    terms = JointObjective(ObjectiveConfig(), 41)(logits[..., :41], batch, frames, 0)
    assert terms.alpha == 0 and terms.phoneme is None and math.isfinite(float(terms.total))


def test_shares_of_a_global_batch_add_up_to_its_mean() -> None:
    logits, batch, frames = case()
    whole = objective(0.4)(logits, batch, frames, 0).total
    parts = [
        objective(0.4)(logits[rows], batch.take(rows), frames[rows], 0, global_batch_size=3).total
        for rows in ([0, 2], [1])
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_the_loss_is_float32_whatever_the_logits() -> None:
    logits, batch, frames = case()
    terms = objective(0.5)(logits.bfloat16(), batch, frames, 0)
    assert terms.total.dtype == torch.float32
