"""Check a job before it costs anything: every finding is one line that says how to fix it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from ..config import TrainingConfig
from ..errors import BrainToTextError, JobError
from .account import AwsAccount, sentence
from .account_checks import NO_ANSWER, check_account
from .data_checks import check_data
from .findings import Finding, error, warning
from .image_checks import check_image
from .machine_checks import check_machine
from .pricing import Estimate, estimate
from .request import JobSettings, resolve_config

Check = Callable[[JobSettings, TrainingConfig, AwsAccount], Iterator[Finding]]
CHECKS: dict[str, Check] = {
    "machine": check_machine,
    "account": check_account,
    "image": check_image,
    "data": check_data,
}


@dataclass(frozen=True)
class Report:
    """What was found, and what the job will take."""

    findings: tuple[Finding, ...]
    estimate: Estimate | None

    def of(self, severity: Literal["error", "warning"]) -> list[Finding]:
        """The findings of one severity, in the order of the checks."""
        return [finding for finding in self.findings if finding.severity == severity]

    def lines(self) -> list[str]:
        """The report for people: errors, warnings, then time and price."""
        errors, warnings = self.of("error"), self.of("warning")
        said = [f"error: {finding.text}" for finding in errors]
        said += [f"warning: {finding.text}" for finding in warnings]
        if self.estimate is not None:
            said += self.estimate.lines()
        said.append(f"Checked: {len(errors)} errors, {len(warnings)} warnings")
        return said


def preflight(job: JobSettings, account: AwsAccount) -> Report:
    """Check everything that can stop `job`, without starting or changing anything.

    A job in local mode needs no account: only its data is checked.

    Args:
        job: settings with role, image and name filled in (`launch.completed`).
        account: where the job would run.
    """
    try:
        _, _, config = resolve_config(job)
    except BrainToTextError as problem:
        return Report((error("config", str(problem)),), None)
    if job.is_local:
        return Report(tuple(_of("data", job, config, account)), None)
    try:
        _ = account.identity
    except JobError as problem:
        return Report((error("credentials", str(problem)),), estimate(config, job.instance_type))
    findings = tuple(finding for what in CHECKS for finding in _of(what, job, config, account))
    return Report(findings, estimate(config, job.instance_type, job.instance_count, account))


def _of(
    what: str, job: JobSettings, config: TrainingConfig, account: AwsAccount
) -> Iterator[Finding]:
    """One group's findings; AWS falling silent in the middle is a finding, too."""
    try:
        yield from CHECKS[what](job, config, account)
    except NO_ANSWER as problem:
        yield warning(f"{what}-unchecked", sentence(problem, f"checking the {what}"))
