"""May this account run the job: role, permissions, quota, name, keys, network?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from ..config import TrainingConfig
from .account import AwsAccount, error_code, sentence
from .findings import Finding, error, warning
from .request import MLFLOW_ARN, JobSettings

STACK = "code/aws/stack.yaml"
# refused, not reached, or answered by something that is not AWS (a proxy's page)
NO_ANSWER = (ClientError, BotoCoreError, ResponseParserError)
# what `mlflow_run` asks of a SageMaker tracking server
MLFLOW_ACTIONS = (
    "CreateExperiment",
    "CreateRun",
    "GetExperimentByName",
    "GetMetricHistory",
    "GetRun",
    "LogBatch",
    "SetTag",
    "UpdateRun",
)


def check_account(
    job: JobSettings, config: TrainingConfig, account: AwsAccount
) -> Iterator[Finding]:
    """Findings about role, permissions, quota, job name, KMS keys, VPC and MLflow server."""
    yield from _role(job, account)
    yield from _job_name(job, account)
    yield from _quota(job, account)
    for option, key in (
        ("--output-kms-key", job.output_kms_key),
        ("--volume-kms-key", job.volume_kms_key),
    ):
        if key:
            yield from _key(option, key, account)
    if job.subnets:
        yield from _network(job, account)
    if job.mlflow_tracking_uri:
        yield from _mlflow_server(job.mlflow_tracking_uri, account)


def _role(job: JobSettings, account: AwsAccount) -> Iterator[Finding]:
    if job.role is None:
        yield error(
            "role-missing",
            f"The job has no execution role: give --role, set SAGEMAKER_ROLE_ARN, or create one "
            f"with {STACK} (README, step 1).",
        )
        return
    name = job.role.rsplit("/", 1)[-1]
    owner = job.role.split(":")[4] if job.role.count(":") >= 5 else ""
    if owner and owner != account.identity["Account"]:
        yield error(
            "role-account",
            f"Role {name} belongs to account {owner} and you are in {account.identity['Account']}: "
            "SageMaker only takes roles of the job's own account; give --role of this account.",
        )
        return
    iam = account.client("iam")
    try:
        role = iam.get_role(RoleName=name)["Role"]
    except ClientError as problem:
        if error_code(problem) == "NoSuchEntity":
            yield error(
                "role-unknown",
                f"Role {name} does not exist in account {account.identity['Account']}: give "
                f"--role ARN, or create one with {STACK} (README, step 1).",
            )
        else:
            yield warning("role-unchecked", sentence(problem, f"looking at role {name}"))
        return
    if not _trusts_sagemaker(role["AssumeRolePolicyDocument"]):
        yield error(
            "role-trust",
            f"Role {name} does not trust sagemaker.amazonaws.com, so SageMaker cannot use it: add "
            f"that principal to its trust policy (code/aws/trust_policy.json), or use {STACK}.",
        )
    yield from _permissions(job, account, role["Arn"])
    yield from _caller(job, account, role["Arn"])


def _trusts_sagemaker(document: Any) -> bool:
    policy = json.loads(unquote(document)) if isinstance(document, str) else document
    statements = policy.get("Statement", [])
    for statement in statements if isinstance(statements, list) else [statements]:
        principal = statement.get("Principal", {})
        services = principal.get("Service", []) if isinstance(principal, dict) else principal
        named = [services] if isinstance(services, str) else services
        if statement.get("Effect") == "Allow" and (
            "sagemaker.amazonaws.com" in named or "*" in named
        ):
            return True
    return False


def needed_permissions(job: JobSettings) -> list[tuple[str, str]]:
    """(action, resource) pairs that the job's role must be allowed."""
    bucket = f"arn:aws:s3:::{job.s3_bucket}"
    outputs = f"{bucket}/{job.output_prefix.strip('/')}/*"
    needed = [
        ("s3:ListBucket", bucket),
        ("s3:GetObject", f"{bucket}/{job.s3_data_prefix.strip('/')}/*"),
        ("s3:PutObject", outputs),
        ("s3:GetObject", outputs),
        ("ecr:GetAuthorizationToken", "*"),
        ("logs:CreateLogStream", "*"),
        ("logs:PutLogEvents", "*"),
    ]
    if job.image_uri and ".dkr.ecr." in job.image_uri:
        host, _, rest = job.image_uri.partition("/")
        owner, _, _, region = host.split(".")[:4]
        repository = rest.split("@")[0].split(":")[0]
        arn = f"arn:aws:ecr:{region}:{owner}:repository/{repository}"
        needed += [("ecr:BatchGetImage", arn), ("ecr:GetDownloadUrlForLayer", arn)]
    if job.subnets:
        needed.append(("ec2:CreateNetworkInterface", "*"))
    for uri, actions in (
        (job.checkpoint_s3_uri, ("s3:GetObject", "s3:PutObject")),
        (job.init_from_checkpoint, ("s3:GetObject",)),
    ):
        if uri:
            place = f"arn:aws:s3:::{uri.removeprefix('s3://').rstrip('/')}"
            needed += [(action, place if len(actions) == 1 else f"{place}/*") for action in actions]
    server = MLFLOW_ARN.match(job.mlflow_tracking_uri or "")
    if server and server["kind"] == "mlflow-tracking-server":
        needed += [(f"sagemaker-mlflow:{action}", server[0]) for action in MLFLOW_ACTIONS]
    return needed


def _permissions(job: JobSettings, account: AwsAccount, arn: str) -> Iterator[Finding]:
    name = arn.rsplit("/", 1)[-1]
    for action, resource in needed_permissions(job):
        try:
            answer = account.client("iam").simulate_principal_policy(
                PolicySourceArn=arn, ActionNames=[action], ResourceArns=[resource]
            )
        except NO_ANSWER:
            yield warning(
                "permissions-unchecked",
                f"The permissions of role {name} could not be simulated: allow yourself "
                "iam:SimulatePrincipalPolicy (code/aws/launcher_policy.json) to have them checked.",
            )
            return
        if any(result["EvalDecision"] != "allowed" for result in answer["EvaluationResults"]):
            yield error(
                "permission-denied",
                f"Role {name} may not {action} on {resource}: add it as in "
                "code/aws/job_policy.json.",
            )


def _caller(job: JobSettings, account: AwsAccount, role: str) -> Iterator[Finding]:
    """Whether you may hand the role to SageMaker, and start such a job.

    Assumed roles are simulated as their role. Simulation knows an organisation's policies, too.
    """
    arn = account.identity["Arn"]
    if ":assumed-role/" in arn:
        prefix, _, rest = arn.partition(":assumed-role/")
        arn = f"{prefix.replace(':sts:', ':iam:')}:role/{rest.split('/')[0]}"

    def may(action: str, resource: str, *context: tuple[str, str, str]) -> bool:
        answer = account.client("iam").simulate_principal_policy(
            PolicySourceArn=arn,
            ActionNames=[action],
            ResourceArns=[resource],
            ContextEntries=[
                {"ContextKeyName": key, "ContextKeyValues": [value], "ContextKeyType": kind}
                for key, value, kind in context
            ],
        )
        return all(result["EvalDecision"] == "allowed" for result in answer["EvaluationResults"])

    you = arn.rsplit("/", 1)[-1]
    _, partition, _, _, owner, _ = arn.split(":", 5)
    made = f"arn:{partition}:sagemaker:{account.region}:{owner}:training-job/{job.job_name}"
    start = ("sagemaker:CreateTrainingJob", made)
    types = ("sagemaker:InstanceTypes", job.instance_type, "stringList")
    try:
        service = ("iam:PassedToService", "sagemaker.amazonaws.com", "string")
        if not may("iam:PassRole", role, service):
            yield error(
                "pass-role",
                f"You ({you}) may not pass role {role.rsplit('/', 1)[-1]} to SageMaker: attach "
                "code/aws/launcher_policy.json to your user.",
            )
        if may(*start, types, ("sagemaker:NetworkIsolation", "false", "boolean")):
            return
        if may(*start, types, ("sagemaker:NetworkIsolation", "true", "boolean")):
            yield error(
                "network-isolation",
                f"You ({you}) may only start jobs with network isolation, which cuts them off from "
                "S3 and so from the stream: ask your administrator to except this project, with "
                "--subnets and an S3 endpoint if it must be private.",
            )
        else:
            yield error(
                "launch-denied",
                f"You ({you}) may not sagemaker:CreateTrainingJob on {job.instance_type} in "
                f"{account.region}: attach code/aws/launcher_policy.json to your user, or ask "
                "which types and regions your organisation allows.",
            )
    except NO_ANSWER:
        return  # the root user and some federated identities cannot be simulated


def _job_name(job: JobSettings, account: AwsAccount) -> Iterator[Finding]:
    try:
        account.client("sagemaker").describe_training_job(TrainingJobName=job.job_name)
    except ClientError as problem:
        if error_code(problem) not in ("ValidationException", "ResourceNotFound"):
            yield warning("sagemaker-unchecked", sentence(problem, "looking up the job's name"))
    else:
        yield error(
            "job-name-taken",
            f"A training job named {job.job_name} exists already and names are never reused: leave "
            "--job-name away, or go on from it with --resume-from.",
        )


def _quota(job: JobSettings, account: AwsAccount) -> Iterator[Finding]:
    kind = "spot training job usage" if job.spot else "training job usage"
    wanted = f"{job.instance_type} for {kind}"
    warm = f"{job.instance_type} for training warm pool usage"
    try:
        pages = account.client("service-quotas").get_paginator("list_service_quotas")
        values = {
            quota["QuotaName"]: quota["Value"]
            for page in pages.paginate(ServiceCode="sagemaker")
            for quota in page["Quotas"]
        }
    except NO_ANSWER:
        yield warning(
            "quota-unchecked",
            f"Your quota '{wanted}' could not be read: allow yourself "
            "servicequotas:ListServiceQuotas to have it checked.",
        )
        return
    value = values.get(wanted)
    if job.keep_alive_minutes and values.get(warm, 0) < job.instance_count:
        yield error(
            "quota-warm-pool",
            f"Your quota '{warm}' in {account.region} is {values.get(warm, 0):g} and "
            f"--keep-alive-minutes needs {job.instance_count}: drop that option, or request an "
            "increase in Service Quotas > Amazon SageMaker.",
        )
    if value is None:
        yield warning(
            "quota-unknown",
            f"There is no quota named '{wanted}' in {account.region}: the type may not exist "
            "there; choose another --instance-type or --region.",
        )
    elif value < job.instance_count:
        yield error(
            "quota",
            f"Your quota '{wanted}' in {account.region} is {value:g} and the job needs "
            f"{job.instance_count}: request an increase in Service Quotas > Amazon SageMaker.",
        )


def _key(option: str, key: str, account: AwsAccount) -> Iterator[Finding]:
    try:
        metadata = account.client("kms").describe_key(KeyId=key)["KeyMetadata"]
    except ClientError as problem:
        if error_code(problem) == "NotFoundException":
            yield error(
                "key-unknown",
                f"{option} {key} does not exist in {account.region}: give the ARN or alias/NAME "
                "of a key there.",
            )
        else:
            yield warning("key-unchecked", sentence(problem, f"looking at {option}"))
        return
    if not metadata["Enabled"]:
        yield error("key-disabled", f"{option} {key} is disabled: enable it, or give another.")


def _network(job: JobSettings, account: AwsAccount) -> Iterator[Finding]:
    ec2 = account.client("ec2")
    try:
        subnets = ec2.describe_subnets(SubnetIds=list(job.subnets))["Subnets"]
        groups = ec2.describe_security_groups(GroupIds=list(job.security_group_ids))[
            "SecurityGroups"
        ]
    except ClientError as problem:
        if error_code(problem).endswith(".NotFound"):
            yield error(
                "network-unknown",
                f"{problem.response['Error']['Message'].rstrip('.')} in {account.region}: give "
                "--subnets and --security-group-ids of that region.",
            )
        else:
            yield warning("network-unchecked", sentence(problem, "looking at the VPC"))
        return
    networks = {item["VpcId"] for item in (*subnets, *groups)}
    if len(networks) > 1:
        yield error(
            "network-mixed",
            f"Subnets and security groups lie in {len(networks)} VPCs "
            f"({', '.join(sorted(networks))}): give those of one.",
        )
        return
    for subnet in subnets:
        if not _reaches_s3(ec2, subnet):
            yield error(
                "network-no-s3",
                f"Subnet {subnet['SubnetId']} has no way to S3 (neither a gateway endpoint nor a "
                f"NAT gateway), and the job would wait forever: add an S3 endpoint, as {STACK} "
                "does.",
            )


def _reaches_s3(ec2: Any, subnet: dict[str, Any]) -> bool:
    network = subnet["VpcId"]
    tables = ec2.describe_route_tables(Filters=[{"Name": "vpc-id", "Values": [network]}])[
        "RouteTables"
    ]
    own = [
        table
        for table in tables
        if any(a.get("SubnetId") == subnet["SubnetId"] for a in table["Associations"])
    ] or [table for table in tables if any(a.get("Main") for a in table["Associations"])]
    for table in own:
        if any(route.get("NatGatewayId") for route in table["Routes"]):
            return True
    endpoints = ec2.describe_vpc_endpoints(Filters=[{"Name": "vpc-id", "Values": [network]}])[
        "VpcEndpoints"
    ]
    ids = {table["RouteTableId"] for table in own}
    return any(
        endpoint["ServiceName"].endswith(".s3")
        and (
            endpoint.get("VpcEndpointType") == "Interface"
            or ids & set(endpoint.get("RouteTableIds", []))
        )
        for endpoint in endpoints
    )


def _mlflow_server(uri: str, account: AwsAccount) -> Iterator[Finding]:
    """Whether SageMaker's tracking server is there and awake; other servers are not asked."""
    server = MLFLOW_ARN.match(uri)
    if server is None or server["kind"] != "mlflow-tracking-server":
        return
    name = server["name"]
    try:
        answer = account.client("sagemaker", server["region"]).describe_mlflow_tracking_server(
            TrackingServerName=name
        )
    except ClientError as problem:
        if error_code(problem) in ("ResourceNotFound", "ValidationException"):
            yield error(
                "mlflow-unknown",
                f"There is no MLflow tracking server {name} in {server['region']}: check the ARN "
                "against `aws sagemaker list-mlflow-tracking-servers`.",
            )
        else:
            yield warning("mlflow-unchecked", sentence(problem, f"looking at MLflow server {name}"))
        return
    if answer.get("IsActive") == "Inactive":
        yield error(
            "mlflow-stopped",
            f"MLflow tracking server {name} is {answer.get('TrackingServerStatus', 'inactive')}: "
            f"run `aws sagemaker start-mlflow-tracking-server --tracking-server-name {name}`.",
        )
