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
from brain_to_text.launch.request import OUTPUT_PREFIX
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
    for statement in policy["Statement"]:
        actions = statement["Action"]
        for action in [actions] if isinstance(actions, str) else actions:
            assert re.fullmatch(r"[a-z0-9-]+:[A-Za-z]+", action), f"{action} is not one action"


# --- the launcher's policy ----------------------------------------------------------------------

REPOSITORY = f"arn:aws:ecr:{REGION}:{ACCOUNT}:repository/brain-to-text-training"
S3 = f"arn:aws:s3:::{BUCKET}"
DATA, OUTPUTS = f"{S3}/data/set/x", f"{S3}/{OUTPUT_PREFIX}/j/x"
PASSED = {"iam:passedtoservice": "sagemaker.amazonaws.com"}
PASSED["kms:viaservice"] = f"s3.{REGION}.amazonaws.com"
# What the guides' commands call beyond what test_launch.py and test_readme_on_aws.py call under
# this policy: the push, encryption, the log, evaluation.
MORE_CALLS = {
    REPOSITORY: "ecr:DescribeRepositories ecr:DescribeImages ecr:CreateRepository ecr:PutImage "
    "ecr:PutLifecyclePolicy ecr:InitiateLayerUpload ecr:UploadLayerPart ecr:CompleteLayerUpload "
    "ecr:BatchCheckLayerAvailability",
    "*": "ecr:GetAuthorizationToken servicequotas:RequestServiceQuotaIncrease",
    f"arn:aws:kms:{REGION}:{ACCOUNT}:key/1": "kms:DescribeKey kms:Decrypt",
    S3: "s3:ListBucket s3:GetEncryptionConfiguration",
    DATA: "s3:GetObject s3:PutObject",
    OUTPUTS: "s3:GetObject",
    f"arn:aws:logs:{REGION}:{ACCOUNT}:log-group:/aws/sagemaker/TrainingJobs:log-stream:": (
        "logs:FilterLogEvents logs:DescribeLogStreams"
    ),
}


def test_whoever_holds_the_launchers_policy_may_run_what_the_guides_show():
    policy = policy_document("launcher_policy.json")
    for resource, actions in MORE_CALLS.items():
        for action in actions.split():
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
