"""The account documents: linted, deployed to an emulation, and as narrow as they claim."""

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
from brain_to_text.launch.account_checks import _trusts_sagemaker, needed_permissions
from brain_to_text.launch.launch import STACK_ROLE
from brain_to_text.launch.request import CODE_FOLDER, OUTPUT_PREFIX, JobSettings
from moto import mock_aws
from moto.core import set_initial_no_auth_action_count
from support.aws_emulation import ACCOUNT, BUCKET, CREDENTIALS, REGION

pytestmark = pytest.mark.aws

DOCUMENTS = CODE_FOLDER / "aws"
STACK = DOCUMENTS / "stack.yaml"
POLICIES = sorted(DOCUMENTS.glob("*_policy.json"))


@pytest.fixture
def cloud(monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with mock_aws():
        yield boto3.Session(region_name=REGION)


def deploy(session, **parameters):
    session.client("cloudformation").create_stack(
        StackName="brain-to-text",
        TemplateBody=STACK.read_text(),
        Capabilities=["CAPABILITY_NAMED_IAM"],
        Parameters=[
            {"ParameterKey": key, "ParameterValue": value}
            for key, value in {"DataBucket": BUCKET, **parameters}.items()
        ],
    )


def job_policy_of(session):
    answer = session.client("iam").get_role_policy(RoleName=STACK_ROLE, PolicyName="training-job")
    document = answer["PolicyDocument"]
    # the emulation hands a stack's policy back as Python writes it, which YAML reads
    policy = yaml.safe_load(document) if isinstance(document, str) else document
    return {**policy, "Statement": [s for s in policy["Statement"] if isinstance(s, dict)]}


def test_the_template_passes_the_linter():
    lint = shutil.which("cfn-lint", path=str(Path(sys.executable).parent)) or "cfn-lint"
    done = subprocess.run([lint, str(STACK)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_stack_makes_a_role_that_sagemaker_may_use(cloud):
    deploy(cloud)
    role = cloud.client("iam").get_role(RoleName=STACK_ROLE)["Role"]
    assert _trusts_sagemaker(role["AssumeRolePolicyDocument"])
    repositories = cloud.client("ecr").describe_repositories()["repositories"]
    assert [r["repositoryName"] for r in repositories] == ["brain-to-text-training"]
    assert repositories[0]["imageTagMutability"] == "IMMUTABLE"


def test_the_stack_can_make_the_bucket_and_the_way_to_s3(cloud):
    ec2 = cloud.client("ec2")
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    table = ec2.describe_route_tables(Filters=[{"Name": "vpc-id", "Values": [vpc]}])
    deploy(
        cloud,
        CreateBucket="yes",
        VpcId=vpc,
        RouteTableIds=table["RouteTables"][0]["RouteTableId"],
    )
    cloud.client("s3").head_bucket(Bucket=BUCKET)
    (endpoint,) = ec2.describe_vpc_endpoints()["VpcEndpoints"]
    assert endpoint["ServiceName"] == "com.amazonaws.us-east-1.s3"
    assert any(
        "ec2:CreateNetworkInterface" in s["Action"] for s in statements(job_policy_of(cloud))
    )


def test_the_role_may_log_into_the_mlflow_server_that_is_named(cloud):
    server = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:mlflow-tracking-server/speech"
    deploy(cloud, MlflowServerArn=server)
    needed = needed_permissions(JobSettings(s3_bucket=BUCKET, mlflow_tracking_uri=server))
    asked = [pair for pair in needed if pair[0].startswith("sagemaker-mlflow:")]
    policy = job_policy_of(cloud)
    assert len(asked) == 8
    assert all(allowed(policy, action, resource) for action, resource in asked)


def statements(policy):
    found = policy["Statement"]
    return found if isinstance(found, list) else [found]


def test_policy_file_and_stack_say_the_same(cloud):
    deploy(cloud)
    text = (DOCUMENTS / "job_policy.json").read_text()
    for blank, value in (
        ("YOUR-BUCKET", BUCKET),
        ("YOUR-REGION", REGION),
        ("YOUR-ACCOUNT", ACCOUNT),
    ):
        text = text.replace(blank, value)
    assert statements(json.loads(text)) == statements(job_policy_of(cloud))


def allowed(policy, action, resource):
    """Whether a statement allows the action on the resource; conditions aside."""

    def matches(patterns, value):
        listed = [patterns] if isinstance(patterns, str) else patterns
        regexes = (re.escape(p).replace(r"\*", ".*") for p in listed)
        return any(re.fullmatch(regex, value) for regex in regexes)

    return any(
        matches(s["Action"], action) and matches(s["Resource"], resource)
        for s in statements(policy)
        if s["Effect"] == "Allow"
    )


def test_the_role_may_do_all_that_the_preflight_asks_for(cloud):
    deploy(cloud)
    job = JobSettings(
        s3_bucket=BUCKET,
        image_uri=f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/brain-to-text-training:1",
    )
    policy = job_policy_of(cloud)
    group = f"arn:aws:logs:{REGION}:{ACCOUNT}:log-group:/aws/sagemaker/TrainingJobs:log-stream:x"
    for action, resource in needed_permissions(job):
        place = group if action.startswith("logs:") else resource
        assert allowed(policy, action, place), (action, place)


def test_the_role_may_read_data_and_write_outputs_and_nothing_else(cloud):
    cloud.client("s3").create_bucket(Bucket=BUCKET)
    cloud.client("s3").put_object(Bucket=BUCKET, Key="data/set/x.hdf5", Body=b"x")
    cloud.client("s3").put_object(Bucket=BUCKET, Key="private/diary", Body=b"x")
    deploy(cloud)
    # the emulation enforces the policies of users, so one gets the role's
    iam = cloud.client("iam")
    iam.create_user(UserName="job")
    policy = json.dumps(job_policy_of(cloud))
    iam.put_user_policy(UserName="job", PolicyName="training-job", PolicyDocument=policy)
    key = iam.create_access_key(UserName="job")["AccessKey"]
    job = boto3.Session(key["AccessKeyId"], key["SecretAccessKey"], region_name=REGION).client("s3")

    @set_initial_no_auth_action_count(0)
    def as_the_job():
        job.get_object(Bucket=BUCKET, Key="data/set/x.hdf5")
        job.list_objects_v2(Bucket=BUCKET)
        job.put_object(Bucket=BUCKET, Key=f"{OUTPUT_PREFIX}/j/output/model.tar.gz", Body=b"m")
        job.put_object(Bucket=BUCKET, Key="data/set/trial_manifest.json.gz", Body=b"m")
        refused = [
            lambda: job.get_object(Bucket=BUCKET, Key="private/diary"),
            lambda: job.put_object(Bucket=BUCKET, Key="data/set/x.hdf5", Body=b"y"),
            lambda: job.delete_object(Bucket=BUCKET, Key="data/set/x.hdf5"),
        ]
        for attempt in refused:
            with pytest.raises(ClientError, match="AccessDenied"):
                attempt()

    as_the_job()


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


def test_the_template_names_what_the_launcher_and_the_push_expect():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda *_: None)
    parameters = yaml.load(STACK.read_text(), Loader)["Parameters"]
    assert parameters["RoleName"]["Default"] == STACK_ROLE
    assert parameters["OutputPrefix"]["Default"] == OUTPUT_PREFIX
