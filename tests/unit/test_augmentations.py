"""What augmentation does to features, and that padding stays exactly zero through all of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from brain_to_text.config import DataTransformsConfig
from brain_to_text.model.augmentations import (
    Augmentation,
    gaussian_kernel,
    step_generator,
    time_mask,
)
from scipy.ndimage import gaussian_filter1d
from support.training_examples import example_batch

LENGTHS = [40, 25, 33]
ZERO = {"white_noise_std": 0.0, "constant_offset_std": 0.0, "random_cut": 0, "smooth_data": False}


def augment(step: int = 0, seed: int = 1, rank: int = 0, **changes):
    batch = example_batch(LENGTHS, [0, 0, 1])
    augmentation = Augmentation(DataTransformsConfig(**(ZERO | changes)))
    generator = step_generator("cpu", seed, step, rank)
    before = batch.features.clone()
    out = augmentation(batch.features, batch.n_time_steps, generator)
    assert torch.equal(batch.features, before), "the cached batch must not change"
    return batch, *out


def test_the_kernel_is_the_public_baselines() -> None:
    impulse = np.zeros(100)
    impulse[50] = 1
    taps = gaussian_filter1d(impulse, 2)
    taps = taps[taps > 0.01]
    kernel = gaussian_kernel(2, 100)
    assert len(kernel) == 9
    np.testing.assert_allclose(kernel.numpy(), taps / taps.sum(), rtol=1e-6)


@pytest.mark.parametrize(("std", "size"), [(0.2, 100), (1.0, 3), (2.0, 8), (60.0, 500)])
def test_any_kernel_sums_to_one_and_is_symmetric(std: float, size: int) -> None:
    kernel = gaussian_kernel(std, size)
    assert float(kernel.sum()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(kernel, kernel.flip(0)) and len(kernel) <= size


def test_smoothing_is_the_same_in_training_and_evaluation() -> None:
    batch, trained, n = augment(smooth_data=True)
    evaluated, m = Augmentation(DataTransformsConfig())(batch.features, batch.n_time_steps)
    assert torch.equal(n, m) and torch.equal(trained, evaluated)
    kernel = gaussian_kernel(2.0, 100).numpy()
    expected = np.apply_along_axis(
        lambda channel: np.convolve(channel, kernel, "same"), 0, batch.features[1, :25].numpy()
    )
    np.testing.assert_allclose(evaluated[1, :25].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_padding_stays_exactly_zero(training: bool) -> None:
    batch = example_batch(LENGTHS, [0, 0, 1])
    generator = step_generator("cpu", 0, 0) if training else None
    features, n = Augmentation(DataTransformsConfig(time_mask_share=0.1))(
        batch.features, batch.n_time_steps, generator
    )
    for trial, length in enumerate(n.tolist()):
        assert torch.count_nonzero(features[trial, length:]) == 0
        assert torch.count_nonzero(features[trial, length - 1]) > 0 or training


def test_noise_in_padding_does_not_reach_the_trial() -> None:
    """The same noise with and without bins after the end: what is inside is equal."""
    augmentation = Augmentation(DataTransformsConfig(random_cut=0, constant_offset_std=0))
    features, n = torch.zeros(1, 30, 4), torch.tensor([20])
    whole, _ = augmentation(features, n, step_generator("cpu", 0, 0))
    short, _ = augmentation(features[:, :20], n, step_generator("cpu", 0, 0))
    assert torch.equal(whole[:, :20], short)


def test_noise_and_offset_have_their_standard_deviations() -> None:
    features = torch.zeros(40, 200, 16)
    n = torch.full((40,), 200)
    config = DataTransformsConfig(**(ZERO | {"white_noise_std": 1.5}))
    noise, _ = Augmentation(config)(features, n, step_generator("cpu", 0, 0))
    assert float(noise.std()) == pytest.approx(1.5, rel=0.02)
    config = DataTransformsConfig(**(ZERO | {"constant_offset_std": 0.2}))
    offset, _ = Augmentation(config)(features, n, step_generator("cpu", 0, 0))
    assert torch.equal(offset[:, 0], offset[:, -1])
    assert float(offset[:, 0].std()) == pytest.approx(0.2, rel=0.1)


def test_static_gain_mixes_channels() -> None:
    batch, mixed, _ = augment(static_gain_std=0.1)
    assert not torch.allclose(mixed, batch.features)
    assert float((mixed - batch.features).std()) == pytest.approx(0.1 * 6**0.5, rel=0.4)


def test_the_cut_is_drawn_per_trial_and_moves_the_trial_to_the_front() -> None:
    seen = set()
    for step in range(20):
        batch, features, n = augment(step, random_cut=3)
        cuts = (batch.n_time_steps - n).tolist()
        seen.add(tuple(cuts))
        for trial, cut in enumerate(cuts):
            length = LENGTHS[trial] - cut
            assert torch.equal(features[trial, :length], batch.features[trial, cut : cut + length])
            assert torch.count_nonzero(features[trial, length:]) == 0
    assert {cut for cuts in seen for cut in cuts} == {0, 1, 2}
    assert any(len(set(cuts)) > 1 for cuts in seen)


def test_random_numbers_depend_on_seed_step_and_rank_alone() -> None:
    everything = {"white_noise_std": 1.0, "constant_offset_std": 0.2, "random_cut": 3}
    first = augment(5, **everything)[1]
    assert torch.equal(first, augment(5, **everything)[1])
    for other in ({"step": 6}, {"step": 5, "seed": 2}, {"step": 5, "rank": 1}):
        assert not torch.equal(first, augment(**other, **everything)[1])


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_time_masks_cover_their_share_in_contiguous_spans(share: float) -> None:
    n = torch.tensor([100, 400, 7])
    mask = time_mask(n, 400, share, 20, np.random.default_rng(0))
    assert mask.sum(1).tolist() == [round(share * length) for length in n.tolist()]
    for trial, length in enumerate(n.tolist()):
        assert not mask[trial, length:].any()
    spans = int((mask[1, 1:] & ~mask[1, :-1]).sum()) + int(mask[1, 0])
    assert spans <= 1 + share * 400 / 5, "spans, not single bins"


def test_time_masking_zeroes_smoothed_features_and_is_off_by_default() -> None:
    _, plain, _ = augment(smooth_data=True)
    _, masked, _ = augment(smooth_data=True, time_mask_share=0.25, time_mask_max_bins=6)
    gone = (masked == 0).all(2)
    assert gone[0].sum() == round(0.25 * LENGTHS[0])
    kept = ~gone
    assert torch.equal(masked[kept], plain[kept])
    assert DataTransformsConfig().time_mask_share == 0


def test_channel_masking_zeroes_other_channels_in_each_trial_and_is_off_by_default() -> None:
    _, plain, _ = augment(smooth_data=True)
    _, masked, _ = augment(smooth_data=True, channel_mask_share=0.25)
    lost = (masked == 0).all(dim=1)  # [B, C]
    assert (lost.sum(1) == round(0.25 * masked.shape[2])).all()
    assert len({tuple(row.tolist()) for row in lost}) == len(lost)
    kept = ~lost.unsqueeze(1).expand_as(masked)
    torch.testing.assert_close(masked[kept], plain[kept])  # other channels are as without
    assert DataTransformsConfig().channel_mask_share == 0
