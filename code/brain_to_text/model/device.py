"""What the maths needs to know about the device: precision, and copies that do not wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..config import TrainingConfig
from ..gpus import gpu_called
from . import gpu_ctc, packed_gru


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

    On a GPU a type in which the GRU cannot be computed, or fails a small check, is passed over
    whatever the configuration says: bfloat16 for float16, that for float32. On a CPU only an
    explicit `bfloat16` counts: few CPUs gain from it.
    """
    return _precision(config, device)[0]


def _precision(
    config: TrainingConfig, device: torch.device
) -> tuple[torch.dtype | None, list[str]]:
    """`autocast_dtype`, and why a type was passed over."""
    if not config.use_amp:
        return None, []
    if device.type != "cuda":
        return (torch.bfloat16 if config.amp_dtype == "bfloat16" else None), []
    passed_over: list[str] = []
    for name in ("bfloat16", "float16"):
        if config.amp_dtype == "float16" and name == "bfloat16":
            continue
        dtype = getattr(torch, name)
        reason = packed_gru.reason_against(dtype, device)
        if reason is None:
            return dtype, passed_over
        passed_over.append(f"{name} is not used ({reason})")
    return None, passed_over


def peak_flops(device: torch.device, config: TrainingConfig) -> float | None:
    """Peak FLOP/s of the device in the precision this run uses; None for an unlisted device."""
    gpu = gpu_called(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is None:
        return None
    return gpu.peak(autocast_dtype(config, device) is not None, config.allow_tf32)


def allow_tf32(allowed: bool) -> None:
    """Let (or forbid) float32 matrix products on GPUs to round their inputs to 10-bit mantissas."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def notes(config: TrainingConfig, device: torch.device) -> list[str]:
    """What whoever reads the log should know about this device; waits for it once.

    Where no GPU is used, why; which precision was taken instead of the one asked for; which CTC.
    """
    if device.type != "cuda":
        return [f"No GPU is used: {no_gpu()}"]
    dtype, passed_over = _precision(config, device)
    taken = str(dtype or torch.float32).removeprefix("torch.")
    sentences = [f"{reason}: this run computes in {taken}" for reason in passed_over]
    if config.objective.ctc_kernel != "torch":
        reason = gpu_ctc.reason_against(device)
        sentences.append(
            "CTC runs in our Triton kernel, which agrees with torch's on this GPU"
            if reason is None
            else f"CTC runs in torch's kernel, which waits for the GPU: {reason}"
        )
    return sentences


def no_gpu() -> str:
    """Why torch sees none, in its words where it has any."""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is a build without CUDA."
    if torch.cuda.is_available():
        return "the run was told to use the CPU."
    try:
        torch.cuda.init()
    except RuntimeError as error:  # no driver, a driver too old, no device: the text says which
        return f"{str(error).splitlines()[0].rstrip('.')}."
    return "CUDA sees no device."
