"""Ask SageMaker about jobs, stop them, and give warm instances back."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ..errors import JobError
from .account import AwsAccount, explained
from .request import PROJECT_TAG

EXIT_CODES = {"Completed": 0, "Failed": 3, "Stopped": 4}
GOES_ON = "go on from its last checkpoint with --resume-from"
# Part of what SageMaker says of a job's end (its reason or its secondary status): what to do next.
_NEXT_STEPS = {
    "CapacityError": "AWS has no free instance of that type: try again later, or choose another "
    "--instance-type, --region, or no --spot",
    "Could not assume role": "SageMaker may not take on the role: deploy code/aws/stack.yaml, or "
    "give the role code/aws/trust_policy.json",
    "ResourceLimitExceeded": "raise the quota in Service Quotas, or choose another --instance-type",
    "MaxRuntimeExceeded": f"raise --max-run-hours, and {GOES_ON}",
    "MaxWaitTimeExceeded": f"raise --max-wait-hours or leave --spot out, and {GOES_ON}",
    "Interrupted": f"the spot instance was taken back: {GOES_ON}",
    "AlgorithmError": "correct what the reason names; --watch shows the log again",
    "InternalServerError": f"SageMaker failed: {GOES_ON}",
}


@dataclass(frozen=True)
class JobState:
    """What SageMaker says about a job at one moment.

    Attributes:
        request: the whole description, as the API gives it.
    """

    name: str
    request: dict[str, Any]

    @property
    def status(self) -> str:
        """InProgress, Completed, Failed, Stopping or Stopped."""
        return str(self.request["TrainingJobStatus"])

    @property
    def is_final(self) -> bool:
        """True in every state but the two that lead to another one."""
        return self.status not in ("InProgress", "Stopping")

    @property
    def transitions(self) -> list[tuple[datetime, str, str]]:
        """(start, phase, message), oldest first."""
        return [
            (step["StartTime"], step["Status"], step.get("StatusMessage", ""))
            for step in self.request.get("SecondaryStatusTransitions", [])
        ]

    @property
    def output_uri(self) -> str:
        """s3:// folder with everything the job leaves."""
        return f"{self.request['OutputDataConfig']['S3OutputPath'].rstrip('/')}/{self.name}"

    def why(self) -> list[str]:
        """Why a job did not complete, and the next step, as far as SageMaker or we know."""
        reason = " ".join(self.request.get("FailureReason", "").split())
        secondary = self.request.get("SecondaryStatus", self.status)
        lines = [f"Why: {reason}"] if reason else []
        if self.status == "Completed":
            return lines
        if not reason:
            lines = [f"SageMaker gives no reason; its last state is {secondary}."]
        steps = [step for words, step in _NEXT_STEPS.items() if words in f"{reason} {secondary}"]
        text = steps[0] if steps else f"see its log with --watch {self.name}, and {GOES_ON}"
        return [*lines, f"Next: {text.replace(GOES_ON, f'{GOES_ON} {self.name}')}."]

    def summary(self) -> list[str]:
        """The end of a job for people: state, time, money saved, why, where."""
        resources = self.request["ResourceConfig"]
        lines = [f"{self.name}: {self.status}"]
        lines += self.why() if self.is_final else []
        trained = self.request.get("TrainingTimeInSeconds")
        billed = self.request.get("BillableTimeInSeconds")  # of one instance, both
        if trained is not None and billed is not None:
            lines.append(
                f"Time: {duration(trained)} training, {billed:,} s billed on "
                f"{resources['InstanceCount']} x {resources['InstanceType']}"
            )
            if self.request.get("EnableManagedSpotTraining") and trained:
                lines.append(f"Spot savings: {100 * (1 - billed / trained):.0f} %")
        lines.append(f"Outputs: {self.output_uri}")
        return lines


def job_state(name: str, account: AwsAccount) -> JobState:
    """Ask SageMaker about one job.

    Raises:
        JobError: there is no such job in this account and region, or AWS refused.
    """
    unknown = (
        f"There is no training job {name} in {account.region}: see --list, or give the --region "
        "it runs in."
    )
    doing = f"asking about job {name}"
    with explained(doing, ValidationException=unknown, ResourceNotFound=unknown):
        answer = account.client("sagemaker").describe_training_job(TrainingJobName=name)
    answer.pop("ResponseMetadata", None)
    return JobState(name, answer)


def stop_job(name: str, account: AwsAccount) -> None:
    """Ask SageMaker to stop a job; it gets two minutes to save a checkpoint.

    Raises:
        JobError: there is no such job, it is over already, or AWS refused.
    """
    state = job_state(name, account)
    if state.is_final:
        raise JobError(f"Job {name} is {state.status.lower()} already: there is nothing to stop.")
    with explained(f"stopping job {name}"):
        account.client("sagemaker").stop_training_job(TrainingJobName=name)


def release_job(name: str, account: AwsAccount) -> None:
    """Give back the instances that a job keeps warm, which are billed until then.

    Raises:
        JobError: there is no such job, it keeps none, or AWS refused.
    """
    pool = job_state(name, account).request.get("WarmPoolStatus", {}).get("Status")
    if pool not in ("Available", "InUse"):
        state = (
            f"its warm pool is {pool.lower()}" if pool else "it was launched without a warm pool"
        )
        raise JobError(f"Job {name} keeps no instances: {state}.")
    with explained(f"releasing the instances of job {name}"):
        account.client("sagemaker").update_training_job(
            TrainingJobName=name, ResourceConfig={"KeepAlivePeriodInSeconds": 0}
        )


def list_jobs(account: AwsAccount) -> list[str]:
    """The latest jobs of this project, whatever their names, newest first, one line each.

    They are known by the tag that every request of ours carries.
    """
    ((tag, value),) = PROJECT_TAG.items()
    with explained("listing jobs"):
        answer = account.client("sagemaker").search(
            Resource="TrainingJob",
            SearchExpression={
                "Filters": [{"Name": f"Tags.{tag}", "Operator": "Equals", "Value": value}]
            },
            SortBy="CreationTime",
            SortOrder="Descending",
            MaxResults=20,
        )
    lines = []
    for result in answer["Results"]:
        job = result["TrainingJob"]
        started, ended = job["CreationTime"], job.get("TrainingEndTime")
        took = f", {duration((ended - started).total_seconds())}" if ended else ""
        pool = job.get("WarmPoolStatus", {}).get("Status")
        warm = f", instances kept warm (--release {job['TrainingJobName']})"
        lines.append(
            f"{job['TrainingJobName']:<44} {job['TrainingJobStatus']:<11} "
            f"{started:%Y-%m-%d %H:%M}{took}{warm if pool == 'Available' else ''}"
        )
    return lines


def duration(seconds: float) -> str:
    """Seconds as people say them: 45 s, 12 min, 3 h 05 min."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    minutes = round(whole / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
