"""What tests and the local run ask of Docker: the image, by ./build_and_push.sh, and the engine."""

from __future__ import annotations

import ipaddress
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
BUILD_SCRIPT = REPOSITORY / "build_and_push.sh"
IMAGE = "brain-to-text-training"
NO_ENGINE = 3  # the script's exit code


class ImageError(Exception):
    """The image cannot be built; the script's own sentence.

    Attributes:
        no_engine: there is no Docker engine here that could.
    """

    def __init__(self, sentence: str, no_engine: bool) -> None:
        super().__init__(sentence)
        self.no_engine = no_engine


def build_image(
    tag: str,
    *options: str,
    base_image: str | None = None,
    show: Callable[[str], object] = lambda line: None,
) -> str:
    """Build the image under a local tag and return "NAME:TAG"; `show` is given each line.

    Raises:
        ImageError: it cannot be built.
    """
    command = [str(BUILD_SCRIPT), "--no-push", "--repository", IMAGE, "--tag", tag, *options]
    if base_image:
        command += ["--base-image", base_image]
    if "--cpu" in options and shutil.which("docker"):
        provide_cpu_torch()
    build = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    assert build.stderr is not None
    last = ""
    for line in build.stderr:
        show(line)
        last = line.strip() or last
    if code := build.wait():
        raise ImageError(last.removeprefix("build_and_push: "), code == NO_ENGINE)
    return f"{IMAGE}:{tag}"


def provide_cpu_torch() -> None:
    """Lay torch's CPU wheel into docker/wheels/ when this machine's pip has one to give.

    Where pip finds none (PyPI has only CUDA builds for Linux), the Dockerfile's index serves.
    """
    docker_folder = REPOSITORY / "docker"
    lock = (docker_folder / "requirements_sagemaker_torch.in").read_text()
    (version,) = re.findall(r"^torch==(\S+)", lock, re.MULTILINE)
    wheels = docker_folder / "wheels"
    if not list(wheels.glob(f"torch-{version}*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run(
            [*pip, "--dest", str(wheels), f"torch=={version}+cpu"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )


def docker(*arguments: str, check: bool = True) -> str:
    """Run a docker command and return its output, stripped.

    Raises:
        subprocess.CalledProcessError: it failed and `check` is true.
    """
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=check)
    return done.stdout.strip()


def container_host() -> str:
    """An address of this machine that containers reach: the default bridge's own.

    Raises:
        RuntimeError: the engine has no default bridge network with an address.
    """
    described = docker("network", "inspect", "bridge", check=False)
    for network in json.loads(described or "[]"):
        for config in network["IPAM"]["Config"] or []:
            # an engine that has just made the bridge names only its subnet
            address = config.get("Gateway") or next(
                ipaddress.ip_network(config["Subnet"]).hosts(), None
            )
            if address:
                return str(address)
    raise RuntimeError(
        "the engine's bridge network has no address that containers could reach: use --no-docker."
    )


def image_exists(name: str) -> bool:
    """Whether the engine holds this image."""
    return bool(docker("images", "--quiet", name, check=False))
