"""What is decided from the device and the configuration: precision, and what the log says of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from brain_to_text.model import gpu_ctc, packed_gru
from brain_to_text.model.device import autocast_dtype, notes, peak_flops
from support.training_examples import CPU, small_config

CUDA = torch.device("cuda")


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch):
    """capability(7, 5): CUDA devices are there, and of that compute capability."""

    def fake(major: int, minor: int) -> None:
        properties = SimpleNamespace(major=major, minor=minor, name="a GPU")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(packed_gru, "reason_against", lambda *_: None)

    return fake


@pytest.mark.parametrize(
    ("settings", "chip", "on_gpu", "on_cpu"),
    [
        ({}, (7, 5), torch.float16, None),  # T4: no bfloat16 units, though torch can emulate them
        ({}, (8, 0), torch.bfloat16, None),
        ({"amp_dtype": "bfloat16"}, (7, 5), torch.float16, torch.bfloat16),
        ({"amp_dtype": "bfloat16"}, (9, 0), torch.bfloat16, torch.bfloat16),
        ({"amp_dtype": "float16"}, (9, 0), torch.float16, None),
        ({"use_amp": False, "amp_dtype": "bfloat16"}, (9, 0), None, None),
    ],
)
def test_what_was_asked_for_is_taken_where_the_chip_has_it(
    settings, chip, on_gpu, on_cpu, capability
) -> None:
    """Emulated, bfloat16 would have torch compute one frame at a time: 37,860 launches a step."""
    capability(*chip)
    assert autocast_dtype(small_config(**settings), CUDA) == on_gpu
    assert autocast_dtype(small_config(**settings), CPU) == on_cpu


@pytest.mark.parametrize(
    ("refused", "asked", "taken"),
    [
        (["bfloat16"], "auto", torch.float16),
        (["bfloat16", "float16"], "auto", None),
        (["float16"], "float16", None),
    ],
)
def test_a_type_in_which_cudnn_fails_is_passed_over_with_its_reason(
    refused: list[str], asked: str, taken: torch.dtype | None, capability, monkeypatch
) -> None:
    capability(9, 0)
    monkeypatch.setattr(gpu_ctc, "reason_against", lambda _: None)
    monkeypatch.setattr(
        packed_gru,
        "reason_against",
        lambda dtype, _: "CUDNN_STATUS_BAD_PARAM" if str(dtype)[6:] in refused else None,
    )
    config = small_config(amp_dtype=asked)
    assert autocast_dtype(config, CUDA) == taken
    *said, _ctc = notes(config, CUDA)
    ending = f"(CUDNN_STATUS_BAD_PARAM): this run computes in {str(taken or torch.float32)[6:]}"
    assert len(said) == len(refused) and all(sentence.endswith(ending) for sentence in said)


def test_why_no_gpu_is_used_is_said_in_torchs_words(monkeypatch) -> None:
    def fail() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old.\nand more")

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)
    (said,) = notes(small_config(), CPU)
    assert said == "No GPU is used: The NVIDIA driver on your system is too old."


def test_a_build_without_cuda_and_a_run_on_the_cpu_are_said(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert "without CUDA" in notes(small_config(), CPU)[0]
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "told to use the CPU" in notes(small_config(), CPU)[0]


def test_what_was_changed_or_chosen_for_a_gpu_is_said_with_its_reason(
    monkeypatch, capability
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(gpu_ctc, "reason_against", lambda _: "Triton is not installed")
    capability(7, 5)
    changed, ctc = notes(small_config(amp_dtype="bfloat16"), CUDA)
    assert changed == "Tesla T4 has no bfloat16: this run computes in float16"
    assert ctc.endswith("which waits for the GPU: Triton is not installed")
    monkeypatch.setattr(gpu_ctc, "reason_against", lambda _: None)
    capability(8, 6)
    (ctc,) = notes(small_config(amp_dtype="bfloat16"), CUDA)
    assert "our Triton kernel" in ctc
    assert notes(small_config(objective__ctc_kernel="torch"), CUDA) == []


def test_mfu_is_of_the_peak_in_the_runs_own_precision(monkeypatch, capability) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A10G")
    capability(8, 6)
    assert peak_flops(CUDA, small_config()) == 70e12
    assert peak_flops(CUDA, small_config(use_amp=False)) == 35e12
    assert peak_flops(CUDA, small_config(use_amp=False, allow_tf32=False)) == 31.5e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some new card")
    assert peak_flops(CUDA, small_config()) is None
    assert peak_flops(CPU, small_config()) is None
