"""The training image in ECR: where it is, what it says of itself, and whether its code is ours.

build_and_push.sh labels the image with a fingerprint of every file that goes into it; here the same
is computed for the files on this machine.
"""

from __future__ import annotations

import hashlib
import json
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .account import AwsAccount, no_answer

REPOSITORY = Path(__file__).resolve().parents[3]
LABEL = "brain-to-text.code-fingerprints"
_CACHES = ("__pycache__", ".mypy_cache", ".ruff_cache")
# what only the desk uses or leaves behind, and a job's result cannot depend on
_DESK = (
    "*/.*",
    "code/*.md",
    "code/NOTICE",
    "code/aws/*",
    "code/launch_sagemaker_job.py",
    "code/brain_to_text/launch/*",
)
_CONFIGURATIONS = "code/*.yaml"  # these travel as hyperparameters where they differ

ECR_URI = re.compile(
    r"(?P<account>[0-9]{12})\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.amazonaws\.com(\.cn)?/"
    r"(?P<repository>[a-z0-9/._-]+?)(?::(?P<tag>[\w.-]+))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)


@dataclass(frozen=True)
class Image:
    """What ECR lets us see of an image.

    Attributes:
        architectures: of processors; empty when it could not be seen.
        labels: None when they could not be seen.
    """

    architectures: frozenset[str] = frozenset()
    labels: Mapping[str, str] | None = None

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

    Configurations are left out, since they travel; so is what only the desk uses, and locks that
    this kind of image was not made of.
    """
    here = fingerprints()
    return [
        path
        for path in sorted(here.keys() | image.keys())
        if here.get(path) != image.get(path)
        and not any(fnmatch(path, pattern) for pattern in _DESK)
        and not (fnmatch(path, _CONFIGURATIONS) and path.count("/") == 1)
        and not (path.startswith("docker/") and path not in image)
    ]


def unchanged_in_image(path: Path, image: Mapping[str, str] | None) -> bool:
    """Whether the image holds this file of code/ as it is here; True where nothing is known."""
    if image is None:
        return True
    return image.get(path.relative_to(REPOSITORY).as_posix()) == _fingerprint(path)


def look_at(uri: str, account: AwsAccount) -> Image:
    """Ask ECR for an image's manifest and configuration.

    Raises:
        ClientError: ECR refused.
        LookupError: there is no such repository, or no such image in it.
    """
    place = ECR_URI.fullmatch(uri)
    if place is None:
        return Image()
    ecr = account.client("ecr", place["region"])
    digest, tag = place["digest"], place["tag"] or "latest"
    try:
        images = ecr.batch_get_image(
            registryId=place["account"],
            repositoryName=place["repository"],
            imageIds=[{"imageDigest": digest} if digest else {"imageTag": tag}],
        )["images"]
    except ecr.exceptions.RepositoryNotFoundException:
        images = []
    if not images:
        raise LookupError(digest or tag)
    manifest = json.loads(images[0]["imageManifest"])
    if "manifests" in manifest:  # an index: what it lists is not opened
        platforms = (entry.get("platform", {}) for entry in manifest["manifests"])
        found = {platform.get("architecture", "") for platform in platforms}
        return Image(frozenset(found - {"", "unknown"}))
    config = _configuration(ecr, place, manifest)
    if config is None:
        return Image()
    labels = config.get("config", {}).get("Labels") or {}
    return Image(frozenset({config.get("architecture", "")} - {""}), labels)


def _configuration(
    ecr: Any, place: re.Match[str], manifest: dict[str, Any]
) -> dict[str, Any] | None:
    """The image's configuration object; None when ECR does not let us look."""
    digest = manifest.get("config", {}).get("digest")
    if not digest:
        return None
    try:
        url = ecr.get_download_url_for_layer(
            registryId=place["account"], repositoryName=place["repository"], layerDigest=digest
        )["downloadUrl"]
        with urllib.request.urlopen(url, timeout=10) as answer:
            return dict(json.load(answer))
    except no_answer() + (urllib.error.URLError, ValueError):
        return None


def _fingerprint(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
