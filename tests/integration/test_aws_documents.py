"""The account documents: linted, deployed, and held against what every command calls."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError
from brain_to_text.launch.request import CODE_FOLDER, OUTPUT_PREFIX
from brain_to_text.launch.submit import STACK_ROLE
from support.aws_emulation import (
    ACCOUNT,
    BUCKET,
    DOCUMENTS,
    REGION,
    ROLE,
    deploy_stack,
    emulated_aws,
    make_key,
    policy_document,
)
from support.policies import evaluate

pytestmark = pytest.mark.aws

STACK = DOCUMENTS / "stack.yaml"
POLICIES = sorted(DOCUMENTS.glob("*_policy.json"))
GUIDES = (CODE_FOLDER.parent / "README.md", *sorted(CODE_FOLDER.glob("*.md")))


@pytest.fixture
def aws(monkeypatch):
    with emulated_aws(monkeypatch) as emulated:
        yield emulated


def test_the_template_passes_the_linter():
    lint = shutil.which("cfn-lint", path=str(Path(sys.executable).parent)) or "cfn-lint"
    done = subprocess.run([lint, str(STACK)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_stack_makes_a_role_that_sagemaker_may_use(aws):
    deploy_stack(aws)
    role = aws.client("iam").get_role(RoleName=STACK_ROLE)["Role"]
    trust = str(role["AssumeRolePolicyDocument"])
    assert "'Service': 'sagemaker.amazonaws.com'" in trust
    assert f"'aws:SourceAccount': '{ACCOUNT}'" in trust
    repositories = aws.client("ecr").describe_repositories()["repositories"]
    assert [r["repositoryName"] for r in repositories] == ["brain-to-text-training"]
    assert repositories[0]["imageTagMutability"] == "IMMUTABLE"


def test_the_stack_can_make_the_bucket_and_the_way_to_s3(aws):
    ec2 = aws.client("ec2")
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    table = ec2.describe_route_tables(Filters=[{"Name": "vpc-id", "Values": [vpc]}])
    route = table["RouteTables"][0]["RouteTableId"]
    key = make_key(aws)
    given = {"CreateBucket": "yes", "KmsKeyArn": key}
    deploy_stack(aws, VpcId=vpc, RouteTableIds=route, **given)
    (rule,) = aws.client("s3").get_bucket_encryption(Bucket=BUCKET)[
        "ServerSideEncryptionConfiguration"
    ]["Rules"]
    assert rule["ApplyServerSideEncryptionByDefault"]["KMSMasterKeyID"] == key
    (endpoint,) = ec2.describe_vpc_endpoints()["VpcEndpoints"]
    assert endpoint["ServiceName"] == "com.amazonaws.us-east-1.s3"
    through = [yaml.safe_load(str(endpoint["PolicyDocument"]))]
    for action, resource, decision in (
        ("s3:PutObject", OUTPUTS, "allowed"),
        ("s3:ListBucket", S3, "allowed"),
        ("s3:PutObject", "arn:aws:s3:::elsewhere/x", "implicitDeny"),
        ("s3:DeleteObject", OUTPUTS, "implicitDeny"),
    ):
        assert evaluate(through, action, resource) == decision, (action, resource)
    assert evaluate(aws.policies_of(ROLE), "ec2:CreateNetworkInterface", "*") == "allowed"


def test_policy_file_and_stack_say_the_same(aws):
    deploy_stack(aws)
    (document,) = aws.policies_of(ROLE)
    assert document["Statement"] == policy_document("job_policy.json")["Statement"]


def test_the_role_may_read_data_and_write_outputs_and_nothing_else(aws):
    s3 = aws.client("s3")
    s3.create_bucket(Bucket=BUCKET)
    for key in ("data/set/x.hdf5", "private/diary", f"{OUTPUT_PREFIX}/j/output/model.tar.gz"):
        s3.put_object(Bucket=BUCKET, Key=key, Body=b"x")
    iam = aws.client("iam")
    iam.create_user(UserName="job")
    policy = json.dumps(policy_document("job_policy.json"))
    iam.put_user_policy(UserName="job", PolicyName="training-job", PolicyDocument=policy)
    key = iam.create_access_key(UserName="job")["AccessKey"]
    job = boto3.Session(key["AccessKeyId"], key["SecretAccessKey"], region_name=REGION).client("s3")
    job.get_object(Bucket=BUCKET, Key="data/set/x.hdf5")
    for prefix in ("data/set/", f"{OUTPUT_PREFIX}/j/checkpoints/"):
        job.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
    job.put_object(Bucket=BUCKET, Key=f"{OUTPUT_PREFIX}/j/output/model.tar.gz", Body=b"m")
    job.put_object(Bucket=BUCKET, Key="data/set/trial_manifest.json.gz", Body=b"m")
    for attempt in (
        lambda: job.get_object(Bucket=BUCKET, Key="private/diary"),
        lambda: job.list_objects_v2(Bucket=BUCKET),
        lambda: job.list_objects_v2(Bucket=BUCKET, Prefix="private/"),
        lambda: job.put_object(Bucket=BUCKET, Key="data/set/x.hdf5", Body=b"y"),
        lambda: job.delete_object(Bucket=BUCKET, Key="data/set/x.hdf5"),
        lambda: job.delete_object(Bucket=BUCKET, Key=f"{OUTPUT_PREFIX}/j/output/model.tar.gz"),
    ):
        with pytest.raises(ClientError, match="AccessDenied"):
            attempt()


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
def test_policies_are_well_formed_and_narrow(path):
    policy = json.loads(path.read_text())
    assert policy["Version"] == "2012-10-17"
    sids = [s["Sid"] for s in policy["Statement"] if "Sid" in s]
    assert len(sids) == len(set(sids))
    for statement in policy["Statement"]:
        actions = statement["Action"]
        for action in [actions] if isinstance(actions, str) else actions:
            assert re.fullmatch(r"[a-z0-9-]+:[A-Za-z]+", action), f"{action} is not one action"


# --- every command that the guides show ---------------------------------------------------------

JOB = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:training-job/b2t-1"
LOGS = f"arn:aws:logs:{REGION}:{ACCOUNT}:log-group:/aws/sagemaker/TrainingJobs:log-stream:"
REPOSITORY = f"arn:aws:ecr:{REGION}:{ACCOUNT}:repository/brain-to-text-training"
DATA, OUTPUTS = f"arn:aws:s3:::{BUCKET}/data/set/x", f"arn:aws:s3:::{BUCKET}/{OUTPUT_PREFIX}/j/x"
KEY = f"arn:aws:kms:{REGION}:{ACCOUNT}:key/1"
S3 = f"arn:aws:s3:::{BUCKET}"
PASSED = {"iam:passedtoservice": "sagemaker.amazonaws.com"}
PASSED["kms:viaservice"] = f"s3.{REGION}.amazonaws.com"
# Done by whoever owns the account, or asking AWS nothing.
ADMINISTRATORS = ("aws cloudformation", "aws iam", "aws configure", "aws sso", "aws ssm")
CALLS = {
    "aws service-quotas list-service-quotas": [("servicequotas:ListServiceQuotas", "*")],
    "aws service-quotas request-service-quota-increase": [
        ("servicequotas:RequestServiceQuotaIncrease", "*")
    ],
    "aws s3 ls": [("s3:ListBucket", S3)],
    "aws s3 sync": [
        ("s3:ListBucket", S3),
        ("s3:PutObject", DATA),
        ("s3:GetObject", OUTPUTS),
    ],
    "aws logs tail": [("logs:FilterLogEvents", LOGS)],
    "./build_and_push.sh": [
        *((f"ecr:{action}", REPOSITORY) for action in ("DescribeRepositories", "DescribeImages")),
        *((f"ecr:{action}", REPOSITORY) for action in ("CreateRepository", "PutLifecyclePolicy")),
        *((f"ecr:{action}", REPOSITORY) for action in ("InitiateLayerUpload", "UploadLayerPart")),
        *((f"ecr:{action}", REPOSITORY) for action in ("CompleteLayerUpload", "PutImage")),
        ("ecr:BatchCheckLayerAvailability", REPOSITORY),
        ("ecr:GetAuthorizationToken", "*"),
    ],
    "prepare_dataset.py": [
        ("s3:ListBucket", S3),
        ("s3:GetObject", DATA),
        ("s3:PutObject", f"{S3}/data/set/trial_manifest.json.gz"),
    ],
    "evaluate_model.py": [("s3:ListBucket", S3), ("s3:GetObject", DATA), ("s3:GetObject", OUTPUTS)],
    "train_model_sagemaker.py": [("s3:ListBucket", S3), ("s3:GetObject", DATA)],
    "launch_sagemaker_job.py": [
        ("sagemaker:CreateTrainingJob", JOB),
        ("sagemaker:AddTags", JOB),
        ("sagemaker:DescribeTrainingJob", JOB),
        ("sagemaker:StopTrainingJob", JOB),
        ("sagemaker:UpdateTrainingJob", JOB),
        ("sagemaker:Search", "*"),
        ("iam:PassRole", ROLE),
        ("iam:GetRole", ROLE),
        ("iam:SimulatePrincipalPolicy", ROLE),
        ("ecr:BatchGetImage", REPOSITORY),
        ("ecr:GetDownloadUrlForLayer", REPOSITORY),
        ("servicequotas:ListServiceQuotas", "*"),
        ("pricing:GetProducts", "*"),
        ("logs:DescribeLogStreams", LOGS),
        ("logs:GetLogEvents", f"{LOGS}b2t-1/algo-1-1700000000"),
        ("s3:ListBucket", S3),
        ("s3:GetEncryptionConfiguration", S3),
        ("s3:GetObject", DATA),
        ("s3:GetObject", OUTPUTS),
        ("kms:DescribeKey", KEY),
        ("kms:Decrypt", KEY),
    ],
}


def commands():
    """(guide, command) of every AWS command and every program of ours in the guides."""
    for guide in GUIDES:
        text = re.sub(r"\\\n\s*", " ", guide.read_text(encoding="utf-8"))
        pattern = (
            r"(?:\baws [a-z0-9-]+(?: [a-z][a-z0-9-]+)?|\./build_and_push\.sh|\b\w+\.py)(?=[\s`])"
        )
        for command in sorted(set(re.findall(pattern, text))):
            yield guide.name, command


@pytest.mark.parametrize("guide, command", list(commands()))
def test_whoever_holds_the_launchers_policy_may_run_what_the_guides_show(guide, command):
    ours = (CODE_FOLDER / command).exists() or command.endswith(".sh")
    if command.startswith(ADMINISTRATORS) or not (ours or command.startswith("aws ")):
        return
    known = [calls for start, calls in CALLS.items() if command.startswith(start)]
    assert known, f"{guide} shows `{command}`: add what it calls to CALLS"
    policy = policy_document("launcher_policy.json")
    for action, resource in known[0]:
        assert evaluate([policy], action, resource, PASSED) == "allowed", (action, resource)


def test_the_launchers_policy_holds_for_this_project_only():
    policy = policy_document("launcher_policy.json")
    for action, resource in (
        ("iam:PassRole", ROLE.replace("brain-to-text", "administrator")),
        ("s3:PutObject", f"{S3}/private/diary"),
        ("s3:DeleteObject", DATA),
        ("ecr:PutImage", REPOSITORY.replace("brain", "other")),
        ("sagemaker:CreateEndpoint", "*"),
    ):
        assert evaluate([policy], action, resource, PASSED) == "implicitDeny", action
    assert evaluate([policy], "iam:PassRole", ROLE, {}) == "implicitDeny"
    elsewhere = {"iam:passedtoservice": "ec2.amazonaws.com"}
    assert evaluate([policy], "iam:PassRole", ROLE, elsewhere) == "implicitDeny"
