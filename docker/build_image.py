#!/usr/bin/env python3
"""Build the training image: choose a docker client that can, give it what the Dockerfile needs.

    python3 docker/build_image.py --tag brain-to-text-training:local [--cpu] [--mlflow]
                                  [--base-image IMAGE]

Needs a Docker engine and nothing else (standard library only). Environment: BASE_IMAGE as
--base-image; TORCH_CPU_INDEX, another index with torch's CPU wheels, for --cpu.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import re
import shutil
import ssl
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_TAG = "brain-to-text-training:local"
WHEELS = REPOSITORY / "docker" / "wheels"


class ImageError(Exception):
    """The image cannot be built; one sentence saying why and what to type."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the training image.")
    parser.add_argument("--tag", action="append", help=f"repeatable (default {DEFAULT_TAG})")
    parser.add_argument("--cpu", action="store_true", help="torch without CUDA")
    parser.add_argument("--mlflow", action="store_true", help="with MLflow's client")
    parser.add_argument("--base-image", default=os.environ.get("BASE_IMAGE") or None)
    parser.add_argument("--platform", help="for example linux/amd64")
    options = parser.parse_args(arguments)
    try:
        build_image(
            options.tag or [DEFAULT_TAG],
            cpu=options.cpu,
            mlflow=options.mlflow,
            base_image=options.base_image,
            platform=options.platform,
        )
    except ImageError as problem:
        print(f"build_image: {problem}", file=sys.stderr)
        return 1
    return 0


def build_image(
    tags: list[str],
    *,
    cpu: bool = False,
    mlflow: bool = False,
    base_image: str | None = None,
    platform: str | None = None,
    quiet: bool = False,
) -> None:
    """Build docker/Dockerfile as `tags`; the build's output goes to stderr as it comes.

    Raises:
        ImageError: no engine, no client that can build, no base to be had, a failed step.
    """
    docker = docker_client()
    command = [docker, "build", "--file", str(REPOSITORY / "docker" / "Dockerfile")]
    # The host's network, so that a package proxy on this machine's loopback serves the build too.
    command += ["--network", "host", "--progress", "plain"]
    for tag in tags:
        command += ["--tag", tag]
    if platform:
        command += ["--platform", platform]
    revision = source_revision()
    created = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    values = {"REVISION": revision, "VERSION": revision[:12], "CREATED": created}
    if base_image:
        values["BASE_IMAGE"] = base_image
    if mlflow:
        values["MLFLOW"] = "yes"
    if cpu:
        values["TORCH_VARIANT"] = "cpu"
        if index := os.environ.get("TORCH_CPU_INDEX"):
            values["TORCH_CPU_INDEX"] = index
        else:
            provide_cpu_torch()
    for name, value in values.items():
        command += ["--build-arg", f"{name}={value}"]
    if bundle := certificate_bundle():
        command += ["--secret", f"id=ca_bundle,src={bundle}"]
    command.append(str(REPOSITORY))

    build = subprocess.Popen(
        command,
        # SageMaker wants one plain manifest, not an index with attestations
        env={**os.environ, "DOCKER_BUILDKIT": "1", "BUILDX_NO_DEFAULT_ATTESTATIONS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert build.stdout is not None
    lines: list[str] = []
    for line in build.stdout:
        lines.append(line.rstrip())
        if not quiet:
            print(line, end="", file=sys.stderr, flush=True)
    if build.wait():
        raise ImageError(build_problem(lines, base_image))


# --- the engine and its client


@functools.cache
def docker_client() -> str:
    """The first `docker` on PATH that reaches the engine and can build with BuildKit against it.

    A newer client needs its buildx plugin for that; an older one beside it may do without.

    Raises:
        ImageError: none does, and why.
    """
    clients = on_path("docker")
    if not clients:
        raise ImageError("no docker command was found: install Docker, or use --no-docker.")
    reasons = []
    for client in clients:
        versions = _output(client, "version", "--format", "{{.Client.Version}} {{.Server.Version}}")
        if len(versions.split()) != 2:
            reasons.append(f"{client} does not reach a Docker engine: start it")
            continue
        client_version, server_version = versions.split()
        if _major(client_version) < 23 or _output(client, "buildx", "version"):
            return client
        reasons.append(
            f"{client} {client_version} has no buildx plugin to build on engine {server_version}: "
            "install docker-buildx, or put the engine's own client first on PATH"
        )
    raise ImageError("; ".join(dict.fromkeys(reasons)) + ".")


def engine_problem() -> str | None:
    """Why nothing can be built or run on this machine, in one sentence; None when it can."""
    try:
        docker_client()
    except ImageError as problem:
        return str(problem)
    return None


def on_path(name: str) -> list[str]:
    """Every executable of that name on PATH, in order, each file once."""
    found: dict[Path, str] = {}
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        candidate = shutil.which(name, path=folder)
        if candidate:
            found.setdefault(Path(candidate).resolve(), candidate)
    return list(found.values())


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _major(version: str) -> int:
    match = re.match(r"\d+", version)
    return int(match[0]) if match else 0


# --- what the build is given


def source_revision() -> str:
    """The git revision, with -dirty when what the image is made of has uncommitted changes."""
    revision = _output("git", "-C", str(REPOSITORY), "rev-parse", "HEAD")
    if not revision:
        return "unknown"
    changed = _output(
        "git", "-C", str(REPOSITORY), "status", "--porcelain", "--", "code", "docker", "LICENSE"
    )
    return f"{revision}-dirty" if changed else revision


def certificate_bundle() -> Path | None:
    """The CA bundle this machine's pip is told to use, if it is told: a proxy's own authority."""
    for name in ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        path = os.environ.get(name)
        if path and Path(path).is_file():
            return Path(path)
    configured = _output(sys.executable, "-m", "pip", "config", "get", "global.cert")
    if configured and Path(configured).is_file():
        return Path(configured)
    default = ssl.get_default_verify_paths().cafile
    return Path(default) if default and Path(default).is_file() else None


def provide_cpu_torch() -> None:
    """Lay torch's CPU wheel into docker/wheels/ when this machine's pip has one to give.

    Where pip finds none (PyPI has only CUDA builds for Linux), the Dockerfile's index serves.
    """
    version = re.search(
        r"^torch==(\S+)",
        (REPOSITORY / "docker" / "requirements-torch.in").read_text(),
        re.MULTILINE,
    )
    assert version is not None
    if list(WHEELS.glob(f"torch-{version[1]}*.whl")):
        return
    WHEELS.mkdir(exist_ok=True)
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(WHEELS)]
    subprocess.run(
        [*download, f"torch=={version[1]}+cpu"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )


def build_problem(lines: list[str], base_image: str | None) -> str:
    """One sentence for a failed build."""
    text = "\n".join(lines)
    unreachable = re.search(
        r"failed to (?:do request|resolve|fetch|copy)|pull access denied|manifest unknown"
        r"|not found: manifest|error getting credentials|failed to authorize",
        text,
    )
    if unreachable and "load metadata" in text:
        return (
            f"the base image {base_image or 'that docker/Dockerfile names'} cannot be pulled from "
            "here: give one that this engine has, any Debian or Ubuntu with Python >= 3.11, "
            "with --base-image IMAGE or BASE_IMAGE=IMAGE."
        )
    said = [
        line
        for line in lines
        if re.search(r"\berror\b", line, re.IGNORECASE) and "executor failed" not in line
    ]
    last = (said or lines or ["no output"])[-1]
    return f"docker build failed: {last.strip()}"


if __name__ == "__main__":
    sys.exit(main())
