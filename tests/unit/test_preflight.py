"""Every way a job can be doomed before it starts, provoked one at a time."""

import json

import pytest
from botocore.parsers import ResponseParserError
from brain_to_text.errors import JobError
from brain_to_text.launch.preflight import preflight
from brain_to_text.launch.request import JobSettings
from support.aws_emulation import (
    BUCKET,
    PREFIX,
    REPOSITORY,
    ROLE,
    emulated_aws,
    put_dataset,
    put_image,
    put_labelled_image,
    ready_to_train,
)

SERVER = "arn:aws:sagemaker:us-east-1:123456789012:mlflow-tracking-server/speech"

pytestmark = pytest.mark.aws


@pytest.fixture
def aws(monkeypatch):
    with emulated_aws(monkeypatch) as emulated:
        ready_to_train(emulated)
        yield emulated


def findings(aws, **settings):
    given = {
        "s3_bucket": BUCKET,
        "role": ROLE,
        "image_uri": aws.image_uri,
        "job_name": "b2t-1",
        **settings,
    }
    report = preflight(JobSettings(**given), aws.account)
    assert all("\n" not in finding.text for finding in report.findings)
    return report


def names(report, severity="error"):
    return [finding.name for finding in report.of(severity)]


def test_a_job_that_is_ready_has_no_findings(aws):
    report = findings(aws)
    assert report.lines()[-1] == "Checked: 0 errors, 0 warnings"
    assert report.findings == ()
    assert "AWS Price List, us-east-1" in "\n".join(report.lines())


# --- settings against the machine


@pytest.mark.parametrize(
    "name, severity, settings, said",
    [
        ("config", "error", {"overrides": {"model.n_unit": "3"}}, "model.n_units"),
        ("instance-unknown", "warning", {"instance_type": "ml.g5.3xlarge"}, "did you mean ml.g5."),
        ("instance-cpu", "warning", {"instance_type": "ml.m5.xlarge"}, "ml.g5.2xlarge"),
        ("gpu-too-old", "error", {"instance_type": "ml.p3.2xlarge"}, "V100"),
        ("gpu-memory", "error", {"batch_size": 512}, "--batch-size"),
        ("gpu-memory-tight", "warning", {"batch_size": 210}, "--batch-size 105"),
        ("max-run", "error", {"max_run_hours": 2.0}, "--max-run-hours"),
        ("max-run-tight", "warning", {"max_run_hours": 8.0}, "--max-run-hours"),
        ("max-run-quota", "warning", {"max_run_hours": 200.0}, "120 h"),
        ("volume-key", "error", {"volume_kms_key": "alias/aws/ebs"}, "--volume-kms-key"),
        ("volume-too-large", "error", {"volume_gb": 500}, "450"),
    ],
)
def test_settings_that_do_not_fit_the_machine(aws, name, severity, settings, said):
    report = findings(aws, **settings)
    matching = [finding for finding in report.of(severity) if finding.name == name]
    assert len(matching) == 1 and said in matching[0].text


def test_the_batch_size_that_is_suggested_fits(aws):
    text = findings(aws, batch_size=512).of("error")[0].text
    suggested = int(text.split("--batch-size ")[1].rstrip("."))
    assert names(findings(aws, batch_size=suggested)) == []


def test_a_local_job_needs_data_and_no_account(aws):
    aws.refused.add("iam")
    local = {"instance_type": "local_gpu", "role": None, "image_uri": "image:1"}
    assert findings(aws, **local).findings == ()
    assert names(findings(aws, **local, s3_data_prefix="nowhere")) == ["data-missing"]


# --- who runs it


def test_no_credentials(aws, monkeypatch):
    def refuse(**_):
        raise JobError("No AWS credentials were found while asking AWS who you are: run ...")

    monkeypatch.setattr(
        type(aws.account), "identity", property(lambda self: refuse()), raising=False
    )
    assert names(findings(aws)) == ["credentials"]


def test_no_role(aws):
    assert names(findings(aws, role=None)) == ["role-missing"]


def test_unknown_role(aws):
    assert names(findings(aws, role=ROLE + "-x")) == ["role-unknown"]


def test_role_of_another_account(aws):
    role = ROLE.replace("123456789012", "210987654321")
    assert names(findings(aws, role=role)) == ["role-account"]


def test_role_that_does_not_trust_sagemaker(aws):
    trust = {
        "Version": "2012-10-17",
        "Statement": {
            "Effect": "Allow",
            "Principal": {"Service": "ec2.amazonaws.com"},
            "Action": "sts:AssumeRole",
        },
    }
    aws.client("iam").create_role(RoleName="other", AssumeRolePolicyDocument=json.dumps(trust))
    assert names(findings(aws, role=ROLE.rsplit("/", 1)[0] + "/other")) == ["role-trust"]


@pytest.mark.parametrize(
    "action, resource",
    [
        ("s3:ListBucket", f"arn:aws:s3:::{BUCKET}."),
        ("s3:PutObject", f"arn:aws:s3:::{BUCKET}/sagemaker-outputs/*"),
        ("ecr:BatchGetImage", f"repository/{REPOSITORY}"),
        ("logs:PutLogEvents", "*"),
    ],
)
def test_role_without_a_permission(aws, action, resource):
    aws.denied.add(action)
    errors = findings(aws).of("error")
    assert [finding.name for finding in errors] == ["permission-denied"]
    assert action in errors[0].text and resource.rstrip(".") in errors[0].text


def test_user_who_may_not_pass_the_role(aws):
    aws.denied.add("iam:PassRole")
    assert names(findings(aws)) == ["pass-role"]


def test_user_who_may_not_start_such_jobs(aws):
    aws.denied.add("sagemaker:CreateTrainingJob")
    report = findings(aws)
    assert names(report) == ["launch-denied"]
    assert "ml.g5.2xlarge in us-east-1" in report.of("error")[0].text


def test_organisation_that_demands_network_isolation(aws):
    aws.isolation_demanded = True
    assert names(findings(aws)) == ["network-isolation"]


@pytest.mark.parametrize(
    "settings, action, place",
    [
        ({"checkpoint_s3_uri": "s3://other/states"}, "s3:PutObject", "other/states/*"),
        ({"subnets": ("s",), "security_group_ids": ("g",)}, "ec2:CreateNetworkInterface", "*"),
        ({"mlflow_tracking_uri": SERVER}, "sagemaker-mlflow:LogBatch", "speech"),
    ],
)
def test_role_without_what_a_setting_needs(aws, settings, action, place):
    aws.denied.add(action)
    texts = [f.text for f in findings(aws, **settings).of("error") if f.name == "permission-denied"]
    assert any(action in text and place in text for text in texts)


def test_role_that_may_not_read_the_model_to_start_from(aws):
    aws.denied.add("s3:GetObject")
    uri = f"s3://{BUCKET}/models/best_checkpoint"
    aws.client("s3").put_object(Bucket=BUCKET, Key="models/best_checkpoint", Body=b"w")
    texts = [finding.text for finding in findings(aws, init_from_checkpoint=uri).of("error")]
    assert any("models/best_checkpoint" in text for text in texts)


def test_permissions_that_cannot_be_simulated(aws):
    aws.refused.add("iam")
    assert names(findings(aws), "warning") == ["permissions-unchecked"]


def test_quota_too_small(aws):
    report = findings(aws, instance_count=3, batch_size=48)
    assert names(report) == ["quota"]
    assert "is 2 and the job needs 3" in report.of("error")[0].text


def test_spot_has_a_quota_of_its_own(aws):
    aws.quotas["ml.g5.2xlarge for spot training job usage"] = 0
    assert names(findings(aws)) == []
    assert names(findings(aws, spot=True)) == ["quota"]


def test_warm_pools_have_a_quota_of_their_own(aws):
    report = findings(aws, keep_alive_minutes=10)
    assert names(report) == ["quota-warm-pool"]
    aws.quotas["ml.g5.2xlarge for training warm pool usage"] = 1
    assert names(findings(aws, keep_alive_minutes=10)) == []


def test_quota_that_does_not_exist(aws):
    assert names(findings(aws, instance_type="ml.g6.2xlarge"), "warning") == ["quota-unknown"]


def test_quota_that_cannot_be_read(aws):
    aws.refused.add("service-quotas")
    assert names(findings(aws), "warning") == ["quota-unchecked"]


def test_name_that_is_taken(aws):
    aws.client("sagemaker").create_training_job(
        TrainingJobName="b2t-1",
        RoleArn=ROLE,
        AlgorithmSpecification={"TrainingInputMode": "File", "TrainingImage": "i"},
        OutputDataConfig={"S3OutputPath": "s3://a/b"},
        ResourceConfig={"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 1},
        StoppingCondition={"MaxRuntimeInSeconds": 60},
    )
    assert names(findings(aws)) == ["job-name-taken"]


def test_unknown_key(aws):
    assert names(findings(aws, output_kms_key="alias/none")) == ["key-unknown"]


def test_disabled_key(aws):
    kms = aws.client("kms")
    key = kms.create_key()["KeyMetadata"]["KeyId"]
    kms.disable_key(KeyId=key)
    assert names(findings(aws, output_kms_key=key)) == ["key-disabled"]


# --- network


def network(aws, *, endpoint):
    ec2 = aws.client("ec2")
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/24")["Subnet"]["SubnetId"]
    group = ec2.create_security_group(GroupName="g", Description="g", VpcId=vpc)["GroupId"]
    if endpoint:
        tables = ec2.describe_route_tables(Filters=[{"Name": "vpc-id", "Values": [vpc]}])
        ec2.create_vpc_endpoint(
            VpcId=vpc,
            ServiceName="com.amazonaws.us-east-1.s3",
            RouteTableIds=[tables["RouteTables"][0]["RouteTableId"]],
        )
    return subnet, group


def test_subnet_that_does_not_exist(aws):
    report = findings(aws, subnets=("subnet-0123",), security_group_ids=("sg-0123",))
    assert names(report) == ["network-unknown"]


def test_subnet_and_security_group_of_two_networks(aws):
    (subnet, _), (_, group) = network(aws, endpoint=True), network(aws, endpoint=True)
    report = findings(aws, subnets=(subnet,), security_group_ids=(group,))
    assert names(report) == ["network-mixed"]


@pytest.mark.parametrize("endpoint, expected", [(False, ["network-no-s3"]), (True, [])])
def test_subnet_with_and_without_a_way_to_s3(aws, endpoint, expected):
    subnet, group = network(aws, endpoint=endpoint)
    assert names(findings(aws, subnets=(subnet,), security_group_ids=(group,))) == expected


# --- image


def test_no_image(aws):
    assert names(findings(aws, image_uri=None)) == ["image-missing"]


def test_image_outside_ecr(aws):
    assert names(findings(aws, image_uri="docker.io/me/image:1")) == ["image-not-ecr"]


def test_image_in_another_region(aws):
    uri = aws.image_uri.replace("us-east-1", "eu-west-1")
    assert names(findings(aws, image_uri=uri)) == ["image-region"]


def test_unknown_repository(aws):
    uri = aws.image_uri.replace(REPOSITORY, "something-else")
    assert names(findings(aws, image_uri=uri)) == ["repository-unknown"]


def test_unknown_digest(aws):
    uri = aws.image_uri.split("@")[0] + "@sha256:" + "0" * 64
    assert names(findings(aws, image_uri=uri)) == ["image-unknown"]


def test_image_for_another_processor(aws):
    assert names(findings(aws, image_uri=put_image(aws, "arm64"))) == ["image-architecture"]


def test_tag_that_moves(aws):
    put_image(aws, "latest")
    uri = aws.image_uri.split("@")[0] + ":latest"
    report = findings(aws, image_uri=uri)
    assert "image-moving-tag" in names(report, "warning")


# --- MLflow


ELSEWHERE = "https://mlflow.example.org"


def test_image_with_and_without_mlflow(aws):
    image = put_labelled_image(aws, {"brain-to-text.mlflow": "yes"})
    assert findings(aws, image_uri=image, mlflow_tracking_uri=ELSEWHERE).findings == ()
    image = put_labelled_image(aws, {"brain-to-text.mlflow": "no"})
    assert findings(aws, image_uri=image).findings == ()  # nobody asked for MLflow
    report = findings(aws, image_uri=image, mlflow_tracking_uri=ELSEWHERE)
    assert names(report) == ["image-without-mlflow"]
    assert "./build_and_push.sh --mlflow" in report.of("error")[0].text


def test_image_that_says_nothing_about_mlflow(aws):
    report = findings(aws, mlflow_tracking_uri=ELSEWHERE)
    assert names(report, "warning") == ["image-mlflow-unchecked"]


def test_mlflow_server_of_sagemaker(aws):
    settings = {
        "image_uri": put_labelled_image(aws, {"brain-to-text.mlflow": "yes"}),
        "mlflow_tracking_uri": SERVER,
    }
    assert names(findings(aws, **settings)) == ["mlflow-unknown"]
    aws.mlflow_servers["speech"] = "Inactive"
    report = findings(aws, **settings)
    assert names(report) == ["mlflow-stopped"]
    assert "start-mlflow-tracking-server" in report.of("error")[0].text
    aws.mlflow_servers["speech"] = "Active"
    assert findings(aws, **settings).findings == ()


def test_plain_image_for_another_processor(aws):
    image = put_labelled_image(aws, {})
    (digest,) = aws.layers
    aws.layers[digest] = json.dumps({"architecture": "arm64"}).encode()
    assert names(findings(aws, image_uri=image)) == ["image-architecture"]


# --- data


def test_unknown_bucket(aws):
    assert names(findings(aws, s3_bucket="no-such-bucket-here")) == ["bucket-unknown"]


def test_bucket_that_is_closed_to_you(aws):
    def deny(**_):
        from types import SimpleNamespace

        return SimpleNamespace(status_code=403), {"Error": {"Code": "403", "Message": "Forbidden"}}

    aws.client("s3").meta.events.register("before-call.s3.HeadBucket", deny)
    assert names(findings(aws)) == ["bucket-denied"]


def test_bucket_in_another_region(aws):
    aws.client("s3").create_bucket(
        Bucket="far-away", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
    )
    report = findings(aws, s3_bucket="far-away")
    assert names(report) == ["bucket-region"]
    assert "--region eu-west-1" in report.of("error")[0].text


def test_wrong_prefix_names_the_right_one(aws):
    report = findings(aws, s3_data_prefix="data/hdf5")
    assert names(report) == ["data-missing"]
    assert f"--s3-data-prefix {PREFIX}." in report.of("error")[0].text


def test_bucket_without_data(aws):
    aws.client("s3").create_bucket(Bucket="empty-bucket")
    report = findings(aws, s3_bucket="empty-bucket")
    assert names(report) == ["data-missing"]
    assert "upload the dataset" in report.of("error")[0].text


def test_no_training_data(aws):
    put_dataset(aws, "val-only", splits=("val",))
    assert names(findings(aws, s3_data_prefix="val-only")) == ["data-no-train"]


def test_no_validation_data(aws):
    put_dataset(aws, "train-only", splits=("train",))
    assert names(findings(aws, s3_data_prefix="train-only"), "warning") == ["data-no-val"]


def test_no_manifest(aws):
    aws.client("s3").delete_object(Bucket=BUCKET, Key=f"{PREFIX}/trial_manifest.json.gz")
    report = findings(aws)
    assert names(report, "warning") == ["manifest-missing"]
    assert f"prepare_dataset.py index s3://{BUCKET}/{PREFIX}" in report.of("warning")[0].text


def test_manifest_of_files_that_changed(aws):
    key = f"{PREFIX}/t15.2023.08.12/data_train.hdf5"
    aws.client("s3").put_object(Bucket=BUCKET, Key=key, Body=b"other bytes")
    report = findings(aws)
    assert names(report) == ["manifest-stale"]
    assert "t15.2023.08.12" in report.of("error")[0].text


def test_manifest_that_is_damaged(aws):
    key = f"{PREFIX}/trial_manifest.json.gz"
    aws.client("s3").put_object(Bucket=BUCKET, Key=key, Body=b"not gzip")
    assert names(findings(aws)) == ["manifest-stale"]


def test_labels_of_the_other_kind(aws):
    put_dataset(aws, "phonemes", n_classes=41)
    report = findings(aws, s3_data_prefix="phonemes")
    assert names(report) == ["data-classes"]
    assert "rnn_args_phoneme_sagemaker.yaml" in report.of("error")[0].text


def test_other_number_of_features(aws):
    put_dataset(aws, "small", n_features=64)
    assert names(findings(aws, s3_data_prefix="small")) == ["data-features"]


def test_session_that_the_data_does_not_have(aws):
    sessions = '["t15.2023.08.11", "t15.2023.08.99"]'
    report = findings(aws, overrides={"dataset.sessions": sessions, "dataset.days_per_batch": "1"})
    assert names(report) == ["data-sessions"]
    assert "t15.2023.08.99" in report.of("error")[0].text


def test_more_sessions_per_batch_than_there_are(aws):
    put_dataset(aws, "few", sessions=2)
    report = findings(aws, s3_data_prefix="few")
    assert names(report) == ["data-few-sessions"]
    assert "--dataset.days_per_batch 2" in report.of("error")[0].text


def test_volume_smaller_than_the_copied_dataset(aws):
    def huge(parsed, **_):
        for entry in parsed.get("Contents", []):
            entry["Size"] = 8 * 10**9

    aws.client("s3").meta.events.register("after-call.s3.ListObjectsV2", huge)
    report = findings(aws, data_channel="file")
    assert "volume-too-small" in names(report)
    assert "volume-too-small" not in names(findings(aws, data_channel="stream"))


def test_nothing_to_resume_from(aws):
    assert names(findings(aws, resume_from="b2t-0")) == ["resume-nothing"]


def test_nothing_to_start_from(aws):
    uri = f"s3://{BUCKET}/models/none/model.tar.gz"
    assert names(findings(aws, init_from_checkpoint=uri)) == ["init-nothing"]


@pytest.mark.parametrize(
    "call, group", [("sts.GetCallerIdentity", None), ("ecr.BatchGetImage", "image")]
)
def test_a_page_of_a_proxy_instead_of_an_answer(aws, call, group):
    def page(**_):
        raise ResponseParserError("Unable to parse response, invalid XML received: <html>")

    service = call.split(".")[0]
    aws.client(service).meta.events.register(f"before-call.{call}", page)
    report = findings(aws)
    if group is None:
        assert names(report) == ["credentials"]
    else:
        assert names(report, "warning") == [f"{group}-unchecked"]
        assert names(report) == []
    assert "could not be reached" in report.findings[0].text


def test_policy_simulation_that_is_answered_by_a_proxy(aws):
    def page(**_):
        raise ResponseParserError("Unable to parse response, invalid XML received: <html>")

    events = aws.client("iam").meta.events
    events.register_first("before-call.iam.SimulatePrincipalPolicy", page)
    assert names(findings(aws), "warning") == ["permissions-unchecked"]


def test_several_errors_are_reported_together(aws):
    report = findings(aws, role=None, image_uri=None, s3_data_prefix="nowhere")
    assert names(report) == ["role-missing", "image-missing", "data-missing"]
