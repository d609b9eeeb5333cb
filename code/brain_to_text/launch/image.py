"""The training image in ECR: where it is, what it says of itself, and whether its code is ours.

build_and_push.sh labels the image with a fingerprint of every file that goes into it; here the same
is computed for the files on this machine.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..errors import JobError
from .account import NO_ANSWER, AwsAccount

REPOSITORY = Path(__file__).resolve().parents[3]
STACK_REPOSITORY = "brain-to-text-training"  # in code/aws/stack.yaml and build_and_push.sh
LABEL = "brain-to-text.code-fingerprints"
_CACHES = ("__pycache__", ".mypy_cache", ".ruff_cache")
# what only your machine uses or leaves behind, so that a job's result cannot depend on it
_LOCAL = (
    "*/.*",
    "code/*.md",
    "code/NOTICE",
    "code/aws/*",
    "code/launch_sagemaker_job.py",
    "code/brain_to_text/launch/*",
)
_CONFIGURATIONS = "code/*.yaml"  # a job gets its whole configuration as hyperparameters

ECR_URI = re.compile(
    r"(?P<account>[0-9]{12})\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.amazonaws\.com(\.cn)?/"
    r"(?P<repository>[a-z0-9/._-]+?)(?::(?P<tag>[\w.-]+))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)


@dataclass(frozen=True)
class Image:
    """What ECR lets us see of an image.

    Attributes:
        uri: by digest where it is known, so that a tag that moves changes nothing.
        architectures: of processors; empty when it could not be seen.
        labels: None when they could not be seen.
        missing: the tag or digest that ECR does not have.
        refusal: why ECR could not be asked.
    """

    uri: str
    architectures: frozenset[str] = frozenset()
    labels: Mapping[str, str] | None = None
    missing: str | None = None
    refusal: Exception | None = None

    @property
    def code(self) -> dict[str, str] | None:
        """Fingerprints by path of the files it was made of; None where it does not say."""
        text = (self.labels or {}).get(LABEL)
        try:
            return None if text is None else dict(json.loads(text))
        except ValueError:
            return None


def fingerprints() -> dict[str, str]:
    """First 16 digits of SHA-256 by path, of what build_and_push.sh would put into the image."""
    paths = [
        path
        for path in (REPOSITORY / "code").rglob("*")
        if path.is_file() and path.suffix != ".pyc" and not set(_CACHES) & set(path.parts)
    ]
    for pattern in ("*.py", "requirements_sagemaker*.txt"):
        paths += (REPOSITORY / "docker").glob(pattern)
    return {
        path.relative_to(REPOSITORY).as_posix(): _fingerprint(path)
        for path in sorted(paths, key=lambda path: path.relative_to(REPOSITORY).as_posix())
    }


def code_differences(image: Mapping[str, str]) -> list[str]:
    """Files whose difference a job would feel: changed, new here, or only in the image.

    Left out: configurations, which every job gets as hyperparameters; what only your machine uses;
    locks that this kind of image was not made of.
    """
    here = fingerprints()
    return [
        path
        for path in sorted(here.keys() | image.keys())
        if here.get(path) != image.get(path)
        and not any(fnmatch(path, pattern) for pattern in _LOCAL)
        and not (fnmatch(path, _CONFIGURATIONS) and path.count("/") == 1)
        and not (path.startswith("docker/") and path not in image)
    ]


def look_at(uri: str, account: AwsAccount) -> Image:
    """Ask ECR for an image's manifest and configuration."""
    parts = ECR_URI.fullmatch(uri)
    if parts is None:
        return Image(uri)
    ecr = account.client("ecr", parts["region"])
    digest, tag = parts["digest"], parts["tag"] or "latest"
    wanted = {"imageDigest": digest} if digest else {"imageTag": tag}
    where = {"registryId": parts["account"], "repositoryName": parts["repository"]}
    try:
        images = ecr.batch_get_image(**where, imageIds=[wanted])["images"]
    except ecr.exceptions.RepositoryNotFoundException:
        images = []
    except NO_ANSWER as error:
        return Image(uri, refusal=error)
    if not images:
        return Image(uri, missing=digest or tag)
    found = images[0]["imageId"].get("imageDigest", digest)
    uri = f"{uri.partition('@')[0].removesuffix(f':{tag}')}@{found}" if found else uri
    manifest = json.loads(images[0]["imageManifest"])
    if "manifests" in manifest:  # an index: what it lists is not opened
        platforms = (entry.get("platform", {}) for entry in manifest["manifests"])
        seen = {platform.get("architecture", "") for platform in platforms}
        return Image(uri, frozenset(seen - {"", "unknown"}))
    config = _configuration(ecr, parts, manifest)
    if config is None:
        return Image(uri)
    labels = config.get("config", {}).get("Labels") or {}
    return Image(uri, frozenset({config.get("architecture", "")} - {""}), labels)


def pushed_image(account: AwsAccount, *, mlflow: bool = False) -> Image | None:
    """The image that a push from this revision made, by anybody; None where there is none.

    Its tag is the git revision, as in build_and_push.sh; whether its code is that on this machine
    is for `code_differences` to say.

    Args:
        mlflow: the one with MLflow's client.
    """
    try:
        git = ("git", "-C", str(REPOSITORY), "rev-parse", "HEAD")
        revision = subprocess.run(git, capture_output=True, text=True, check=True).stdout[:12]
        owner = account.identity["Account"]
    except (OSError, subprocess.CalledProcessError, JobError):
        return None
    tag = f"{revision}-mlflow" if mlflow else revision
    host = f"{owner}.dkr.ecr.{account.region}.{account.dns_suffix}"
    image = look_at(f"{host}/{STACK_REPOSITORY}:{tag}", account)
    return None if image.missing or image.refusal else image


def _configuration(
    ecr: Any, parts: re.Match[str], manifest: dict[str, Any]
) -> dict[str, Any] | None:
    """The image's configuration object; None when ECR does not let us look."""
    digest = manifest.get("config", {}).get("digest")
    if not digest:
        return None
    try:
        url = ecr.get_download_url_for_layer(
            registryId=parts["account"], repositoryName=parts["repository"], layerDigest=digest
        )["downloadUrl"]
        with urllib.request.urlopen(url, timeout=10) as answer:
            return dict(json.load(answer))
    except (*NO_ANSWER, urllib.error.URLError, ValueError):
        return None


def _fingerprint(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
