"""How much arithmetic a training step is on its trials, and how much this device could do."""

from __future__ import annotations

import torch

from ..config import TrainingConfig
from ..gpus import known_as, training_flops
from .device import autocast_dtype


def flops_per_step(config: TrainingConfig, n_time_steps: torch.Tensor) -> float:
    """Floating-point operations of one training step on trials of these lengths (in bins)."""
    model = config.model
    bins = n_time_steps.double()
    frames = ((bins - model.patch_size) / model.patch_stride).floor().add(1).clamp_min(0)
    return training_flops(config, float(bins.sum()), float(frames.sum()))


def peak_flops(device: torch.device, config: TrainingConfig) -> float | None:
    """Peak FLOP/s of the device in the precision this run uses; None for an unlisted device."""
    if device.type != "cuda":
        return None
    return peak_of(
        torch.cuda.get_device_name(device), autocast_dtype(config, device), config.allow_tf32
    )


def peak_of(name: str, dtype: torch.dtype | None, tf32: bool = True) -> float | None:
    """Peak FLOP/s by device name, e.g. 'NVIDIA A10G'; None if it is not in the table."""
    gpu = known_as(name)
    if gpu is None:
        return None
    if dtype == torch.bfloat16:
        value = gpu.bfloat16
    elif dtype == torch.float16:
        value = gpu.float16
    else:
        value = gpu.tf32 if tf32 and gpu.tf32 else gpu.float32
    return value * 1e12 if value else None
