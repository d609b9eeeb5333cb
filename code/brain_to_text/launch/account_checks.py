"""May this account run the job: what its role is allowed, and the quota of its instances."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..errors import Finding, error
from .account import AwsAccount, error_code
from .image import ECR_URI
from .request import JobSettings

STACK = "code/aws/stack.yaml"
LOG_GROUP = "/aws/sagemaker/TrainingJobs"
# what the agent behind --debug-shell asks for
SHELL_ACTIONS = tuple(
    f"ssmmessages:{action}Channel"
    for action in ("CreateControl", "CreateData", "OpenControl", "OpenData")
)


class Need(NamedTuple):
    """Actions that the job's role must be allowed, on the very resource that the service names."""

    actions: tuple[str, ...]
    resource: str
    context: tuple[tuple[str, str], ...] = ()


def check_role(job: JobSettings, account: AwsAccount) -> Iterator[Finding]:
    """Whether the job's role is there and may do what the job will do, asked of IAM's simulator.

    Raises:
        ClientError: you may not ask.
    """
    from botocore.exceptions import ClientError

    if job.role is None:
        yield error(
            "role-missing",
            f"The job has no execution role: give --role, set SAGEMAKER_ROLE_ARN, or create one "
            f"with {STACK} (README, step 1).",
        )
        return
    name, owner = job.role.rsplit("/", 1)[-1], job.role.split(":")[4]
    for need in needed_permissions(job, account.region, owner):
        try:
            answer = account.client("iam").simulate_principal_policy(
                PolicySourceArn=job.role,
                ActionNames=list(need.actions),
                ResourceArns=[need.resource],
                ContextEntries=[
                    {"ContextKeyName": key, "ContextKeyValues": [value], "ContextKeyType": "string"}
                    for key, value in need.context
                ],
            )
        except ClientError as problem:
            if error_code(problem) != "NoSuchEntity":
                raise
            yield error(
                "role-unknown",
                f"Role {name} does not exist in account {owner}: give --role ARN, or create one "
                f"with {STACK} (README, step 1).",
            )
            return
        for result in answer["EvaluationResults"]:
            action = result["EvalActionName"]
            if result["EvalDecision"] != "allowed":
                yield error(
                    "permission-denied",
                    f"Role {name} may not {action} on {need.resource}: {_remedy(action)}.",
                )


def needed_permissions(job: JobSettings, region: str, owner: str) -> list[Need]:
    """What the job's role must be allowed in an account and region."""
    bucket = f"arn:aws:s3:::{job.s3_bucket}"
    trial_file = f"{bucket}/{job.s3_data_prefix.strip('/')}/SESSION/data_train.hdf5"
    outputs = f"{bucket}/{job.output_prefix.strip('/')}/{job.job_name}"
    group = f"arn:aws:logs:{region}:{owner}:log-group:{LOG_GROUP}:log-stream:"
    metrics = (("cloudwatch:namespace", LOG_GROUP),)
    needs = [
        Need(("s3:ListBucket",), bucket),
        Need(("s3:GetObject",), trial_file),
        Need(("s3:PutObject",), f"{outputs}/output/model.tar.gz"),
        Need(("ecr:GetAuthorizationToken",), "*"),
        Need(("logs:CreateLogGroup", "logs:DescribeLogStreams"), group),
        Need(("logs:CreateLogStream", "logs:PutLogEvents"), f"{group}{job.job_name}/algo-1"),
        Need(("cloudwatch:PutMetricData",), "*", metrics),
    ]
    image = ECR_URI.fullmatch(job.image_uri or "")
    if image:
        place = f"{image['region']}:{image['account']}:repository/{image['repository']}"
        actions = ("BatchCheckLayerAvailability", "BatchGetImage", "GetDownloadUrlForLayer")
        needs.append(Need(tuple(f"ecr:{a}" for a in actions), f"arn:aws:ecr:{place}"))
    states = job.checkpoints_of(job.resume_from or str(job.job_name))
    states = f"{states.replace('s3://', 'arn:aws:s3:::', 1)}/state-a.pt"
    needs.append(Need(("s3:GetObject", "s3:PutObject"), states))
    if job.init_from_checkpoint:
        model = job.init_from_checkpoint.replace("s3://", "arn:aws:s3:::", 1)
        needs.append(Need(("s3:GetObject",), model))
    if job.output_kms_key and job.output_kms_key.startswith("arn:"):
        needs.append(Need(("kms:GenerateDataKey",), job.output_kms_key))
    if job.subnets:
        needs.append(Need(("ec2:CreateNetworkInterface",), "*"))
    if job.debug_shell:
        needs.append(Need(SHELL_ACTIONS, "*"))
    return needs


def _remedy(action: str) -> str:
    """What to type: some actions are allowed by a parameter of the stack."""
    parameter = {
        "ec2": "VpcId=YOUR-VPC",
        "kms": "KmsKeyArn=YOUR-KEY",
        "ssmmessages": "AllowShell=yes",
    }.get(action.split(":")[0])
    if parameter is None:
        return "add it as in code/aws/job_policy.json"
    return f"deploy {STACK} with {parameter} among the --parameter-overrides"


def check_quota(job: JobSettings, account: AwsAccount) -> Iterator[Finding]:
    """Whether the account may have as many instances of that type, and may keep them warm.

    Raises:
        ClientError: you may not ask.
    """
    kind = "spot training job usage" if job.spot else "training job usage"
    wanted = [f"{job.instance_type} for {kind}"]
    if job.keep_alive_minutes:
        wanted.append(f"{job.instance_type} for training warm pool usage")
    pages = account.client("service-quotas").get_paginator("list_service_quotas")
    values = {
        quota["QuotaName"]: quota["Value"]
        for page in pages.paginate(ServiceCode="sagemaker")
        for quota in page["Quotas"]
    }
    for name in wanted:
        value = values.get(name, 0)
        if value < job.instance_count:
            yield error(
                "quota",
                f"Your quota '{name}' in {account.region} is {value:g} and the job needs "
                f"{job.instance_count}: request an increase in Service Quotas > Amazon SageMaker "
                "(it takes days), or choose another --instance-type.",
            )
