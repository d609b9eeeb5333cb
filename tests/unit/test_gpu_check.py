"""Why a GPU cannot be used: each cause has its own advice."""

import dataclasses
from pathlib import Path

import gpu_check
import pytest
import torch
from gpu_check import Facts

UNEXPECTED = (
    "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling "
    "NumCudaDevices() that might have already set an error? Error "
)
TOO_OLD = "The NVIDIA driver on your system is too old (found version 12040). Please update"
NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and"
COMPAT = Path("/usr/local/cuda/compat")
USABLE = Facts(
    torch="2.13.0",
    cuda="13.0",
    devices=[("A10G", 86)],
    architectures=["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"],
    driver="580.95.05",
)


@pytest.mark.parametrize(
    ("instance", "gpus", "asked", "expected"),
    [
        ("ml.g5.2xlarge", 0, "", True),
        ("ml.gr6.4xlarge", 0, "", True),
        ("local_gpu", 0, "", True),
        ("ml.m5.large", 0, "", False),
        (None, 0, "", False),
        (None, 1, "", True),
        ("ml.m5.large", 0, "1", True),
        ("ml.g5.2xlarge", 1, "0", False),
    ],
)
def test_when_a_gpu_is_expected(instance, gpus, asked, expected):
    assert gpu_check.expects_gpu(instance, gpus, {gpu_check.EXPECT_GPU_VARIABLE: asked}) is expected


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"cuda": None}, ["without CUDA", "without --cpu"]),
        (
            {"error": TOO_OLD, "driver": "550.54.15"},
            ["driver 550.54.15 is too old for CUDA 13.0", "needs 580 or newer", "no cuda-compat"],
        ),
        (
            {"error": TOO_OLD, "driver": "470.256.02", "compat": COMPAT},
            ["driver 470.256.02 is too old", f"even with the libraries in {COMPAT}"],
        ),
        (
            {"error": "CUDA unknown error", "driver": "535.183.01"},
            ["535.183.01 is too old", "CUDA unknown error"],
        ),
        (
            {"error": f"{UNEXPECTED}803: system has unsupported display driver / cuda driver"},
            ["do not fit the host's driver 580.95.05", "LD_LIBRARY_PATH", "Error 803"],
        ),
        (
            {
                "error": f"{UNEXPECTED}804: forward compatibility was attempted on ...",
                "driver": "550.54.15",
                "compat": COMPAT,
            },
            ["driver 550.54.15 is older", "data-centre GPUs alone", "580 or newer", "Error 804"],
        ),
        ({"error": f"{UNEXPECTED}802: system not yet initialized"}, ["fabricmanager"]),
        ({"error": NO_DRIVER, "driver": None}, ["no NVIDIA driver", "GPU instance type"]),
        ({"error": "No CUDA GPUs are available"}, ["none is visible", "--gpus all"]),
        ({"devices": []}, ["none is visible", "torch sees no device", "--gpus all"]),
        ({"devices": [], "visible": ""}, ["CUDA_VISIBLE_DEVICES is ''"]),
        ({"devices": [("Tesla V100", 70)]}, ["no code for Tesla V100 (sm_70)", "g4dn"]),
    ],
)
def test_each_problem_has_its_cause_and_advice(facts, says):
    problem = gpu_check.problem(
        dataclasses.replace(USABLE, **({"devices": []} if "error" in facts else {}), **facts),
        "instance type ml.g5.2xlarge",
    )
    assert problem is not None
    for words in says:
        assert words in problem
    assert ("--gpus all" in problem) == ("--gpus all" in says)


@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 103, 120, 121, 130])
def test_a_gpu_whose_generation_the_wheel_knows_is_usable(capability):
    usable = dataclasses.replace(USABLE, devices=[("GPU", capability)])
    assert gpu_check.problem(usable, "here") is None


def test_this_torch_is_asked():
    problem = gpu_check.find_problem({}, "ml.g5.2xlarge")
    if torch.cuda.is_available():
        assert problem is None
    else:
        assert problem and "instance type ml.g5.2xlarge" in problem


@pytest.mark.parametrize(
    ("driver", "used"),
    [
        ("UNIX x86_64 Kernel Module  535.183.01  Sun May 12", True),
        ("UNIX Open Kernel Module for x86_64  570.86.15  Release", True),
        ("UNIX Open Kernel Module for x86_64  580.95.05  Release", False),
        ("UNIX Open Kernel Module for x86_64  590.11  Release", False),
        (None, False),
    ],
)
def test_cuda_compatibility_only_for_older_branches(tmp_path, driver, used):
    compat = tmp_path / "compat"
    compat.mkdir()
    (compat / "libcuda.so.1").touch()
    (compat / "libcuda.so.580.95.05").touch()
    version = tmp_path / "version"
    if driver:
        version.write_text(f"NVRM version: NVIDIA {driver}")
    assert gpu_check.compat_path(compat, version) == (compat if used else None)
    assert gpu_check.compat_path(tmp_path / "none", version) is None
