"""May this account run the job: what its role is allowed, on data and keys, and the quota.

IAM's simulator answers from the role's policies and the organisation's; it does not see the policy
of a key or of a bucket.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from botocore.exceptions import ClientError

from ..errors import Finding, JobError, error
from ..storage.locations import DATA_FILE, MANIFEST_NAME
from .account import AwsAccount, error_code, sentence
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
    if job.role is None:
        yield error(
            "role-missing",
            f"The job has no execution role: give --role, set SAGEMAKER_ROLE_ARN, or create one "
            f"with {STACK} (README, step 1).",
        )
        return
    try:
        for need in chain(needed_permissions(job, account.region), needed_keys(job, account)):
            yield from _denied(job.role, need, account)
    except ClientError as problem:
        if error_code(problem) != "NoSuchEntity":
            raise
        _, owner = _partition_and_owner(job)
        yield error(
            "role-unknown",
            f"Role {job.role.rsplit('/', 1)[-1]} does not exist in account {owner}: give --role "
            f"ARN, or create one with {STACK} (README, step 1).",
        )


def _denied(role: str, need: Need, account: AwsAccount) -> Iterator[Finding]:
    """One error for each action that the role is not allowed."""
    answer = account.client("iam").simulate_principal_policy(
        PolicySourceArn=role,
        ActionNames=list(need.actions),
        ResourceArns=[need.resource],
        ContextEntries=[
            {"ContextKeyName": key, "ContextKeyValues": [value], "ContextKeyType": "string"}
            for key, value in need.context
        ],
    )
    for result in answer["EvaluationResults"]:
        action = result["EvalActionName"]
        if result["EvalDecision"] != "allowed":
            yield error(
                "permission-denied",
                f"Role {role.rsplit('/', 1)[-1]} may not {action} on {need.resource}: "
                f"{_remedy(action, need.resource)}.",
            )


def needed_permissions(job: JobSettings, region: str) -> list[Need]:
    """What the job's role must be allowed in a region, keys left out."""
    partition, owner = _partition_and_owner(job)

    def of_s3(url: str) -> str:
        return url.replace("s3://", f"arn:{partition}:s3:::", 1)

    data, outputs = job.s3_data_prefix.strip("/"), job.output_prefix.strip("/")
    bucket = of_s3(f"s3://{job.s3_bucket}")
    group = f"arn:{partition}:logs:{region}:{owner}:log-group:{LOG_GROUP}:log-stream:"
    metrics = (("cloudwatch:namespace", LOG_GROUP),)
    needs = [
        Need(("s3:ListBucket",), bucket, (("s3:prefix", f"{data}/"),)),
        Need(("s3:ListBucket",), bucket, (("s3:prefix", f"{outputs}/{job.job_name}/"),)),
        Need(("s3:GetObject",), f"{bucket}/{data}/SESSION/data_train.hdf5"),
        Need(("s3:PutObject",), f"{bucket}/{outputs}/{job.job_name}/output/model.tar.gz"),
        Need(("ecr:GetAuthorizationToken",), "*"),
        Need(("logs:CreateLogGroup", "logs:DescribeLogStreams"), group),
        Need(("logs:CreateLogStream", "logs:PutLogEvents"), f"{group}{job.job_name}/algo-1"),
        Need(("cloudwatch:PutMetricData",), "*", metrics),
    ]
    image = ECR_URI.fullmatch(job.image_uri or "")
    if image:
        repository = f"{image['region']}:{image['account']}:repository/{image['repository']}"
        actions = ("BatchCheckLayerAvailability", "BatchGetImage", "GetDownloadUrlForLayer")
        needs.append(Need(tuple(f"ecr:{a}" for a in actions), f"arn:{partition}:ecr:{repository}"))
    states = job.checkpoints_of(job.resume_from or str(job.job_name))
    needs.append(Need(("s3:GetObject", "s3:PutObject"), f"{of_s3(states)}/STATE"))
    if job.init_from_checkpoint:
        needs.append(Need(("s3:GetObject",), of_s3(job.init_from_checkpoint)))
    if job.subnets:
        needs.append(Need(("ec2:CreateNetworkInterface",), "*"))
    if job.debug_shell:
        needs.append(Need(SHELL_ACTIONS, "*"))
    return needs


def needed_keys(job: JobSettings, account: AwsAccount) -> Iterator[Need]:
    """What the role must be allowed on the KMS keys of the volume, the outputs, data and bucket.

    Raises:
        ClientError: you may not look at the bucket's encryption.
        JobError: there is no such key.
    """
    if job.volume_kms_key and (key := _customers_key(job.volume_kms_key, account, job)):
        yield Need(("kms:CreateGrant",), key, (("kms:GrantIsForAWSResource", "true"),))
    actions: dict[str, set[str]] = {}
    for used, rights in _keys_through_s3(job, account):
        if key := _customers_key(used, account, job):
            actions.setdefault(key, set()).update(f"kms:{right}" for right in rights)
    through = (("kms:ViaService", f"s3.{account.region}.{account.dns_suffix}"),)
    for key, wanted in actions.items():
        yield Need(tuple(sorted(wanted)), key, through)


def _keys_through_s3(
    job: JobSettings, account: AwsAccount
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(key, what S3 does with it) of outputs, manifest, one file per split, and bucket."""
    if job.output_kms_key:
        yield job.output_kms_key, ("Decrypt", "Encrypt", "GenerateDataKey")
    s3, prefix, seen = account.client("s3"), f"{job.s3_data_prefix.strip('/')}/", set()
    try:
        for entry in account.objects(job.s3_bucket, prefix):
            name = entry["Key"].removeprefix(prefix)
            match = DATA_FILE.fullmatch(name)
            kind = match["split"] if match else name
            if kind in seen or not (match or name == MANIFEST_NAME):
                continue
            seen.add(kind)
            if key := s3.head_object(Bucket=job.s3_bucket, Key=entry["Key"]).get("SSEKMSKeyId"):
                yield key, ("Decrypt",)
    except ClientError:
        return  # the check of the data meets the same refusal, and reports it
    try:
        answer = s3.get_bucket_encryption(Bucket=job.s3_bucket)
    except ClientError as problem:
        if error_code(problem) == "ServerSideEncryptionConfigurationNotFoundError":
            return
        raise
    for rule in answer["ServerSideEncryptionConfiguration"]["Rules"]:
        if key := rule.get("ApplyServerSideEncryptionByDefault", {}).get("KMSMasterKeyID"):
            yield key, ("Decrypt", "GenerateDataKey")


def _customers_key(key: str, account: AwsAccount, job: JobSettings) -> str | None:
    """ARN of a key given by ARN, id or alias; None for AWS's own `aws/s3`, which needs no right."""
    try:
        about = account.client("kms").describe_key(KeyId=key)["KeyMetadata"]
    except ClientError as problem:
        if error_code(problem) == "NotFoundException":
            raise JobError(sentence(problem, f"looking up the KMS key {key}")) from problem
        if "alias/" in key:
            raise
        if key.startswith("arn:"):
            return key
        partition, owner = _partition_and_owner(job)
        return f"arn:{partition}:kms:{account.region}:{owner}:key/{key}"
    return None if about.get("KeyManager") == "AWS" else str(about["Arn"])


def _partition_and_owner(job: JobSettings) -> tuple[str, str]:
    """Of the role: aws, aws-us-gov or aws-cn, which every ARN that we ask about carries too."""
    _, partition, _, _, owner, *_ = str(job.role).split(":")
    return partition, owner


def _remedy(action: str, resource: str) -> str:
    """What to type: some actions are allowed by a parameter of the stack."""
    parameter = {
        "ec2": "VpcId=YOUR-VPC",
        "kms": f"KmsKeyArn={resource} (several: joined by commas)",
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
