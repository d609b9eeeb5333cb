"""A training job through the SDK's Estimator in local mode: containers on this machine."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .engine import docker
from .local_s3 import LocalS3

OUTPUT_PREFIX = "sagemaker-outputs"
RUN_LABEL = "brain-to-text.run"
# local mode never assumes the role, it only wants the shape of one
ANY_ROLE = "arn:aws:iam::000000000000:role/local-mode"
SDK_DEFAULTS = """\
SchemaVersion: '1.0'
SageMaker:
  PythonSDK:
    Modules:
      TelemetryOptOut: true
"""


def fit(
    job: str,
    image: str,
    bucket: str,
    hyperparameters: Mapping[str, Any],
    s3: LocalS3,
    folder: Path,
    *,
    gpu: bool = False,
    hosts: int = 1,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Run the job to its end; its output is at s3://BUCKET/sagemaker-outputs/JOB/output.

    Args:
        folder: an existing one, for what the SDK and Compose need while the job runs.
        variables: of the containers, beside the S3 endpoint and credentials.

    Raises:
        RuntimeError: there is no Compose that can, or the job failed.
    """
    provide_compose(gpu, folder)
    os.environ.update(s3.environment())
    os.environ["SAGEMAKER_SUPPRESS_V2_WARNING"] = "1"
    defaults = folder / "sagemaker-sdk.yaml"
    defaults.write_text(SDK_DEFAULTS)
    os.environ["SAGEMAKER_USER_CONFIG_OVERRIDE"] = str(defaults)
    compose_folder = folder / "compose"
    compose_folder.mkdir()
    import boto3
    from sagemaker.estimator import Estimator
    from sagemaker.local import LocalSession

    for name in ("sagemaker", "sagemaker.config", "botocore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    session = LocalSession(boto_session=boto3.Session(), default_bucket=bucket)
    session.config = {
        "local": {
            "container_root": str(compose_folder),
            # 64 MB of shared memory, Docker's default, is too little for worker processes
            "container_config": {"shm_size": "2gb", "labels": {RUN_LABEL: job}},
        }
    }
    estimator = Estimator(
        image_uri=image,
        role=ANY_ROLE,
        instance_count=hosts,
        instance_type="local_gpu" if gpu else "local",
        output_path=f"s3://{bucket}/{OUTPUT_PREFIX}",
        hyperparameters=dict(hyperparameters),
        environment={"AWS_ENDPOINT_URL_S3": s3.endpoint_url, **(variables or {})},
        sagemaker_session=session,
        disable_profiler=True,
        debugger_hook_config=False,
    )
    try:
        estimator.fit(job_name=job)
    except ImportError as error:
        raise RuntimeError(str(error)) from error
    finally:
        remove_containers(job)
        shutil.rmtree(compose_folder, ignore_errors=True)


def provide_compose(gpu: bool, folder: Path) -> None:
    """Put a `docker-compose` on PATH where only the plugin is: the SDK knows no plugin but v2.

    Raises:
        RuntimeError: there is no Compose, or only one too old for a GPU.
    """
    if shutil.which("docker") and _output("docker", "compose", "version"):
        shim = folder / "docker-compose"
        shim.write_text('#!/bin/sh\nexec docker compose "$@"\n')
        shim.chmod(0o755)
        os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
        return
    if shutil.which("docker-compose") is None:
        raise RuntimeError(
            "SageMaker local mode needs Docker Compose: install the package docker-compose-plugin "
            "or docker-compose, or use --no-docker."
        )
    version = _output("docker-compose", "version", "--short")
    if gpu and version.startswith("1."):
        raise RuntimeError(
            f"docker-compose {version} gives containers no GPU: install the Compose plugin "
            "(package docker-compose-plugin), or use --cpu."
        )


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def remove_containers(job: str) -> None:
    """Remove this job's containers and the network that local mode leaves behind."""
    listed = docker("ps", "--all", "--quiet", "--filter", f"label={RUN_LABEL}={job}", check=False)
    if containers := listed.split():
        docker("rm", "--force", "--volumes", *containers, check=False)
    # refused, rightly, while another local job uses it
    docker("network", "rm", "sagemaker-local", check=False)
