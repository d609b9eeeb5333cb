"""The fast path against the float64 reference: forward, gradients, fifty updates."""

from __future__ import annotations

import math

import pytest
import torch
from brain_to_text.model.losses import ctc_nll
from brain_to_text.model.rnn_model import GRUDecoder
from brain_to_text.streaming.batch import Batch
from support import reference_float64 as reference
from support.training_examples import CPU, build, example_batch, small_config

STEPS = 50
DAYS = [[0, 0, 1, 1], [1, 2, 2, 2], [0, 0, 0, 2], [1, 1, 1, 1]]  # session 0 pauses, then returns


def float64(model: GRUDecoder) -> reference.Weights:
    return {name: p.detach().double().clone() for name, p in model.named_parameters()}


def reference_logits(batch: Batch, trial: int, weights, config) -> torch.Tensor:
    features = batch.features[trial, : batch.n_time_steps[trial]].double()
    return reference.logits(
        reference.smooth(features, config.dataset.data_transforms.smooth_kernel_std),
        int(batch.day_indices[trial]),
        weights,
        layers=config.model.n_layers,
        patch_size=config.model.patch_size,
        patch_stride=config.model.patch_stride,
        bidirectional=config.model.bidirectional,
    )


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("size", "stride"), [(4, 2), (5, 2), (14, 4), (3, 3), (2, 3)])
def test_forward_agrees_to_float32_rounding(bidirectional: bool, size: int, stride: int) -> None:
    config = small_config(
        model__bidirectional=bidirectional, model__patch_size=size, model__patch_stride=stride
    )
    step = build(config)
    for parameter in step.model.day_weights:  # away from the identity
        torch.nn.init.normal_(parameter, std=0.5)
    batch = example_batch([31, 40, 25], [2, 0, 2])
    features, n = step.augmentation(batch.features, batch.n_time_steps)
    fast = step.model.eval()(features, batch.day_indices, n_time_steps=n)
    weights = float64(step.model)
    for trial, frames in enumerate(step.model.frame_lengths(n).tolist()):
        slow = reference_logits(batch, trial, weights, config)
        assert len(slow) == frames
        torch.testing.assert_close(fast[trial, :frames].double(), slow, rtol=0, atol=3e-6)


def test_fifty_updates_follow_the_reference() -> None:
    """Loss, gradient norm and every weight: schedules, clipping, decay, absent sessions.

    The phoneme term comes in from step 0 on, where its weight is 0.
    """
    config = small_config(
        lr_warmup_steps=5,
        lr_warmup_steps_day=8,
        lr_decay_steps=40,
        lr_max=0.05,
        lr_min=0.001,
        lr_max_day=0.1,
        lr_min_day=0.01,
        weight_decay=0.1,
        weight_decay_day=0.05,
        grad_norm_clip_value=4.0,
    )
    config.objective.schedule = [[0, 0.0], [36, 0.6]]
    config.num_training_batches = STEPS
    step = build(config)
    weights = float64(step.model)
    adam = reference.AdamW((config.beta0, config.beta1), config.epsilon)
    clipped = 0
    for k in range(STEPS):
        days = DAYS[3 if 20 <= k < 30 else k % 3]
        batch = example_batch([15, 12, 10, 14], days, n_phonemes=1, seed=k)
        result = step(batch, k)

        alpha = min(0.6, 0.6 * k / 36)
        for w in weights.values():
            w.requires_grad_(True)
        losses = []
        for trial in range(4):
            log_probs = reference_logits(batch, trial, weights, config).log_softmax(1)
            diphone = reference.ctc(log_probs, batch.labels[trial].tolist())
            marginal = reference.marginalise(log_probs, 41)
            phoneme = reference.ctc(marginal, batch.phoneme_labels[trial].tolist())
            losses.append(alpha * phoneme + (1 - alpha) * diphone)
        loss = torch.stack(losses).mean()
        used = {n: w for n, w in weights.items() if "day" not in n or int(n.split(".")[1]) in days}
        gradients = dict(zip(used, torch.autograd.grad(loss, list(used.values())), strict=True))
        norm, gradients = reference.clip(gradients, config.grad_norm_clip_value)
        clipped += norm > config.grad_norm_clip_value
        for name, g in gradients.items():
            day = "day" in name
            bias = name == "out.bias" or name.startswith("gru.bias")
            peak, least = (0.1, 0.01) if day else (0.05, 0.001)
            rate = peak * reference.multiplier(
                k, peak, least, STEPS if day else 40, 8 if day else 5
            )
            decay = 0.05 if day else 0.0 if bias else 0.1
            weights[name] = weights[name].detach()
            adam.step(name, weights[name], g, rate, decay)
        weights = {name: w.detach() for name, w in weights.items()}

        assert float(result.terms.total) == pytest.approx(float(loss.detach()), rel=2e-5)
        assert float(result.grad_norm) == pytest.approx(norm, rel=2e-4)
        assert result.terms.alpha == pytest.approx(alpha)
    for name, parameter in step.model.named_parameters():
        torch.testing.assert_close(
            parameter.detach().double(), weights[name], rtol=0, atol=2e-5, msg=name
        )
    assert 0 < clipped < STEPS, "the test should see both clipped and unclipped steps"
    assert adam.moments["day_weights.1"][0] > adam.moments["day_weights.0"][0] > 0


@pytest.mark.parametrize("classifier", ["plain", "factored"])
@pytest.mark.parametrize("lengths", [[37, 24, 51, 15], [33]])
def test_the_loss_of_packed_frames_is_that_of_each_trial_alone_in_float64(
    classifier: str, lengths: list[int]
) -> None:
    """And so is every gradient, columns beyond the classes (as on a GPU) or not."""
    config = small_config(model__classifier=classifier, objective__phoneme_weight=0.3)
    step = build(config)
    model, batch = step.model.double(), example_batch(lengths, [0, 2, 1, 1][: len(lengths)], 2)
    for parameter in model.out.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    weights = dict(model.named_parameters())
    weights |= {"out.weight": model.out.weight, "out.bias": model.out.bias}
    losses = []
    for trial in range(len(lengths)):
        log_probs = reference_logits(batch, trial, weights, config).log_softmax(1)
        phoneme = reference.ctc(
            reference.marginalise(log_probs, 41), batch.phoneme_labels[trial].tolist()
        )
        diphone = reference.ctc(log_probs, batch.labels[trial].tolist())
        losses.append(0.3 * phoneme + 0.7 * diphone)
    used = [p for n, p in model.named_parameters() if "day" not in n]
    loss = torch.stack(losses).mean()
    expected = torch.autograd.grad(loss, used)
    features = batch.features.double()
    for trial, length in enumerate(lengths):
        features[trial, :length] = reference.smooth(features[trial, :length], 2.0)
    for beyond in (0, 7):
        rows, packing, _ = model.packed_logits(features, batch.day_indices, batch.n_time_steps)
        assert rows.shape == (int(packing.frame_lengths.sum()), 1681)
        rows = torch.nn.functional.pad(rows, (0, beyond), value=-math.inf)
        terms = step.objective(rows, packing, batch, 0.3)
        torch.testing.assert_close(terms.total, loss, rtol=1e-10, atol=0)
        for found, wanted in zip(torch.autograd.grad(terms.total, used), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("T", "C", "labels"),
    [(4, 3, [1, 2]), (5, 3, [1, 1]), (5, 3, [2]), (6, 3, [1, 2, 1]), (4, 4, []), (3, 3, [2, 2])],
)
def test_ctc_agrees_with_enumerating_every_path(T: int, C: int, labels: list[int]) -> None:
    log_probs = torch.randn(T, C, dtype=torch.float64, generator=_generator()).log_softmax(1)
    truth = reference.ctc_by_enumeration(log_probs, labels)
    torch.testing.assert_close(reference.ctc(log_probs, labels), truth, rtol=1e-12, atol=1e-12)
    padded = torch.tensor([[*labels, 0]])
    fast = ctc_nll(
        log_probs.float().unsqueeze(0), padded, torch.tensor([T]), torch.tensor([len(labels)])
    )
    torch.testing.assert_close(fast[0].double(), truth, rtol=1e-6, atol=1e-6)


def test_bfloat16_stays_within_its_bounds() -> None:
    """bfloat16 keeps 8 bits: products round at 2^-8, and the loss moves by well under a percent."""
    exact = build(small_config(model__n_units=64))
    rounded = build(small_config(model__n_units=64, amp_dtype="bfloat16"))
    assert rounded.amp_dtype == torch.bfloat16 and exact.amp_dtype is None
    batch = example_batch([60, 75, 48], [0, 1, 1])
    features, n = exact.augmentation(batch.features, batch.n_time_steps)
    outputs = []
    for step in (exact, rounded):
        with step.autocast(), torch.no_grad():
            outputs.append(step.model.eval()(features, batch.day_indices, n_time_steps=n).float())
    spread = float(outputs[0].std())
    assert float((outputs[0] - outputs[1]).abs().max()) < 0.1 * spread
    assert float((outputs[0] - outputs[1]).square().mean().sqrt()) < 0.02 * spread
    a, b = exact(batch, 0), rounded(batch, 0)
    assert float(b.terms.total) == pytest.approx(float(a.terms.total), rel=2e-3)
    assert float(b.grad_norm) == pytest.approx(float(a.grad_norm), rel=3e-2)
    assert all(p.dtype == torch.float32 for p in rounded.model.parameters())


def _generator() -> torch.Generator:
    return torch.Generator(CPU).manual_seed(7)
