"""Is the image where the job will look for it, and for the right processor?"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from botocore.exceptions import ClientError

from ..config import TrainingConfig
from .account import AwsAccount, error_code, sentence
from .findings import Finding, error, warning
from .request import JobSettings

_ECR = re.compile(
    r"(?P<account>[0-9]{12})\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.amazonaws\.com(\.cn)?/"
    r"(?P<repository>[a-z0-9/._-]+?)(?::(?P<tag>[\w.-]+))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_PUSH = "./build_and_push.sh"


def check_image(job: JobSettings, config: TrainingConfig, account: AwsAccount) -> Iterator[Finding]:
    """Findings about the training image in ECR."""
    if job.image_uri is None:
        yield error("image-missing", f"The job has no image: run {_PUSH}, or give --image-uri.")
        return
    place = _ECR.fullmatch(job.image_uri)
    if place is None:
        yield error(
            "image-not-ecr",
            f"Image {job.image_uri} is not in ECR and SageMaker pulls from nowhere else: run "
            f"{_PUSH} and leave --image-uri away.",
        )
        return
    if place["region"] != account.region:
        yield error(
            "image-region",
            f"The image lies in {place['region']} and the job runs in {account.region}: run "
            f"{_PUSH} --region {account.region}.",
        )
        return
    if place["tag"] in (None, "latest") and place["digest"] is None:
        yield warning(
            "image-moving-tag",
            f"Image tag '{place['tag'] or 'latest'}' can change between two jobs: use the digest "
            f"URI that {_PUSH} prints.",
        )
    yield from _in_repository(place, job, account)


def _in_repository(
    place: re.Match[str], job: JobSettings, account: AwsAccount
) -> Iterator[Finding]:
    image_id = (
        {"imageDigest": place["digest"]}
        if place["digest"]
        else {"imageTag": place["tag"] or "latest"}
    )
    shown = place["digest"] or place["tag"] or "latest"
    ecr = account.client("ecr")
    try:
        answer = ecr.batch_get_image(
            registryId=place["account"], repositoryName=place["repository"], imageIds=[image_id]
        )
    except ClientError as problem:
        if error_code(problem) == "RepositoryNotFoundException":
            yield error(
                "repository-unknown",
                f"ECR has no repository {place['repository']} in {account.region} of account "
                f"{place['account']}: run {_PUSH}.",
            )
        else:
            yield warning("image-unchecked", sentence(problem, "looking for the image"))
        return
    if not answer.get("images"):
        yield error(
            "image-unknown",
            f"Repository {place['repository']} has no image {shown}: run {_PUSH}, or choose one of "
            f"`aws ecr list-images --repository-name {place['repository']}`.",
        )
        return
    manifest = json.loads(answer["images"][0]["imageManifest"])
    config = _image_config(ecr, place, manifest)
    platforms = _platforms(manifest, config)
    if platforms and "amd64" not in platforms:
        yield error(
            "image-architecture",
            f"The image is for {', '.join(sorted(platforms))} and SageMaker's GPU instances are "
            f"amd64: run {_PUSH}, which builds for linux/amd64 everywhere.",
        )
    if job.mlflow_tracking_uri:
        yield from _holds_mlflow(config)


def _holds_mlflow(config: dict[str, Any]) -> Iterator[Finding]:
    label = (config.get("config", {}).get("Labels") or {}).get("brain-to-text.mlflow")
    if label == "no":
        yield error(
            "image-without-mlflow",
            "--mlflow-tracking-uri is given and the image holds no MLflow client, so nothing would "
            f"be tracked: run {_PUSH} --mlflow, or drop the option.",
        )
    elif label is None:
        yield warning(
            "image-mlflow-unchecked",
            "Whether the image holds an MLflow client could not be seen; without one nothing is "
            f"tracked: {_PUSH} --mlflow makes one that does.",
        )


def _platforms(manifest: dict[str, Any], config: dict[str, Any]) -> set[str]:
    """Processor architectures of an image; empty when ECR does not let us look."""
    if "manifests" in manifest:
        found = {
            entry.get("platform", {}).get("architecture", "") for entry in manifest["manifests"]
        }
        return found - {"", "unknown"}
    return {config.get("architecture", "")} - {""}


def _image_config(ecr: Any, place: re.Match[str], manifest: dict[str, Any]) -> dict[str, Any]:
    """What the image says of itself; {} for an index, or when ECR does not let us look."""
    digest = manifest.get("config", {}).get("digest")
    if not digest:
        return {}
    try:
        url = ecr.get_download_url_for_layer(
            registryId=place["account"], repositoryName=place["repository"], layerDigest=digest
        )["downloadUrl"]
        with urllib.request.urlopen(url, timeout=10) as answer:
            return dict(json.load(answer))
    except (ClientError, urllib.error.URLError, ValueError):
        return {}
