"""Is there a GPU that this image's torch can use, and if not: why, and what to do about it?

The hook asks before the first step of a job that pays for a GPU. CUDA's forward-compatibility
libraries (cuda-compat, in NVIDIA's base images) come into play only where the host's driver is of
an older major branch: on its own branch CUDA runs without them, and on a newer one they fail.
Sources: NVIDIA's CUDA Compatibility guide (minor version compatibility, table 1; forward
compatibility), torch's messages in c10/cuda/CUDAFunctions.cpp.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

EXPECT_GPU_VARIABLE = "BRAIN_TO_TEXT_EXPECT_GPU"
"""1: fail without a usable GPU, 0: never ask; unset: decide by the instance type."""

CUDA_COMPAT_DIR = Path("/usr/local/cuda/compat")
DRIVER_VERSION_FILE = Path("/proc/driver/nvidia/version")
DRIVER_NEEDED = {"12": 525, "13": 580}
"""The oldest driver branch by CUDA's major version."""

QUESTION = """
import json, torch
facts = {"torch": torch.__version__, "cuda": torch.version.cuda}
try:
    torch.cuda.init()
    of = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    facts["devices"] = [(p.name, p.major * 10 + p.minor) for p in of]
    facts["architectures"] = torch.cuda.get_arch_list()
except (RuntimeError, AssertionError) as cause:
    facts["error"] = str(cause).splitlines()[0]
print(json.dumps(facts))
"""


@dataclass(frozen=True)
class Facts:
    """What torch and the host say.

    Attributes:
        torch: its version. cuda: the CUDA version it was built for; None for a CPU build.
        error: the first line of what CUDA's initialisation raised; "" when it did not.
        devices: name and compute capability (86 for 8.6) of each visible GPU.
        architectures: what the build holds code for ("sm_75", "compute_120").
        driver: the host's kernel driver; None where there is none.
        compat: cuda-compat's folder when it is in use.
        visible: CUDA_VISIBLE_DEVICES, when it is set.
    """

    torch: str
    cuda: str | None
    error: str = ""
    devices: Sequence[tuple[str, int]] = ()
    architectures: Sequence[str] = ()
    driver: str | None = None
    compat: Path | None = None
    visible: str | None = None


def expects_gpu(instance_type: str | None, num_gpus: int, variables: Mapping[str, str]) -> bool:
    """Whether no usable GPU is an error: on a GPU instance, or where the driver shows one."""
    asked = variables.get(EXPECT_GPU_VARIABLE, "")
    if asked:
        return asked != "0"
    named = instance_type or ""
    return num_gpus > 0 or named == "local_gpu" or re.match(r"ml\.(g|gr|p)\d", named) is not None


def find_problem(variables: Mapping[str, str], instance_type: str | None) -> str | None:
    """Ask torch, in a process of its own with these variables (CUDA must not be initialised here).

    Returns:
        One sentence saying why no GPU can be used, or None.
    """
    asked = subprocess.run(
        [sys.executable, "-c", QUESTION],
        env=dict(variables),
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode:
        last = (asked.stderr.strip().splitlines() or ["no message"])[-1]
        return f"torch cannot be imported in this image: {last}"
    facts = Facts(
        **json.loads(asked.stdout),
        driver=host_driver(),
        compat=compat_path(),
        visible=variables.get("CUDA_VISIBLE_DEVICES"),
    )
    return problem(facts, f"instance type {instance_type}" if instance_type else "this machine")


def problem(facts: Facts, where: str) -> str | None:
    """One sentence by cause for what is wrong, or None."""
    if facts.cuda is None:
        return (
            f"A GPU was expected ({where}) but this image holds torch {facts.torch} without CUDA: "
            "build it again with ./build_and_push.sh, without --cpu."
        )
    if facts.error or not facts.devices:
        return _not_reached(facts, where)
    for name, capability in facts.devices:
        if not _has_code_for(capability, facts.architectures):
            return (
                f"torch {facts.torch} in this image has no code for {name} (sm_{capability}), only "
                f"for {', '.join(facts.architectures)}: choose a g4dn, g5, g6, p4 or p5 instance."
            )
    return None


def _not_reached(facts: Facts, where: str) -> str:
    needed = DRIVER_NEEDED.get(str(facts.cuda).split(".")[0], 0)
    driver = f"driver {facts.driver}" if facts.driver else "driver"
    reason = f"({facts.error or 'torch sees no device'})"
    if "Error 803:" in facts.error:
        return (
            f"The driver libraries in this container do not fit the host's {driver} {reason}: take "
            "LD_LIBRARY_PATH out of the job's environment; on a machine of your own whose driver "
            "was just updated, restart it."
        )
    if "Error 804:" in facts.error:
        return (
            f"The host's {driver} is older than CUDA {facts.cuda} needs, and cuda-compat helps on "
            f"data-centre GPUs alone {reason}: update the driver to {needed} or newer."
        )
    if "Error 802:" in facts.error:
        return (
            f"The GPUs of this host are not ready {reason}: start the job again; on a machine of "
            "your own start the service nvidia-fabricmanager."
        )
    if "too old" in facts.error or (facts.driver and _version(facts.driver)[0] < needed):
        if facts.compat:
            helped = f"even with the libraries in {facts.compat}"
        else:
            helped = "and this image's base brings no cuda-compat: build it without --base-image"
        return (
            f"The host's {driver} is too old for CUDA {facts.cuda}, which needs {needed} or newer, "
            f"{helped} {reason}: choose another instance type, or update the driver."
        )
    if not facts.driver:
        hidden = "this host has no NVIDIA driver: choose a GPU instance type"
    elif facts.visible is not None:
        hidden = f"CUDA_VISIBLE_DEVICES is '{facts.visible}': take it out of the environment"
    else:
        hidden = "start the container with --gpus all"
    return (
        f"A GPU was expected ({where}) but none is visible to torch {reason}: {hidden}, or set "
        f"{EXPECT_GPU_VARIABLE}=0 to train on the CPU."
    )


def _has_code_for(capability: int, architectures: Sequence[str]) -> bool:
    """Machine code runs on its own generation from its own minor version on, PTX on all later."""
    for kind, digits in re.findall(r"(sm|compute)_(\d+)", " ".join(architectures)):
        version = int(digits)
        same_generation = version // 10 == capability // 10
        if version <= capability and (kind == "compute" or same_generation):
            return True
    return False


# --- the driver


def host_driver(file: Path = DRIVER_VERSION_FILE) -> str | None:
    """The version of the host's kernel driver ("580.95.05"); None where there is none."""
    try:
        text = file.read_text()
    except OSError:
        return None
    match = re.search(r"Kernel Module(?:\s+for\s+\S+)?\s+(\d+(?:\.\d+)+)", text)
    return match[1] if match else None


def compat_path(
    folder: Path = CUDA_COMPAT_DIR, driver_file: Path = DRIVER_VERSION_FILE
) -> Path | None:
    """cuda-compat's folder when the host's driver is of an older major branch, else None."""
    ours = max((_version(path.name) for path in folder.glob("libcuda.so.*.*")), default=())
    driver = host_driver(driver_file)
    return folder if ours and driver and _version(driver)[0] < ours[0] else None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))
