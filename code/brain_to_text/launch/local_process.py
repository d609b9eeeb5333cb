"""Run a job's training program in this Python, without a container, on a folder like /opt/ml."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import JobError
from .account import AwsAccount, explained
from .request import CODE_FOLDER

RUNS_FOLDER = CODE_FOLDER.parent / ".local" / "runs"
PROGRAM = CODE_FOLDER / "train_model_sagemaker.py"
STOP_SECONDS = 120  # what SageMaker gives a job between SIGTERM and SIGKILL


def run_in_process(request: Mapping[str, Any], account: AwsAccount) -> str:
    """Train on this machine until the job ends; outputs go to the same S3 URIs as a real job's.

    The folder stays, so the same job name goes on from its checkpoint.

    Args:
        request: from `sagemaker_job.training_request`; its image, role and instances do not matter.
        account: for uploading the results.

    Raises:
        JobError: training failed (its own reason is in the message), or the upload did.
    """
    name = str(request["TrainingJobName"])
    base = RUNS_FOLDER / name / "opt" / "ml"
    for folder in ("model", "output/data", "checkpoints"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(PROGRAM)]
    for key, text in sorted(request["HyperParameters"].items()):
        command += [f"--{key}", _argument(text)]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SM_")},
        **request.get("Environment", {}),
        "SAGEMAKER_BASE_DIR": str(base),
        "TRAINING_JOB_NAME": name,
    }
    # a group of its own: Ctrl-C must reach it once, as the SIGTERM of a stop
    process = subprocess.Popen(command, env=environment, process_group=0)
    try:
        process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    if process.returncode:
        raise JobError(f"The local run {name} failed: {_reason(base, process.returncode)}")
    bucket, _, prefix = request["OutputDataConfig"]["S3OutputPath"][5:].partition("/")
    with explained(f"uploading the results of {name}"):
        for archive, folder in (("model.tar.gz", "model"), ("output.tar.gz", "output")):
            with tempfile.TemporaryFile() as file:
                with tarfile.open(fileobj=file, mode="w:gz") as tar:
                    for path in sorted((base / folder).iterdir()):
                        tar.add(path, arcname=path.name)
                file.seek(0)
                account.client("s3").upload_fileobj(
                    file, bucket, f"{prefix}/{name}/output/{archive}".lstrip("/")
                )
    return name


def _argument(text: str) -> str:
    """A hyperparameter as the toolkit would hand it over: quoted text without its quotes."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, str) else text


def _reason(base: Path, return_code: int) -> str:
    failure = base / "output" / "failure"
    if failure.is_file():
        return failure.read_text(encoding="utf-8", errors="replace").strip()
    return f"it ended with exit code {return_code}; its last lines are above."
