"""May this account run the job: role and permissions, quota, the way to S3, MLflow's server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote

from ..storage.locations import split_s3_url
from .account import AwsAccount, error_code, sentence
from .checks import Finding, error, warning
from .image import ECR_URI
from .request import MLFLOW_ARN, JobSettings

STACK = "code/aws/stack.yaml"
LOG_GROUP = "/aws/sagemaker/TrainingJobs"
# what `trackers` asks of a SageMaker tracking server
MLFLOW_ACTIONS = tuple(
    f"sagemaker-mlflow:{action}"
    for action in (
        "CreateExperiment",
        "CreateRun",
        "GetExperimentByName",
        "GetMetricHistory",
        "GetRun",
        "LogBatch",
        "SetTag",
        "UpdateRun",
    )
)
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


def check_account(job: JobSettings, account: AwsAccount) -> Iterator[Finding]:
    """Findings about role, permissions, quota, VPC and MLflow server."""
    yield from _role(job, account)
    yield from _quota(job, account)
    if job.subnets:
        yield from _network(job, account)
    if job.mlflow_tracking_uri:
        yield from _mlflow_server(job.mlflow_tracking_uri, account)


def _role(job: JobSettings, account: AwsAccount) -> Iterator[Finding]:
    from botocore.exceptions import ClientError

    if job.role is None:
        yield error(
            "role-missing",
            f"The job has no execution role: give --role, set SAGEMAKER_ROLE_ARN, or create one "
            f"with {STACK} (README, step 1).",
        )
        return
    name = job.role.rsplit("/", 1)[-1]
    try:
        role = account.client("iam").get_role(RoleName=name)["Role"]
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
    if not trusts_sagemaker(role["AssumeRolePolicyDocument"]):
        yield error(
            "role-trust",
            f"Role {name} does not trust sagemaker.amazonaws.com, so SageMaker cannot use it: add "
            f"that principal to its trust policy (code/aws/trust_policy.json), or use {STACK}.",
        )
    yield from _permissions(job, account, role["Arn"])


def trusts_sagemaker(document: Any) -> bool:
    """Whether a statement of the trust policy lets SageMaker assume the role."""
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
    states = job.checkpoint_s3_uri or f"s3://{outputs.removeprefix('arn:aws:s3:::')}/checkpoints"
    states = f"arn:aws:s3:::{'/'.join(split_s3_url(states))}/state-00000001.pt"
    needs.append(Need(("s3:GetObject", "s3:PutObject"), states))
    if job.init_from_checkpoint:
        model = "/".join(split_s3_url(job.init_from_checkpoint))
        needs.append(Need(("s3:GetObject",), f"arn:aws:s3:::{model}"))
    if job.output_kms_key and job.output_kms_key.startswith("arn:"):
        needs.append(Need(("kms:GenerateDataKey",), job.output_kms_key))
    if job.subnets:
        needs.append(Need(("ec2:CreateNetworkInterface",), "*"))
    if job.debug_shell:
        needs.append(Need(SHELL_ACTIONS, "*"))
    server = MLFLOW_ARN.match(job.mlflow_tracking_uri or "")
    if server and server["kind"] == "mlflow-tracking-server":
        needs.append(Need(MLFLOW_ACTIONS, server[0]))
    return needs


def _permissions(job: JobSettings, account: AwsAccount, arn: str) -> Iterator[Finding]:
    from botocore.exceptions import ClientError

    name, owner = arn.rsplit("/", 1)[-1], arn.split(":")[4]
    for need in needed_permissions(job, account.region, owner):
        try:
            answer = account.client("iam").simulate_principal_policy(
                PolicySourceArn=arn,
                ActionNames=list(need.actions),
                ResourceArns=[need.resource],
                ContextEntries=[
                    {"ContextKeyName": key, "ContextKeyValues": [value], "ContextKeyType": "string"}
                    for key, value in need.context
                ],
            )
        except ClientError:
            yield warning(
                "permissions-unchecked",
                f"The permissions of role {name} could not be simulated: allow yourself "
                "iam:SimulatePrincipalPolicy (code/aws/launcher_policy.json) to have them checked.",
            )
            return
        for result in answer["EvaluationResults"]:
            action = result["EvalActionName"]
            if result["EvalDecision"] != "allowed":
                yield error(
                    "permission-denied",
                    f"Role {name} may not {action} on {need.resource}: {_remedy(action)}.",
                )


def _remedy(action: str) -> str:
    """What to type: some actions are allowed by a parameter of the stack."""
    parameter = {
        "ec2": "VpcId=YOUR-VPC",
        "kms": "KmsKeyArn=YOUR-KEY",
        "sagemaker-mlflow": "MlflowServerArn=YOUR-SERVER",
        "ssmmessages": "AllowShell=yes",
    }.get(action.split(":")[0])
    if parameter is None:
        return "add it as in code/aws/job_policy.json"
    return f"deploy {STACK} with {parameter} among the --parameter-overrides"


def _quota(job: JobSettings, account: AwsAccount) -> Iterator[Finding]:
    from botocore.exceptions import ClientError

    kind = "spot training job usage" if job.spot else "training job usage"
    wanted = [f"{job.instance_type} for {kind}"]
    if job.keep_alive_minutes:
        wanted.append(f"{job.instance_type} for training warm pool usage")
    try:
        pages = account.client("service-quotas").get_paginator("list_service_quotas")
        values = {
            quota["QuotaName"]: quota["Value"]
            for page in pages.paginate(ServiceCode="sagemaker")
            for quota in page["Quotas"]
        }
    except ClientError:
        yield warning(
            "quota-unchecked",
            f"Your quota '{wanted[0]}' could not be read: allow yourself "
            "servicequotas:ListServiceQuotas to have it checked.",
        )
        return
    for name in wanted:
        value = values.get(name, 0)
        if value < job.instance_count:
            yield error(
                "quota",
                f"Your quota '{name}' in {account.region} is {value:g} and the job needs "
                f"{job.instance_count}: request an increase in Service Quotas > Amazon SageMaker "
                "(it takes days), or choose another --instance-type.",
            )


def _network(job: JobSettings, account: AwsAccount) -> Iterator[Finding]:
    from botocore.exceptions import ClientError

    ec2 = account.client("ec2")
    try:
        subnets = ec2.describe_subnets(SubnetIds=list(job.subnets))["Subnets"]
        lost = [subnet["SubnetId"] for subnet in subnets if not _reaches_s3(ec2, subnet)]
    except ClientError as problem:
        yield warning("network-unchecked", sentence(problem, "looking at the VPC"))
        return
    for name in lost:
        yield error(
            "network-no-s3",
            f"Subnet {name} has no way to S3 (neither a gateway endpoint nor a NAT gateway), and "
            f"the job would wait forever: add an S3 endpoint, as {STACK} does.",
        )


def _reaches_s3(ec2: Any, subnet: dict[str, Any]) -> bool:
    here = [{"Name": "vpc-id", "Values": [subnet["VpcId"]]}]
    tables = ec2.describe_route_tables(Filters=here)["RouteTables"]
    own = [
        table
        for table in tables
        if any(a.get("SubnetId") == subnet["SubnetId"] for a in table["Associations"])
    ] or [table for table in tables if any(a.get("Main") for a in table["Associations"])]
    if any(route.get("NatGatewayId") for table in own for route in table["Routes"]):
        return True
    ids = {table["RouteTableId"] for table in own}
    return any(
        endpoint["ServiceName"].endswith(".s3")
        and (
            endpoint.get("VpcEndpointType") == "Interface"
            or ids & set(endpoint.get("RouteTableIds", []))
        )
        for endpoint in ec2.describe_vpc_endpoints(Filters=here)["VpcEndpoints"]
    )


def _mlflow_server(uri: str, account: AwsAccount) -> Iterator[Finding]:
    """Whether SageMaker's tracking server is there and awake; other servers are not asked."""
    from botocore.exceptions import ClientError

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
