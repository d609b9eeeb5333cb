"""Logits for listening only: those of the model, by fewer multiplications."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from brain_to_text.model.augmentations import Augmentation
from brain_to_text.model.patch_projection import OUTPUTS, PatchProjection, minimal_filter
from brain_to_text.model.rnn_model import GRUDecoder
from brain_to_text.model.trial_logits import TrialLogits
from support.training_examples import example_batch, small_config


@pytest.mark.parametrize("taps", [2, 3, 4])
def test_a_minimal_filter_is_the_correlation(taps):
    transforms = minimal_filter(OUTPUTS, taps)
    assert len(transforms.inputs_to) == OUTPUTS + taps - 1
    random = np.random.default_rng(0)
    inputs, filter_ = random.standard_normal(OUTPUTS + taps - 1), random.standard_normal(taps)
    left, middle, right = (
        matrix.double().numpy()
        for matrix in (transforms.outputs_from, transforms.taps_to, transforms.inputs_to)
    )
    expected = [inputs[k : k + taps] @ filter_ for k in range(OUTPUTS)]
    np.testing.assert_allclose(left @ ((middle @ filter_) * (right @ inputs)), expected, atol=1e-5)


@pytest.mark.parametrize(("size", "stride"), [(14, 4), (16, 4), (12, 4), (9, 4), (5, 2), (3, 1)])
def test_gates_are_patches_times_weights(size, stride):
    assert PatchProjection.suits(size, stride)
    C, G, frames = 6, 10, [1, 4, 11]
    torch.manual_seed(0)
    weight, bias = torch.randn(G, size * C), torch.randn(G)
    project = PatchProjection(weight, bias, size, stride)
    counts = [project.blocks_of(f) for f in frames]
    blocks = torch.randn(sum(counts), project.block)
    begins = np.concatenate([[0], np.cumsum(counts)[:-1]])
    tiles = [-(-f // OUTPUTS) for f in frames]
    starts = np.concatenate(
        [b + OUTPUTS * np.arange(t) for b, t in zip(begins, tiles, strict=True)]
    )
    gates = project(blocks, torch.from_numpy(starts))
    first = np.concatenate([[0], np.cumsum(tiles)[:-1]])
    for begin, tile, count in zip(begins, first, frames, strict=True):
        bins = blocks[begin:].reshape(-1).double()
        for frame in range(count):
            patch = bins[frame * stride * C :][: size * C]
            expected = patch @ weight.double().t() + bias.double()
            own = gates[frame % OUTPUTS, tile + frame // OUTPUTS]
            assert torch.allclose(own.double(), expected, atol=1e-4)


@pytest.mark.parametrize(("size", "stride"), [(4, 4), (8, 4), (20, 4), (0, 0)])
def test_patches_that_overlap_otherwise_are_left_to_the_model(size, stride):
    assert not PatchProjection.suits(size, stride)


def decoder(**changes):
    config = small_config(model__patch_size=14, model__patch_stride=4, **changes)
    torch.manual_seed(0)
    model = GRUDecoder.from_config(config, n_days=3).eval()
    with torch.no_grad():
        for weight in model.day_weights:
            weight.add_(0.1 * torch.randn_like(weight))
    return model, Augmentation(config.dataset.data_transforms)


# 13 bins are too short for a frame; 1033 bins make more than one chunk of tiles with the others
LENGTHS = [30, 14, 171, 13, 1033, 90, 17]
DAYS = [0, 1, 1, 0, 2, 2, 1]


@pytest.mark.parametrize(
    "changes",
    [{}, {"model__bidirectional": True}, {"model__n_layers": 1}, {"dataset__n_classes": 41}],
    ids=["plain", "bidirectional", "one layer", "phonemes"],
)
def test_logits_are_the_models(changes):
    model, smooth = decoder(**changes)
    logits_of = TrialLogits(model, smooth)
    for lengths, days in ((LENGTHS, DAYS), (LENGTHS[:2], DAYS[:2])):  # the second in kept memory
        batch = example_batch(lengths, days)
        with torch.no_grad():
            features, n = smooth(batch.features, batch.n_time_steps, training=False)
            expected = model(features, batch.day_indices, n_time_steps=n)
        frames = model.frame_lengths(n)
        seen = []
        for rows, logits in logits_of(batch):
            seen += range(*rows.indices(len(lengths)))
            for row, own in zip(range(len(lengths))[rows], logits, strict=True):
                count = int(frames[row])
                assert len(own) >= max(count, 1)
                assert torch.allclose(own[:count], expected[row, :count], atol=2e-6)
        assert seen == list(range(len(lengths)))


def test_a_trial_is_decoded_alike_in_any_company():
    model, smooth = decoder()
    together = [x for _, x in TrialLogits(model, smooth)(example_batch(LENGTHS, DAYS))]
    batch = example_batch(LENGTHS, DAYS).take([2])
    ((_, alone),) = TrialLogits(model, smooth)(batch)
    assert torch.allclose(alone[0], together[2][0], atol=2e-6)


def test_autocast_is_obeyed():
    model, smooth = decoder()
    logits_of = TrialLogits(model, smooth, lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert all(x.dtype == torch.bfloat16 for _, x in logits_of(example_batch([60, 40], [0, 1])))
