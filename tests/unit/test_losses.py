"""CTC feasibility, the joint objective and its schedule."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from brain_to_text.config_reader import load_config
from brain_to_text.dataset.selection import ctc_problem
from brain_to_text.dataset.trial_record import TrialRecord
from brain_to_text.labels.diphones import marginalise_log_probs
from brain_to_text.model.losses import JointObjective, ctc_nll
from brain_to_text.model.rnn_model import Packing
from support.training_examples import CPU, example_batch, of_phonemes, small_config


def case(seed: int = 0, frames: tuple[int, ...] = (14, 11, 12)):
    """Logits [37, 1681] of the frames that exist, whose they are, and their batch."""
    batch = example_batch([30, 24, 27], [0, 0, 1], seed=seed)
    packing = Packing.of(torch.tensor(frames), 14, CPU)
    random = torch.Generator().manual_seed(seed)
    return torch.randn(sum(frames), 1681, generator=random), packing, batch


def objective(*points: tuple[float, float], n_classes: int = 1681) -> JointObjective:
    """Of weights by step."""
    config = small_config(dataset__n_classes=n_classes)
    config.objective.schedule = [list(point) for point in points] or None
    return JointObjective(config)


def loss(weight: float, *case, n_classes: int = 1681):
    return objective(n_classes=n_classes)(*case, weight)


def test_what_ctc_can_and_cannot_align_is_what_selection_says() -> None:
    labels = np.array([3, 3, 5, 5, 5])
    log_probs = torch.zeros(1, 12, 7).log_softmax(-1)
    for frames in range(5, 12):
        nll = ctc_nll(
            log_probs, torch.from_numpy(labels)[None], torch.tensor([frames]), torch.tensor([5])
        )
        record = TrialRecord("s", "train", "", "", frames, 1, "<f4", 0, 0, class_ids=labels)
        table = SimpleNamespace(
            n_time_steps=[frames], frames_needed=[record.frames_needed], n_labels=[len(labels)]
        )
        problem = ctc_problem(table, 0, 1, 1, 0)
        assert torch.isfinite(nll).item() == (problem is None) == (frames >= 8)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_loss_is_the_weighted_mean_over_trials(weight: float) -> None:
    logits, packing, batch = case()
    terms = loss(weight, logits, packing, batch)
    log_probs, frames = packing.padded(logits.log_softmax(-1)), packing.frame_lengths
    diphone = ctc_nll(log_probs, batch.labels, frames, batch.label_lengths)
    phoneme = ctc_nll(
        marginalise_log_probs(log_probs), batch.phoneme_labels, frames, batch.phoneme_lengths
    )
    expected = (weight * phoneme + (1 - weight) * diphone).mean()
    torch.testing.assert_close(terms.total, expected)
    torch.testing.assert_close(terms.nats_per_frame, diphone.sum() / frames.sum())
    if weight > 0:
        torch.testing.assert_close(terms.phoneme, phoneme.sum() / frames.sum())


def test_what_is_logged_as_loss_begins_at_the_logarithm_of_the_classes_at_every_weight() -> None:
    logits, packing, batch = case()
    for weight in (0.0, 0.4, 1.0):
        terms = loss(weight, logits * 1e-3, packing, batch)
        alignments = 2 * 7 / 11 * math.log(14)  # generously
        assert math.log(1681) - alignments < float(terms.nats_per_frame) < math.log(1681) + 0.01


def test_a_term_of_weight_zero_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    import brain_to_text.model.losses as losses

    seen: list[tuple[int, bool]] = []
    original = losses.ctc_nll
    monkeypatch.setattr(
        losses,
        "ctc_nll",
        lambda p, *rest: (seen.append((p.shape[-1], p.requires_grad)), original(p, *rest))[1],
    )
    logits, packing, batch = case()
    logits.requires_grad_()
    assert loss(0.0, logits, packing, batch).phoneme is None
    loss(1.0, logits, packing, batch).total.backward()
    assert seen == [(1681, True), (1681, False), (41, True)]


def test_a_diphone_sequence_that_cannot_fit_does_not_spoil_the_phoneme_term() -> None:
    logits, packing, batch = case(frames=(4, 4, 4))  # three phonemes fit, seven diphones do not
    terms = loss(1.0, logits.requires_grad_(), packing, batch)
    terms.total.backward()
    assert terms.nats_per_frame.isinf() and terms.total.isfinite()
    assert torch.isfinite(logits.grad).all()


def test_the_weight_is_linear_between_its_points() -> None:
    scheduled = objective((300, 1.0), (700, 0.4))
    wanted = {0: 1.0, 300: 1.0, 400: 0.85, 600: 0.55, 700: 0.4, 10**6: 0.4}
    for step, alpha in wanted.items():
        assert scheduled.alpha(step) == pytest.approx(alpha)
    fixed = objective((0, 0.25))
    assert fixed.alpha(7) == 0.25 and objective().alpha(7) == 0
    assert scheduled.is_joint and fixed.is_joint and not objective().is_joint


def test_a_schedule_counts_in_shares_of_the_run_or_in_steps() -> None:
    changes = {"dataset.n_classes": 1681, "num_training_batches": 1000}
    for schedule in ("[[0.3, 1], [0.7, 0.4]]", "[[300, 1], [700, 0.4]]", "[[0.3, 1], [700, 0.4]]"):
        config = load_config(None, {**changes, "objective.schedule": schedule})
        scheduled = JointObjective(config)
        assert [scheduled.alpha(s) for s in (0, 500, 999)] == pytest.approx([1.0, 0.7, 0.4])
    config = load_config(None, {**changes, "objective.phoneme_weight": 0.2})
    assert JointObjective(config).alpha(500) == 0.2


def test_a_phoneme_model_has_one_term() -> None:
    logits, packing, batch = case()
    terms = loss(0.0, logits[:, :41], packing, of_phonemes(batch), n_classes=41)
    assert terms.alpha == 0 and terms.phoneme is None and math.isfinite(float(terms.total))
