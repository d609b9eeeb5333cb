"""Launch a training job: fill in what the settings leave open, check it, send the request."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from ..config import TrainingConfig
from ..errors import Finding, JobError, error, note, warning
from .account import NO_ANSWER, AwsAccount, error_code, explained, sentence
from .account_checks import check_quota, check_role
from .checks import check_bucket, check_data, check_image, check_machine
from .image import Image, look_at, pushed_image
from .pricing import Estimate, estimate
from .request import (
    CODE_FOLDER,
    JobSettings,
    check_settings,
    job_config,
    new_job_name,
    training_request,
)

ROLE_VARIABLES = ("SAGEMAKER_ROLE_ARN", "SAGEMAKER_ROLE")
IMAGE_VARIABLE = "BRAIN_TO_TEXT_IMAGE_URI"
STACK_ROLE = "brain-to-text-training"  # the name in code/aws/stack.yaml
LAST_IMAGE = CODE_FOLDER.parent / ".local" / "image_uri"  # written by build_and_push.sh
_ROLE_ARN = re.compile(r"arn:[\w-]+:iam::")
MISSING = {
    "role": "<role ARN: --role or SAGEMAKER_ROLE_ARN>",
    "image_uri": "<image URI: --image-uri or ./build_and_push.sh>",
}


@dataclass(frozen=True)
class TrainingJob:
    """A job from settings to request: what is checked is what is sent.

    Attributes:
        settings: with name, role and image filled in where they are known.
        config: what the job trains with.
        request: of CreateTrainingJob; it has passed the service's own model.
        image: what ECR says of the image; None where AWS was not asked.
        image_found: how the image was chosen, where nobody named one.
    """

    settings: JobSettings
    config: TrainingConfig
    request: dict[str, Any]
    image: Image | None = None
    image_found: str | None = None

    @property
    def name(self) -> str:
        return str(self.settings.job_name)

    @property
    def output_uri(self) -> str:
        """s3:// folder that holds everything the job leaves."""
        return self.settings.output_uri(self.name)


def prepare(settings: JobSettings, account: AwsAccount | None = None) -> TrainingJob:
    """Everything that is known of a job before it is checked and sent; each part is made once.

    Args:
        account: where it will run; None asks AWS nothing.

    Raises:
        ConfigError: the training configuration is wrong.
        JobError: a setting is wrong, the service would refuse the request, or the role is given by
            name and does not exist.
    """
    check_settings(settings)  # first: it keeps secrets out of every later message
    config = job_config(settings)
    role = next((os.environ[v] for v in ROLE_VARIABLES if os.environ.get(v)), None)
    uri, found = settings.image_uri or os.environ.get(IMAGE_VARIABLE), None
    if uri is None and (uri := _last_image()):
        found = f"Image: the last one pushed from this clone ({uri})."
    settings = dataclasses.replace(
        settings,
        job_name=settings.job_name or new_job_name(settings.config_file),
        role=settings.role or role,
        image_uri=uri,
    )
    reminders: dict[str, Any] = {
        key: text for key, text in MISSING.items() if getattr(settings, key) is None
    }
    if settings.role and not _ROLE_ARN.match(settings.role):
        reminders["role"] = f"<role {settings.role}>"
    request = training_request(dataclasses.replace(settings, **reminders), config)
    if account is None:
        return TrainingJob(settings, config, request, None, found)

    image = (
        look_at(uri, account)
        if uri
        else pushed_image(account, mlflow=settings.mlflow_tracking_uri is not None)
    )
    if uri is None and image is not None:
        found = f"Image: the one in ECR that was pushed from this revision ({image.uri})."
    role = role_arn(settings.role, account)
    settings = dataclasses.replace(settings, image_uri=image.uri if image else None, role=role)
    request["RoleArn"] = settings.role
    request["AlgorithmSpecification"]["TrainingImage"] = settings.image_uri
    return TrainingJob(settings, config, request, image, found)


def submit(job: TrainingJob, account: AwsAccount) -> None:
    """Start a job; does not wait for it.

    Raises:
        JobError: it has no role or no image, or AWS refused.
    """
    for key, text in MISSING.items():
        if getattr(job.settings, key) is None:
            raise JobError(f"The job has no {text.strip('<>').replace(': ', ': use ', 1)}.")
    with explained(f"creating training job {job.name}"):
        account.client("sagemaker").create_training_job(**job.request)


def launch_training_job(
    s3_bucket: str,
    *,
    region: str | None = None,
    profile: str | None = None,
    dry_run: bool = False,
    account: AwsAccount | None = None,
    **settings: Any,
) -> TrainingJob:
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
    asked = JobSettings(s3_bucket=s3_bucket, **settings)
    if dry_run:
        return prepare(asked)
    account = account or AwsAccount(region, profile)
    job = prepare(asked, account)
    submit(job, account)
    return job


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
        lines = [
            f"{severity}: {finding.reason}"
            for severity in ("error", "warning", "note")
            for finding in self.of(severity)
        ]
        if self.estimate is not None:
            lines += self.estimate.lines()
        errors, warnings = len(self.of("error")), len(self.of("warning"))
        return [*lines, f"Checked: {errors} errors, {warnings} warnings"]


def preflight(job: TrainingJob, account: AwsAccount) -> Report:
    """Check what can stop `job`, without starting or changing anything.

    A bucket that cannot be used is the only finding: most others would follow from it.
    """
    settings, config = job.settings, job.config
    made = estimate(config, settings.instance_type, settings.instance_count, account)
    try:
        _ = account.identity
    except JobError as problem:
        return Report((error("credentials", str(problem)),), made)
    bucket = tuple(_of("bucket", lambda: check_bucket(settings, account)))
    if any(finding.severity == "error" for finding in bucket):
        return Report(bucket, made)
    groups = {
        "machine": lambda: check_machine(settings, config),
        "permissions": lambda: check_role(settings, account),
        "quota": lambda: check_quota(settings, account),
        "image": lambda: check_image(settings, job.image, account),
        "data": lambda: check_data(settings, config, account),
    }
    findings = [finding for what, check in groups.items() for finding in _of(what, check)]
    if job.image_found:
        findings.append(note("image-found", job.image_found))
    return Report((*bucket, *findings), made)


def _of(what: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """One group's findings; AWS falling silent in the middle is a finding, too."""
    try:
        yield from check()
    except NO_ANSWER as problem:
        yield warning(f"{what}-unchecked", sentence(problem, f"checking the {what}"))
    except JobError as problem:
        yield error(what, str(problem))


def role_arn(role: str | None, account: AwsAccount) -> str | None:
    """The ARN of an execution role given by ARN, by name, or not at all (the stack's role)."""
    if role is not None and _ROLE_ARN.match(role):
        return role
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
