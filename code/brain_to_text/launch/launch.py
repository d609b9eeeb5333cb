"""Launch a training job: fill in what the settings leave open, then submit."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import JobError
from .account import AwsAccount, error_code, explained
from .fetch import note_local_job
from .job_submission import Sdk, run_locally, submit
from .local_process import run_in_process
from .request import (
    CODE_FOLDER,
    LOCAL_PROCESS,
    JobSettings,
    new_job_name,
    training_request,
)

ROLE_VARIABLES = ("SAGEMAKER_ROLE_ARN", "SAGEMAKER_ROLE")
IMAGE_VARIABLE = "BRAIN_TO_TEXT_IMAGE_URI"
STACK_ROLE = "brain-to-text-training"  # the name in code/aws/stack.yaml
LAST_IMAGE = CODE_FOLDER.parent / ".local" / "image_uri"  # written by build_and_push.sh
MISSING = {
    "role": "<role ARN: --role or SAGEMAKER_ROLE_ARN>",
    "image_uri": "<image URI: --image-uri or ./build_and_push.sh>",
}


@dataclass(frozen=True)
class LaunchedJob:
    """A job's name, where its outputs go, and the request that made it."""

    name: str
    output_uri: str
    request: dict[str, Any]
    submitted: bool


def launch_training_job(
    s3_bucket: str,
    *,
    region: str | None = None,
    profile: str | None = None,
    dry_run: bool = False,
    sdk: Sdk | None = None,
    account: AwsAccount | None = None,
    **settings: Any,
) -> LaunchedJob:
    """Start a training job (what `code/launch_sagemaker_job.py` does after its checks).

    Args:
        s3_bucket: bucket with the dataset; outputs go there too.
        region, profile: where and as whom; default: the standard AWS settings.
        dry_run: only make the request; what is not known yet is filled with a reminder.
        sdk: "v2", "v3" or "boto3"; None for the SDK that is installed.
        account: an open session, instead of region and profile.
        settings: any other field of `JobSettings` (instance_type, spot, batch_size, ...).

    Raises:
        ConfigError: the training configuration is wrong.
        JobError: a setting is wrong or missing, or AWS refused.
    """
    job = JobSettings(s3_bucket=s3_bucket, **settings)
    if not dry_run:
        account = account or AwsAccount(region, profile)
        return submit_training_job(completed(job, account), account, sdk)
    request = training_request(placeholders(completed(job, None)))
    name = request["TrainingJobName"]
    return LaunchedJob(name, job.output_uri(name), request, submitted=False)


def submit_training_job(
    job: JobSettings, account: AwsAccount, sdk: Sdk | None = None
) -> LaunchedJob:
    """Start a job whose settings are complete (`completed`); on this machine it runs to its end.

    Raises:
        ConfigError, JobError: as `launch_training_job`.
    """
    request = training_request(job)
    if job.is_local:
        note_local_job(request["TrainingJobName"], job.output_uri(str(job.job_name)), request)
    if job.instance_type == LOCAL_PROCESS:
        name = run_in_process(request, account)
    elif job.is_local:
        name = run_locally(request, account)
    else:
        name = submit(request, account, sdk)
    return LaunchedJob(name, job.output_uri(name), request, submitted=True)


def completed(job: JobSettings, account: AwsAccount | None) -> JobSettings:
    """`job` with name, image and role filled in from the environment and, if given, the account.

    Raises:
        JobError: the role is given by name and does not exist.
    """
    known: dict[str, Any] = {}
    if job.job_name is None:
        known["job_name"] = new_job_name(job.config_file)
    if job.image_uri is None:
        known["image_uri"] = os.environ.get(IMAGE_VARIABLE) or _last_image()
        if known["image_uri"] is None and job.instance_type == LOCAL_PROCESS:
            known["image_uri"] = "none"
    role = job.role or next((os.environ[v] for v in ROLE_VARIABLES if os.environ.get(v)), None)
    if role is None and job.is_local:
        role = "arn:aws:iam::000000000000:role/local-mode-needs-none"
    if account is not None:
        role = role_arn(role, account)
    known["role"] = role
    return dataclasses.replace(job, **known)


def placeholders(job: JobSettings) -> JobSettings:
    """`job` with a reminder in place of what is not known yet, for requests that are only shown."""
    unknown: dict[str, Any] = {
        name: text for name, text in MISSING.items() if getattr(job, name) is None
    }
    return dataclasses.replace(job, **unknown)


def role_arn(role: str | None, account: AwsAccount) -> str | None:
    """The ARN of an execution role given by ARN, by name, or not at all (the stack's role)."""
    if role is not None and re.match(r"arn:[\w-]+:iam::", role):
        return role
    from botocore.exceptions import ClientError

    with explained(f"looking up the role {role or STACK_ROLE}"):
        try:
            return str(account.client("iam").get_role(RoleName=role or STACK_ROLE)["Role"]["Arn"])
        except ClientError as error:
            if role is None and error_code(error) in ("NoSuchEntity", "AccessDenied"):
                return None
            if error_code(error) == "NoSuchEntity":
                raise JobError(
                    f"Role {role} does not exist in account {account.identity['Account']}: give "
                    "--role ARN, or create it with code/aws/stack.yaml (README, step 1)."
                ) from error
            raise


def _last_image() -> str | None:
    path = Path(LAST_IMAGE)
    return path.read_text(encoding="utf-8").strip() or None if path.is_file() else None
