"""Neural features as the model sees them: noise and cuts in training, smoothing always.

Order and constants are the public baseline's; three things differ on purpose. The cut is drawn per
trial, not per batch; padding stays exactly zero, so that no noise leaks from it through the
smoothing; and everything random is a function of (seed, step, rank).
"""

from __future__ import annotations

import numpy as np
import torch

from ..config import DataTransformsConfig
from .device import send

SMALLEST_TAP = 0.01  # the public baseline drops taps of the Gaussian below this weight
TRUNCATION = 4.0  # standard deviations beyond which scipy's Gaussian filter stops


def step_generator(
    device: torch.device | str, seed: int, step: int, rank: int = 0
) -> torch.Generator:
    """A generator on `device` whose numbers depend on (seed, step, rank) alone."""
    mixed = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    generator = torch.Generator(device=device)
    return generator.manual_seed(int(mixed) >> 1)  # seeds are signed 64-bit


def gaussian_kernel(std: float, size: int) -> torch.Tensor:
    """Taps of the smoothing filter, float32, summing to 1: 9 of them for std 2 and size 100.

    A Gaussian on `size` bins, cut where a tap is at most 0.01, renormalised (the filter of the
    public baseline's `gauss_smooth`).
    """
    reach = min(int(TRUNCATION * std + 0.5), (size - 1) // 2)
    offsets = np.arange(-reach, reach + 1)
    taps = np.exp(-0.5 * (offsets / std) ** 2)
    taps /= taps.sum()
    large = taps > SMALLEST_TAP
    taps = taps[large] if large.any() else taps  # a Gaussian wider than 40 bins has no large one
    return torch.tensor(taps / taps.sum(), dtype=torch.float32)


class Augmentation:
    """Turns stored features into model input, on the device the features are on.

    Args:
        config: `dataset.data_transforms`.
    """

    def __init__(self, config: DataTransformsConfig) -> None:
        self.config = config
        self.taps: list[float] = []
        if config.smooth_data:
            taps = gaussian_kernel(config.smooth_kernel_std, config.smooth_kernel_size)
            self.taps = taps.tolist()

    def __call__(
        self,
        features: torch.Tensor,
        n_time_steps: torch.Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise, offset, cut and masks (training only), smoothing (always).

        Args:
            features: [B, T, C] float32 or float16, zero beyond n_time_steps; not modified.
            n_time_steps: [B] int64 on the CPU, in 20 ms bins.
            generator: for training, on the features' device, from `step_generator`; without one
                the smoothing alone is applied.

        Returns:
            (features [B, T, C] float32, zero beyond the new lengths; the new lengths [B], CPU).
        """
        x, T = features.float(), features.shape[1]
        if generator is None:
            return self._smoothed(x, send(_valid_bins(n_time_steps, T), x.device)), n_time_steps
        x, n_time_steps, keep = self._perturbed(x, n_time_steps, generator)
        return self._smoothed(x, keep), n_time_steps

    def _perturbed(
        self, x: torch.Tensor, n_time_steps: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(Features before smoothing, their lengths, [B, T] bool: where they may not be zero)."""
        config, device, (B, T, C) = self.config, x.device, x.shape
        host = np.random.default_rng(generator.initial_seed())

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device)

        if config.static_gain_std > 0:
            x = torch.baddbmm(x, x, normal(B, C, C), alpha=config.static_gain_std)
        if config.white_noise_std > 0:
            x = normal(B, T, C).mul_(config.white_noise_std).add_(x)
        if config.constant_offset_std > 0:
            x = torch.add(x, normal(B, 1, C), alpha=config.constant_offset_std)
        cut = torch.from_numpy(host.integers(0, max(config.random_cut, 1), size=B))
        cut = torch.minimum(cut, (n_time_steps - 1).clamp_min(0))
        n_time_steps = n_time_steps - cut
        if config.random_cut > 1:
            bins = (torch.arange(T) + cut.unsqueeze(1)).clamp_max(T - 1)
            rows = (bins + T * torch.arange(B).unsqueeze(1)).flatten()
            x = x.flatten(0, 1).index_select(0, send(rows, device)).view(B, T, C)
        keep = _valid_bins(n_time_steps, T)
        on_device = send(keep, device)
        x = x * on_device.unsqueeze(2)
        if config.time_mask_share > 0:
            share, longest = config.time_mask_share, config.time_mask_max_bins
            masked = time_mask(n_time_steps, T, share, longest, host)
            on_device = send(keep & ~masked, device)
        if config.channel_mask_share > 0:
            masked = channel_mask(B, C, config.channel_mask_share, host)
            x = x * send(~masked, device).unsqueeze(1)
        return x, n_time_steps, on_device

    def _smoothed(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cuda":
            return _smooth(x, keep, self.taps)
        # one trial at a time stays in the cache: 5 x faster than the whole batch at once
        out = torch.empty_like(x)
        for one, keep_one, target in zip(x.split(1), keep.split(1), out.split(1), strict=True):
            target.copy_(_smooth(one, keep_one, self.taps))
        return out


def _valid_bins(n_time_steps: torch.Tensor, n_bins: int) -> torch.Tensor:
    """[B, n_bins] bool: True where a bin belongs to its trial."""
    return torch.arange(n_bins) < n_time_steps.unsqueeze(1)


def time_mask(
    n_time_steps: torch.Tensor,
    n_bins: int,
    share: float,
    max_bins: int,
    random: np.random.Generator,
) -> torch.Tensor:
    """[B, n_bins] bool, True in contiguous spans that cover round(share * length) bins per trial.

    Span lengths are uniform on 1 … max_bins, the last one shortened to fit; the bins between them
    are split uniformly, so that spans never overlap (they may touch).
    """
    mask = torch.zeros(len(n_time_steps), n_bins, dtype=torch.bool)
    for trial, length in enumerate(n_time_steps.tolist()):
        target = round(share * length)
        spans: list[int] = []
        while (covered := sum(spans)) < target:
            spans.append(min(int(random.integers(1, max_bins + 1)), target - covered))
        if not spans:
            continue
        gaps = np.sort(random.integers(0, length - target + 1, size=len(spans)))
        start = gaps + np.concatenate([[0], np.cumsum(spans)[:-1]])
        for begin, span in zip(start.tolist(), spans, strict=True):
            mask[trial, begin : begin + span] = True
    return mask


def channel_mask(
    n_trials: int, n_channels: int, share: float, random: np.random.Generator
) -> torch.Tensor:
    """[n_trials, n_channels] bool, True in round(share * n_channels) channels of each trial."""
    order = random.permuted(np.tile(np.arange(n_channels), (n_trials, 1)), axis=1)
    return torch.from_numpy(order < round(share * n_channels))


def _smooth(x: torch.Tensor, keep: torch.Tensor, taps: list[float]) -> torch.Tensor:
    """'same' convolution over time with `taps`, zero outside `keep`; a sum of shifted copies."""
    if taps:
        before = (len(taps) - 1) // 2
        T = x.shape[1]
        padded = torch.nn.functional.pad(x, (0, 0, before, len(taps) - 1 - before))
        x = padded[:, :T] * taps[0]
        for k in range(1, len(taps)):
            x = x.add_(padded[:, k : k + T], alpha=taps[k])
    return x * keep.unsqueeze(2)
