"""An ECR registry on this machine: a real one with TLS and a login, answering for ECR's host name.

Changes /etc/hosts and /etc/docker/certs.d while it runs, so it is for machines that are only there
to test (`.ci/run`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import requests

from .local_s3 import make_certificate

ADDRESS = "127.0.0.2"  # a loopback address of its own: ECR's host names imply port 443
HOSTS = Path("/etc/hosts")
ENGINE_CERTIFICATES = Path("/etc/docker/certs.d")
MANIFEST_TYPES = (
    "application/vnd.docker.distribution.manifest.v2+json, "
    "application/vnd.oci.image.manifest.v1+json"
)


@dataclass(frozen=True)
class Registry:
    """A running registry: its host name, its folder of blobs, and how to ask it."""

    host: str
    folder: Path
    certificate: Path
    user: str
    password: str

    def manifest(self, repository: str, reference: str) -> str | None:
        """The manifest of a tag or digest as it was pushed; None when there is none."""
        answer = requests.get(
            f"https://{self.host}/v2/{repository}/manifests/{reference}",
            headers={"Accept": MANIFEST_TYPES},
            auth=(self.user, self.password),
            verify=str(self.certificate),
            timeout=30,
        )
        if answer.status_code == 404:
            return None
        answer.raise_for_status()
        return answer.text


def missing_part() -> str | None:
    """Why no registry can be served here; None when it can."""
    if not os.environ.get("BRAIN_TO_TEXT_REQUIRE_DOCKER"):
        return "edits /etc/hosts and the engine's certificates: only under .ci/run"
    for command in ("docker-registry", "htpasswd"):
        if shutil.which(command) is None:
            return f"{command} is not installed"
    return None


@contextlib.contextmanager
def serve_registry(folder: Path, account: str, region: str) -> Iterator[Registry]:
    """Serve until the block ends; the login is AWS's (user AWS, moto's token as password)."""
    host = f"{account}.dkr.ecr.{region}.amazonaws.com"
    password = f"{account}-auth-token"
    folder.mkdir(parents=True, exist_ok=True)
    certificate, key = make_certificate(folder, host)
    logins = subprocess.run(
        ["htpasswd", "-Bbn", "AWS", password], capture_output=True, text=True, check=True
    )
    (folder / "htpasswd").write_text(logins.stdout)
    (folder / "config.yml").write_text(
        "version: 0.1\n"
        "log: {level: error}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder / 'blobs'}}}}}\n"
        f"http: {{addr: '{ADDRESS}:443', tls: {{certificate: {certificate}, key: {key}}}}}\n"
        f"auth: {{htpasswd: {{realm: ecr, path: {folder / 'htpasswd'}}}}}\n"
    )
    with contextlib.ExitStack() as stack:
        stack.callback(HOSTS.write_text, HOSTS.read_text())
        with HOSTS.open("a") as hosts:
            hosts.write(f"{ADDRESS} {host}\n")
        trusted = ENGINE_CERTIFICATES / host
        trusted.mkdir(parents=True, exist_ok=True)
        stack.callback(shutil.rmtree, trusted, ignore_errors=True)
        shutil.copy(certificate, trusted / "ca.crt")
        with (folder / "registry.log").open("w") as log:
            process = subprocess.Popen(
                ["docker-registry", "serve", str(folder / "config.yml")],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        stack.callback(process.wait)
        stack.callback(process.terminate)
        _wait_until_it_listens(process, folder / "registry.log")
        yield Registry(host, folder, certificate, "AWS", password)


def _wait_until_it_listens(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        with contextlib.suppress(OSError), socket.create_connection((ADDRESS, 443), timeout=1):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the registry did not start: {log.read_text()[-500:]}")
        time.sleep(0.1)
