"""What tests and the local run ask the Docker engine, beside building (docker/build_image.py)."""

from __future__ import annotations

import ipaddress
import json
import subprocess

from build_image import docker_client


def docker(*arguments: str, check: bool = True) -> str:
    """Run a docker command and return its output, stripped.

    Raises:
        subprocess.CalledProcessError: it failed and `check` is true.
    """
    done = subprocess.run(
        [docker_client(), *arguments], capture_output=True, text=True, check=check
    )
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
    raise RuntimeError("the engine's bridge network has no address that containers could reach")


def image_exists(name: str) -> bool:
    """Whether the engine holds this image."""
    return bool(docker("images", "--quiet", name, check=False))
