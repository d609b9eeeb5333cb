"""What the maths needs to know about the device: precision, and copies that do not wait for it."""

from __future__ import annotations

import torch

from .config import TrainingConfig


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`; to a GPU through pinned memory, so that the host does not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def autocast_dtype(config: TrainingConfig, device: torch.device) -> torch.dtype | None:
    """The mixed-precision type for this run, or None for float32.

    On a GPU, `amp_dtype: auto` means bfloat16 where the chip has it (compute capability 8.0 and
    later) and float16 where it does not (T4). On a CPU only an explicit `bfloat16` counts: few
    CPUs gain from it.
    """
    if not config.use_amp:
        return None
    if device.type != "cuda":
        return torch.bfloat16 if config.amp_dtype == "bfloat16" else None
    if config.amp_dtype == "auto":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    return torch.bfloat16 if config.amp_dtype == "bfloat16" else torch.float16


def allow_tf32(allowed: bool) -> None:
    """Let (or forbid) float32 matrix products on GPUs to round their inputs to 10-bit mantissas."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
