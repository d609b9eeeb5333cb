"""What the job's role may do with keys and in other partitions, decided by evaluated policies."""

import pytest
from botocore.exceptions import ClientError
from brain_to_text.errors import JobError
from brain_to_text.launch.account import sentence
from brain_to_text.launch.account_checks import check_role
from brain_to_text.launch.request import JobSettings
from support.aws_emulation import (
    ACCOUNT,
    BUCKET,
    PREFIX,
    REPOSITORY,
    ROLE,
    deploy_stack,
    emulated_aws,
    launcher_policy,
    log_in,
    make_key,
    put_dataset,
)

pytestmark = pytest.mark.aws


def findings(aws, **settings):
    known = {"s3_bucket": BUCKET, "role": aws.role, "job_name": "b2t-1"}
    return [finding.reason for finding in check_role(JobSettings(**known, **settings), aws.account)]


@pytest.fixture
def aws(monkeypatch):
    with emulated_aws(monkeypatch) as emulated:
        emulated.client("s3").create_bucket(Bucket=BUCKET)
        put_dataset(emulated)
        yield emulated


def encrypted(aws, name, key):
    s3 = aws.client("s3")
    content = s3.get_object(Bucket=BUCKET, Key=f"{PREFIX}/{name}")["Body"].read()
    how = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": key}
    s3.put_object(Bucket=BUCKET, Key=f"{PREFIX}/{name}", Body=content, **how)


def encrypt_bucket(aws, key):
    rule = {
        "ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": key}
    }
    aws.client("s3").put_bucket_encryption(
        Bucket=BUCKET, ServerSideEncryptionConfiguration={"Rules": [rule]}
    )


DATA_KEY = ["kms:Decrypt"]
USES = {
    "a file": (DATA_KEY, lambda aws, key: encrypted(aws, "t15.2023.08.11/data_val.hdf5", key)),
    "the manifest": (DATA_KEY, lambda aws, key: encrypted(aws, "trial_manifest.json.gz", key)),
    "the bucket": (["kms:Decrypt", "kms:GenerateDataKey"], encrypt_bucket),
    "outputs": (
        ["kms:Decrypt", "kms:Encrypt", "kms:GenerateDataKey"],
        lambda aws, key: {"output_kms_key": key},
    ),
    "the volume": (["kms:CreateGrant"], lambda aws, key: {"volume_kms_key": key}),
}


@pytest.mark.parametrize("use", USES)
def test_every_key_of_the_job_is_asked_about_and_the_stack_grants_it(aws, use):
    actions, apply = USES[use]
    key = make_key(aws)
    settings = apply(aws, key) or {}
    deploy_stack(aws)
    denied = findings(aws, **settings)
    assert [reason.split(" may not ")[1].split(" on ")[0] for reason in denied] == actions
    assert all(f"on {key}: deploy" in reason and f"KmsKeyArn={key}" in reason for reason in denied)
    aws.client("cloudformation").delete_stack(StackName="brain-to-text")
    deploy_stack(aws, KmsKeyArn=f"{make_key(aws)},{key}", CreateRepository="no")
    assert findings(aws, **settings) == []


def test_a_key_is_found_by_id_and_alias_even_where_it_may_not_be_looked_up(aws, monkeypatch):
    key, secluded = make_key(aws), make_key(aws, {"Statement": []})  # whose policy lets in nobody
    aws.client("kms").create_alias(AliasName="alias/mine", TargetKeyId=key)
    deploy_stack(aws)
    for name in (key.rpartition("/")[2], "alias/mine"):
        assert all(f" on {key}: " in reason for reason in findings(aws, output_kms_key=name))
    with pytest.raises(JobError, match="looking up the KMS key alias/none"):
        findings(aws, output_kms_key="alias/none")
    log_in(aws, monkeypatch, launcher_policy(without="kms:DescribeKey"))
    for name in (secluded, secluded.rpartition("/")[2]):
        denied = findings(aws, output_kms_key=name)
        assert any(f"kms:Decrypt on {secluded}" in reason for reason in denied)
    with pytest.raises(ClientError, match="kms:DescribeKey"):
        findings(aws, output_kms_key="alias/mine")


def test_a_key_of_awss_own_needs_no_right(aws, monkeypatch):
    key = make_key(aws)
    encrypt_bucket(aws, key)
    deploy_stack(aws)
    kms = aws.account.client("kms")
    managed = {"KeyMetadata": {**kms.describe_key(KeyId=key)["KeyMetadata"], "KeyManager": "AWS"}}
    monkeypatch.setattr(kms, "describe_key", lambda KeyId: managed)
    assert findings(aws) == []


def test_reading_an_encrypted_object_takes_the_key_and_the_bucket(aws, monkeypatch):
    """The emulated account itself: identity policy and key policy decide together, as in KMS."""
    root = {
        "Effect": "Allow",
        "Principal": {"AWS": f"arn:aws:iam::{ACCOUNT}:root"},
        "Action": "kms:*",
    }
    user = {**root, "Principal": {"AWS": f"arn:aws:iam::{ACCOUNT}:user/researcher"}}
    name = f"{PREFIX}/trial_manifest.json.gz"
    for statements, without, allowed in (
        ([root], "nothing", True),
        ([root], "kms:Decrypt", False),
        ([user], "kms:Decrypt", True),
        ([], "nothing", False),
        ([root, {**user, "Effect": "Deny"}], "nothing", False),
    ):
        encrypted(aws, "trial_manifest.json.gz", make_key(aws, {"Statement": statements}))
        log_in(aws, monkeypatch, launcher_policy(without=without))
        if allowed:
            aws.account.client("s3").get_object(Bucket=BUCKET, Key=name)
        else:
            with pytest.raises(ClientError, match="kms:Decrypt") as refused:
                aws.account.client("s3").get_object(Bucket=BUCKET, Key=name)
            assert "allow kms:Decrypt on arn:aws:kms:" in sentence(refused.value, "reading")


@pytest.mark.parametrize("region", ["us-gov-west-1", "cn-north-1"])
def test_the_stacks_own_role_is_enough_in_every_partition(monkeypatch, region):
    with emulated_aws(monkeypatch, region) as aws:
        aws.client("s3").create_bucket(
            Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": region}
        )
        deploy_stack(aws)
        assert aws.role.split(":")[1] != ROLE.split(":")[1]
        suffix = "amazonaws.com" + ".cn" * region.startswith("cn-")
        image = f"{ACCOUNT}.dkr.ecr.{region}.{suffix}/{REPOSITORY}:1"
        assert findings(aws, image_uri=image, init_from_checkpoint=f"s3://{BUCKET}/data/best") == []
        said = findings(aws, init_from_checkpoint="s3://other/best", resume_from="b2t-0")
        assert len(said) == 1 and f"arn:{aws.partition}:s3:::other/best" in said[0]
