"""The image, an S3 server that containers reach, and jobs run as SageMaker runs them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from support.container_job import BUCKET, PREFIX, SESSIONS, TINY_JOB, Job
from support.engine import ImageError, build_image, container_host, docker, image_exists
from support.local_s3 import LocalS3, serve_s3
from support.tiny_data import write_dataset

LOCAL_BASE = "brain-to-text-base:bookworm"


@pytest.fixture(scope="session")
def engine() -> None:
    """The test is skipped where no engine answers, or fails where one is demanded."""
    if shutil.which("docker") is None or not docker("info", check=False):
        _cannot("no Docker engine answers on this machine")


@pytest.fixture(scope="session")
def image(engine: None) -> str:
    """The image of this tree, with torch for CPUs."""
    return _built("test")


@pytest.fixture(scope="session")
def image_with_mlflow(image: str) -> str:
    """The same with MLflow's client."""
    return _built("test-mlflow", "--mlflow")


def _built(tag: str, *options: str) -> str:
    base = os.environ.get("BASE_IMAGE") or (LOCAL_BASE if image_exists(LOCAL_BASE) else None)
    try:
        return build_image(tag, "--cpu", *options, base_image=base)
    except ImageError as problem:
        _cannot(str(problem))


def _cannot(problem: str) -> NoReturn:
    if os.environ.get("BRAIN_TO_TEXT_REQUIRE_DOCKER"):
        pytest.fail(problem)
    pytest.skip(problem)


@pytest.fixture(scope="session")
def container_s3(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    """An S3 server that containers reach; its bucket `tiny` holds a small dataset."""
    with serve_s3(tmp_path_factory.mktemp("container-s3"), container_host()) as server:
        write_dataset(server.make_bucket(BUCKET) / PREFIX, SESSIONS, bins=(90, 160))
        yield server


@pytest.fixture
def make_job(image: str, container_s3: LocalS3, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """make_job({"key": value}, variables={}, base=folder): a tiny job with these changes."""
    made: list[Job] = []

    def make(changes: dict[str, Any] | None = None, **settings: Any) -> Job:
        settings.setdefault("base", tmp_path / f"ml-{len(made)}")
        settings.setdefault("s3", container_s3)
        settings.setdefault("image", image)
        job = Job(hyperparameters={**TINY_JOB, **(changes or {})}, **settings)
        made.append(job)
        return job

    yield make
    for job in made:
        job.remove()
        shutil.rmtree(job.base, ignore_errors=True)
