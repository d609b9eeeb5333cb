"""Launch a training job: fill in what the settings leave open, check it, send the request."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BrainToTextError, Finding, JobError, error, warning
from .account import AwsAccount, error_code, explained, no_answer, sentence
from .account_checks import check_quota, check_role
from .checks import check_data, check_image, check_machine
from .image import look_at
from .pricing import Estimate, estimate
from .request import CODE_FOLDER, JobSettings, new_job_name, resolve_config, training_request

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


def launch_training_job(
    s3_bucket: str,
    *,
    region: str | None = None,
    profile: str | None = None,
    dry_run: bool = False,
    account: AwsAccount | None = None,
    **settings: Any,
) -> LaunchedJob:
    """Start a training job (what `code/launch_sagemaker_job.py` does after its checks).

    Args:
        s3_bucket: bucket with the dataset; outputs go there too.
        region, profile: where and as whom; default: the standard AWS settings.
        dry_run: only make the request; what is not known yet is filled with a reminder.
        account: an open session, instead of region and profile.
        settings: any other field of `JobSettings` (instance_type, spot, batch_size, ...).

    Raises:
        ConfigError: the training configuration is wrong.
        JobError: a setting is wrong or missing, or AWS refused.
    """
    job = JobSettings(s3_bucket=s3_bucket, **settings)
    if not dry_run:
        account = account or AwsAccount(region, profile)
        return submit_training_job(completed(job, account), account)
    job = completed(job, None)
    unknown: dict[str, Any] = {
        name: text for name, text in MISSING.items() if getattr(job, name) is None
    }
    request = training_request(dataclasses.replace(job, **unknown))
    name = request["TrainingJobName"]
    return LaunchedJob(name, job.output_uri(name), request)


def submit_training_job(job: JobSettings, account: AwsAccount) -> LaunchedJob:
    """Start a job whose settings are complete (`completed`); does not wait for it.

    Raises:
        ConfigError, JobError: as `launch_training_job`.
    """
    try:
        code = look_at(str(job.image_uri), account).code
    except no_answer() + (LookupError,):  # ECR does not let us look
        code = None
    request = training_request(job, code)
    name = str(request["TrainingJobName"])
    with explained(f"creating training job {name}"):
        account.client("sagemaker").create_training_job(**request)
    return LaunchedJob(name, job.output_uri(name), request)


@dataclass(frozen=True)
class Report:
    """What the checks found, and what the job will take."""

    findings: tuple[Finding, ...]
    estimate: Estimate | None

    def of(self, severity: str) -> list[Finding]:
        """The findings of one severity, in the order of the checks."""
        return [finding for finding in self.findings if finding.severity == severity]

    def lines(self) -> list[str]:
        """The report for people: errors, warnings, notes, then time and price."""
        said = [
            f"{severity}: {finding.reason}"
            for severity in ("error", "warning", "note")
            for finding in self.of(severity)
        ]
        if self.estimate is not None:
            said += self.estimate.lines()
        errors, warnings = len(self.of("error")), len(self.of("warning"))
        return [*said, f"Checked: {errors} errors, {warnings} warnings"]


def preflight(job: JobSettings, account: AwsAccount) -> Report:
    """Check what can stop `job`, without starting or changing anything.

    Args:
        job: settings with role, image and name filled in (`completed`).
        account: where the job would run.
    """
    try:
        _, _, config = resolve_config(job)
    except BrainToTextError as problem:
        return Report((error("config", str(problem)),), None)
    try:
        _ = account.identity
    except JobError as problem:
        return Report((error("credentials", str(problem)),), estimate(config, job.instance_type))
    groups = {
        "machine": lambda: check_machine(job, config),
        "permissions": lambda: check_role(job, account),
        "quota": lambda: check_quota(job, account),
        "image": lambda: check_image(job, account),
        "data": lambda: check_data(job, config, account),
    }
    findings = tuple(finding for what, check in groups.items() for finding in _of(what, check))
    return Report(findings, estimate(config, job.instance_type, job.instance_count, account))


def _of(what: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """One group's findings; AWS falling silent in the middle is a finding, too."""
    try:
        yield from check()
    except no_answer() as problem:
        yield warning(f"{what}-unchecked", sentence(problem, f"checking the {what}"))
    except JobError as problem:
        yield error(what, str(problem))


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
    role = job.role or next((os.environ[v] for v in ROLE_VARIABLES if os.environ.get(v)), None)
    if account is not None:
        role = role_arn(role, account)
    known["role"] = role
    return dataclasses.replace(job, **known)


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
