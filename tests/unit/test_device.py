"""What is decided from the device and the configuration: precision, and what the log says of it."""

from __future__ import annotations

import pytest
import torch
from brain_to_text.model import gpu_ctc, packed_gru
from brain_to_text.model.device import autocast_dtype, notes, peak_flops
from support.training_examples import CPU, small_config

CUDA = torch.device("cuda")


@pytest.fixture
def refuses(monkeypatch: pytest.MonkeyPatch):
    """refuses("bfloat16"): a GPU on which the GRU cannot be computed in these types."""

    def fake(*refused: str) -> None:
        bad = [getattr(torch, name) for name in refused]
        reason = lambda dtype, _: "it fails" if dtype in bad else None  # noqa: E731
        monkeypatch.setattr(packed_gru, "reason_against", reason)
        monkeypatch.setattr(gpu_ctc, "reason_against", lambda _: "Triton is not installed")

    return fake


@pytest.mark.parametrize(
    ("settings", "refused", "on_gpu", "on_cpu"),
    [
        ({}, [], torch.bfloat16, None),
        ({}, ["bfloat16"], torch.float16, None),
        ({}, ["bfloat16", "float16"], None, None),
        ({"amp_dtype": "bfloat16"}, [], torch.bfloat16, torch.bfloat16),
        ({"amp_dtype": "bfloat16"}, ["bfloat16"], torch.float16, torch.bfloat16),
        ({"amp_dtype": "float16"}, [], torch.float16, None),
        ({"amp_dtype": "float16"}, ["float16"], None, None),
        ({"use_amp": False, "amp_dtype": "bfloat16"}, [], None, None),
    ],
)
def test_the_type_is_the_one_asked_for_or_the_next_that_works(
    settings, refused, on_gpu, on_cpu, refuses
) -> None:
    refuses(*refused)
    config = small_config(**settings)
    assert autocast_dtype(config, CUDA) == on_gpu
    assert autocast_dtype(config, CPU) == on_cpu
    *passed_over, ctc = notes(config, CUDA)
    taken = str(on_gpu or torch.float32).removeprefix("torch.")
    assert passed_over == [
        f"{name} is not used (it fails): this run computes in {taken}" for name in refused
    ]
    assert ctc.endswith("which waits for the GPU: Triton is not installed")


def test_which_ctc_runs_on_a_gpu_is_said(refuses, monkeypatch: pytest.MonkeyPatch) -> None:
    refuses()
    assert notes(small_config(objective__ctc_kernel="torch"), CUDA) == []
    monkeypatch.setattr(gpu_ctc, "reason_against", lambda _: None)
    assert "our Triton kernel" in notes(small_config(), CUDA)[0]


def test_bfloat16_is_refused_where_the_chip_emulates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then torch would compute the GRU one frame at a time: 37,860 launches a step."""
    packed_gru.reason_against.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    assert packed_gru.reason_against(torch.bfloat16, CUDA) == "Tesla T4 has none"
    packed_gru.reason_against.cache_clear()


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


def test_mfu_is_of_the_peak_in_the_runs_precision(monkeypatch, refuses) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A10G")
    refuses()
    assert peak_flops(CUDA, small_config()) == 70e12
    assert peak_flops(CUDA, small_config(use_amp=False)) == 35e12
    assert peak_flops(CUDA, small_config(use_amp=False, allow_tf32=False)) == 31.5e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some new card")
    assert peak_flops(CUDA, small_config()) is None
    assert peak_flops(CPU, small_config()) is None
