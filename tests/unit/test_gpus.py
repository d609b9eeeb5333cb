"""The table of GPUs and the arithmetic of a step, which the launcher and the trainer share."""

from __future__ import annotations

import pytest
from brain_to_text.config import TrainingConfig
from brain_to_text.config_reader import load_config
from brain_to_text.gpus import GPUS, gpu_called, n_frames, step_time, training_flops
from brain_to_text.launch.request import CODE_FOLDER, DEFAULT_CONFIG


def reference(**changes) -> TrainingConfig:
    return load_config(CODE_FOLDER / DEFAULT_CONFIG, changes)


def test_the_reference_step_is_three_teraflop() -> None:
    assert training_flops(reference(), 48 * 850, 48 * 210) == pytest.approx(3.2e12, rel=0.05)


@pytest.mark.parametrize(("bins", "frames"), [(13, 0), (14, 1), (850, 210), (1674, 416)])
def test_frames_are_the_models(bins, frames) -> None:
    assert n_frames(reference(), bins) == frames


@pytest.mark.parametrize(
    ("name", "mixed", "teraflops"),
    [
        ("Tesla T4", True, 65.0),
        ("Tesla T4", False, 8.1),
        ("NVIDIA H100 80GB HBM3", True, 989.0),
        ("NVIDIA H100 PCIe", True, 756.0),
        ("NVIDIA L40S", False, 181.0),
    ],
)
def test_peaks_are_found_by_device_name(name, mixed, teraflops) -> None:
    assert gpu_called(name).peak(mixed, allow_tf32=True) == teraflops * 1e12


def test_names_that_are_part_of_others_and_unknown_ones() -> None:
    assert gpu_called("NVIDIA A100-SXM4-80GB") == GPUS["A100 80GB"]
    assert gpu_called("NVIDIA GeForce GTX 1080") is None


def test_the_public_baselines_own_log_is_near_the_estimate() -> None:
    """0.107 s per step on an RTX 4090: batch 64, 5 x 768 units, 41 classes, padding computed."""
    config = load_config(
        None, {"dataset.batch_size": 64, "model.n_units": 768, "dataset.n_classes": 41}
    )
    estimate = step_time(config, GPUS["GeForce RTX 4090"], mean_bins=1700, longest_bins=1700)
    assert estimate.total == pytest.approx(0.107, rel=0.25)


def test_the_recurrence_waits_for_the_longest_trial_whatever_the_batch() -> None:
    config, gpu = reference(), GPUS["H100"]
    whole, share = step_time(config, gpu), step_time(config, gpu, trials=6)
    assert share.recurrence == whole.recurrence, "cells wait for their kernels"
    assert share.products == pytest.approx(whole.products / 8)
    short = step_time(config, gpu, longest_bins=850)
    assert short.recurrence == pytest.approx(whole.recurrence * 210 / 422, rel=0.01)
    both_ways = step_time(reference(**{"model.bidirectional": True}), gpu)
    assert both_ways.recurrence == 2 * whole.recurrence


def test_slower_memory_and_narrower_units_cost_time() -> None:
    config = reference()
    assert step_time(config, GPUS["T4"]).recurrence > step_time(config, GPUS["A10G"]).recurrence
    exact = step_time(reference(use_amp=False, allow_tf32=False), GPUS["A10G"])
    assert exact.products > 2 * step_time(config, GPUS["A10G"]).products
