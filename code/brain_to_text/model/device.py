"""What the maths needs to know about the device: precision, and copies that do not wait for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..config import TrainingConfig


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`; to a GPU through pinned memory, so that the host does not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch computes on one CPU thread.

    For factorisations: their threads wait for each other thousands of times, so that where others
    share the cores (reading data, say) a QR of 3072 × 1024 takes 2 s instead of 0.25 s.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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


def gru_dtype(device: torch.device) -> torch.dtype | None:
    """The type that torch's GRU must be given to compute in autocast's; None: autocast sees to it.

    torch's autocast calls cuDNN's RNNs in float16 whatever type it was set to
    (aten/src/ATen/cudnn/AutocastRNN.cpp): bfloat16 would get float16's range, without a loss scale.
    Given bfloat16, torch calls cuDNN in it from cuDNN 9.13 and compute capability 8.0 on, and uses
    kernels of its own, one frame at a time, elsewhere.
    """
    if device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
        return None
    dtype = torch.get_autocast_dtype("cuda")
    return dtype if dtype == torch.bfloat16 else None


def compiler(config: TrainingConfig, device: torch.device) -> Callable[..., Any] | None:
    """What compiles the elementwise parts of a step; None to leave them eager.

    `compile: auto` compiles on GPUs, where each eager operation is a pass over GPU memory, and
    falls back to eager with torch's warning where a part cannot be compiled; on CPUs it does not,
    because compiling takes longer than it saves in runs that fit a CPU. What it saves on GPUs is
    not measured yet. The matrix products and the GRU (cuDNN) are left as they are. Sizes are
    dynamic from the first call on, so that no length of trials compiles again.
    """
    if config.compile == "false" or (config.compile == "auto" and device.type != "cuda"):
        return None
    if config.compile == "auto":
        from torch import _dynamo  # slow to import, and not needed on CPUs

        _dynamo.config.suppress_errors = True
    return lambda function: torch.compile(function, dynamic=True)


def allow_tf32(allowed: bool) -> None:
    """Let (or forbid) float32 matrix products on GPUs to round their inputs to 10-bit mantissas."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
