"""How much arithmetic a training step is, and how much a device could do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config import TrainingConfig
from .device import autocast_dtype


@dataclass(frozen=True)
class Peak:
    """Dense peak of one device in TFLOP/s, without sparsity; None where it has no such unit."""

    bfloat16: float | None
    float16: float
    tf32: float | None
    float32: float


# Vendor data sheets: NVIDIA T4 (2019), A10 and A10G, A100, L4, L40S, H100 SXM/PCIe, H200, B200;
# figures quoted with sparsity are halved. A10G: AWS's figure for the G5 family (it has about half
# of the A10's tensor rate).
PEAKS = {
    "T4": Peak(None, 65.0, None, 8.1),
    "V100": Peak(None, 125.0, None, 15.7),
    "A10G": Peak(70.0, 70.0, 35.0, 31.5),
    "A10": Peak(125.0, 125.0, 62.5, 31.2),
    "A100": Peak(312.0, 312.0, 156.0, 19.5),
    "L40S": Peak(362.0, 362.0, 183.0, 91.6),
    "L4": Peak(121.0, 121.0, 60.0, 30.3),
    "H100 PCIe": Peak(756.0, 756.0, 378.0, 51.0),
    "H100": Peak(989.0, 989.0, 494.0, 67.0),
    "H200": Peak(989.0, 989.0, 494.0, 67.0),
    "B200": Peak(2250.0, 2250.0, 1100.0, 75.0),
    "GeForce RTX 4090": Peak(165.2, 165.2, 82.6, 82.6),
}


def flops_per_step(config: TrainingConfig, n_time_steps: torch.Tensor) -> float:
    """Floating-point operations of one training step on trials of these lengths (in bins)."""
    model = config.model
    bins = n_time_steps.double()
    frames = ((bins - model.patch_size) / model.patch_stride).floor().add(1).clamp_min(0)
    return training_flops(config, float(bins.sum()), float(frames.sum()))


def training_flops(config: TrainingConfig, n_bins: float, n_frames: float) -> float:
    """Floating-point operations of training on trials with so many bins and output frames in all.

    Two per multiply-add of every matrix product over the trials' own bins and frames (padding is
    not work), and twice the forward pass for the backward pass, except that nothing flows back
    into the stored features. Elementwise work and CTC (under 1 %) are left out.
    """
    model = config.model
    C, H = model.n_input_features, model.n_units
    directions = 2 if model.bidirectional else 1
    gates = 3 * H * directions
    inputs = gates * (C * model.patch_size + (model.n_layers - 1) * H * directions)
    recurrent = gates * H * model.n_layers
    classifier = H * directions * config.dataset.n_classes
    per_frame = 2.0 * (inputs + recurrent + classifier)
    day_layer = 2.0 * C * C
    return 3 * n_frames * per_frame + 2 * n_bins * day_layer


def peak_flops(device: torch.device, config: TrainingConfig) -> float | None:
    """Peak FLOP/s of the device in the precision this run uses; None for an unlisted device."""
    if device.type != "cuda":
        return None
    return peak_of(
        torch.cuda.get_device_name(device), autocast_dtype(config, device), config.allow_tf32
    )


def peak_of(name: str, dtype: torch.dtype | None, tf32: bool = True) -> float | None:
    """Peak FLOP/s by device name, e.g. 'NVIDIA A10G'; None if it is not in the table."""
    known = known_as(name)
    if known is None:
        return None
    peak = PEAKS[known]
    if dtype == torch.bfloat16:
        value = peak.bfloat16
    elif dtype == torch.float16:
        value = peak.float16
    else:
        value = peak.tf32 if tf32 and peak.tf32 else peak.float32
    return value * 1e12 if value else None


def known_as(name: str) -> str | None:
    """The name in `PEAKS` of a device that calls itself `name`, e.g. 'Tesla T4'."""
    words = name.replace("-", " ").split()
    for known in sorted(PEAKS, key=len, reverse=True):
        if all(word in words for word in known.split()):
            return known
    return None
