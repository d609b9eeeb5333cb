"""Every way a job can be doomed before it starts, provoked one at a time."""

import importlib
import json
import subprocess
from collections import Counter

import pytest
from botocore.parsers import ResponseParserError
from brain_to_text.config_reader import load_config
from brain_to_text.dataset.manifest import Unfinished
from brain_to_text.launch.account_checks import check_quota, check_role
from brain_to_text.launch.checks import check_bucket, check_data, check_image, check_machine
from brain_to_text.launch.image import LABEL, fingerprints, look_at
from brain_to_text.launch.image import REPOSITORY as REPOSITORY_FOLDER
from brain_to_text.launch.request import CODE_FOLDER, DEFAULT_CONFIG, JobSettings, job_config
from brain_to_text.launch.submit import preflight, prepare, submit
from support.aws_emulation import (
    ACCOUNT,
    BUCKET,
    PREFIX,
    REPOSITORY,
    ROLE,
    allow_role,
    deploy_stack,
    emulated_aws,
    log_in,
    policy_document,
    put_dataset,
    put_image,
    put_image_index,
    ready_to_train,
)

CONFIG = load_config(CODE_FOLDER / DEFAULT_CONFIG)

pytestmark = pytest.mark.aws


@pytest.fixture
def aws(monkeypatch):
    with emulated_aws(monkeypatch) as emulated:
        yield emulated


@pytest.fixture
def ready(aws, monkeypatch):
    ready_to_train(aws, monkeypatch)
    return aws


def job(**settings):
    known = {"s3_bucket": BUCKET, "role": ROLE, "job_name": "b2t-1", **settings}
    return JobSettings(**known)


def names(findings, severity="error"):
    found = list(findings)
    assert all("\n" not in finding.reason for finding in found)
    return [finding.kind for finding in found if finding.severity == severity]


def text_of(findings, name):
    (text,) = [finding.reason for finding in findings if finding.kind == name]
    return text


def test_a_job_that_is_ready_has_no_findings(ready):
    report = preflight(prepare(job(image_uri=ready.image_uri), ready.account), ready.account)
    assert report.lines()[-1] == "Checked: 0 errors, 0 warnings"
    assert report.findings == ()
    assert "AWS Price List, us-east-1" in "\n".join(report.lines())


def test_several_errors_are_reported_together(aws, monkeypatch):
    monkeypatch.setattr("brain_to_text.launch.submit.LAST_IMAGE", "/nowhere")
    aws.client("s3").create_bucket(Bucket=BUCKET)
    report = preflight(prepare(job(role=None), aws.account), aws.account)
    assert names(report.findings) == ["role-missing", "image-missing", "data-missing"]


def test_one_launch_makes_each_thing_once(ready, monkeypatch):
    """Configuration, rules between settings, the service's model, the image: one look at each."""
    counts = Counter()
    for module, name in (
        ("submit", "job_config"),
        ("submit", "check_settings"),
        ("submit", "look_at"),
        ("request", "load_config"),
        ("request", "breaches"),
    ):
        place = f"brain_to_text.launch.{module}"
        real = getattr(importlib.import_module(place), name)

        def counted(*given, _name=name, _real=real, **more):
            counts[_name] += 1
            return _real(*given, **more)

        monkeypatch.setattr(f"{place}.{name}", counted)
    tagged = ready.image_uri.split("@")[0]
    made = prepare(job(image_uri=ready.image_uri), ready.account)
    assert preflight(made, ready.account).of("error") == []
    submit(made, ready.account)
    assert set(counts.values()) == {1} and len(counts) == 5
    (sent,) = ready.sent
    assert sent == made.request
    assert sent["AlgorithmSpecification"]["TrainingImage"].startswith(f"{tagged}@sha256:")


@pytest.mark.parametrize("call", ["sts.GetCallerIdentity", "ecr.BatchGetImage"])
def test_a_page_of_a_proxy_instead_of_an_answer(ready, call):
    def page(**_):
        raise ResponseParserError("Unable to parse response, invalid XML received: <html>")

    service = call.split(".")[0]
    ready.account.client(service).meta.events.register(f"before-call.{call}", page)
    report = preflight(prepare(job(image_uri=ready.image_uri), ready.account), ready.account)
    if service == "sts":
        assert names(report.findings) == ["credentials"]
    else:
        assert names(report.findings, "warning") == ["image-unchecked"]
        assert names(report.findings) == []
    assert "could not be reached" in report.findings[0].reason


# --- the instance type


@pytest.mark.parametrize(
    "name, severity, settings, said",
    [
        ("instance-cpu", "warning", {"instance_type": "ml.m5.xlarge"}, "ml.g5.2xlarge"),
        ("gpu-too-old", "error", {"instance_type": "ml.p3.2xlarge"}, "V100"),
        ("gpu-memory", "error", {"batch_size": 512}, "--batch-size"),
        ("max-run", "error", {"max_run_hours": 2.0}, "--max-run-hours"),
    ],
)
def test_settings_that_do_not_fit_the_machine(name, severity, settings, said):
    asked = job(**settings)
    findings = list(check_machine(asked, job_config(asked)))
    assert name in names(findings, severity)
    assert said in findings[0].reason


@pytest.mark.parametrize(
    ("instance_type", "said"),
    [
        ("ml.g4dn.xlarge", ["A T4 has no bfloat16: float16 instead."]),
        ("ml.g5.2xlarge", []),
    ],
)
def test_a_type_that_the_gpu_has_not_is_replaced_and_said(instance_type, said):
    config = load_config(None, {"amp_dtype": "bfloat16", "batch_size": 8})
    findings = check_machine(job(instance_type=instance_type), config)
    assert [finding.reason for finding in findings if finding.kind == "precision"] == said


def test_the_batch_size_that_is_suggested_fits():
    text = text_of(check_machine(job(), load_config(None, {"batch_size": 512})), "gpu-memory")
    fits = text.split("--batch-size ")[1].rstrip(".")
    smaller = check_machine(job(), load_config(None, {"batch_size": fits}))
    assert "gpu-memory" not in names(smaller)


# --- role, permissions, quota


@pytest.fixture
def role(aws):
    deploy_stack(aws)
    return aws


def account_findings(aws, **settings):
    image = f"{ACCOUNT}.dkr.ecr.us-east-1.amazonaws.com/{REPOSITORY}:1"
    asked = job(image_uri=image, **settings)
    return [*check_role(asked, aws.account), *check_quota(asked, aws.account)]


def test_the_stacks_own_role_is_enough(role):
    assert account_findings(role) == []


def test_unknown_role(aws):
    assert names(account_findings(aws)) == ["role-unknown"]


@pytest.mark.parametrize(
    "action, resource",
    [
        ("s3:ListBucket", f"arn:aws:s3:::{BUCKET}:"),
        ("ecr:BatchGetImage", f"repository/{REPOSITORY}"),
        ("logs:PutLogEvents", "/aws/sagemaker/TrainingJobs:log-stream:b2t-1/"),
        ("cloudwatch:PutMetricData", "*"),
    ],
)
def test_role_without_a_permission(role, action, resource):
    allow_role(role, policy_document("job_policy.json", without=action))
    findings = account_findings(role)
    assert set(names(findings)) == {"permission-denied"}
    assert all(action in finding.reason for finding in findings)
    assert resource in findings[0].reason


def test_a_deny_of_the_organisation_wins_over_the_roles_policy(role):
    deny = {"Effect": "Deny", "NotAction": "s3:*", "Resource": "*"}
    role.organisation = [{"Statement": [deny]}]
    denied = {f.reason.split(" may not ")[1].split(" on ")[0] for f in account_findings(role)}
    assert "logs:PutLogEvents" in denied
    assert not [action for action in denied if action.startswith("s3:")]


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"output_prefix": "mine"}, f"s3:PutObject on arn:aws:s3:::{BUCKET}/mine/b2t-1/checkpo"),
        ({"init_from_checkpoint": "s3://b/models/best"}, "s3:GetObject on arn:aws:s3:::b/models"),
        ({"debug_shell": True}, "AllowShell=yes"),
    ],
)
def test_role_without_what_a_setting_needs(role, settings, said):
    assert any(said in finding.reason for finding in account_findings(role, **settings))


def test_quota_too_small(role):
    findings = account_findings(role, instance_count=3)
    assert names(findings) == ["quota"]
    assert "is 2 and the job needs 3" in findings[0].reason


@pytest.mark.parametrize(
    "settings, use",
    [
        ({"spot": True}, "spot training job usage"),
        ({"keep_alive_minutes": 10}, "training warm pool usage"),
    ],
)
def test_spot_and_warm_pools_have_quotas_of_their_own(role, settings, use):
    role.quotas[f"ml.g5.2xlarge for {use}"] = 0
    assert names(account_findings(role)) == []
    assert use in text_of(account_findings(role, **settings), "quota")
    role.quotas[f"ml.g5.2xlarge for {use}"] = 1
    assert names(account_findings(role, **settings)) == []


@pytest.mark.parametrize(
    "action, what",
    [
        ("iam:SimulatePrincipalPolicy", "permissions"),
        ("servicequotas:ListServiceQuotas", "quota"),
        ("ecr:BatchGetImage", "image"),
        ("s3:GetObject", "data"),
    ],
)
def test_what_you_may_not_look_at_is_a_warning(ready, monkeypatch, action, what):
    log_in(ready, monkeypatch, policy_document("launcher_policy.json", action))
    report = preflight(prepare(job(image_uri=ready.image_uri), ready.account), ready.account)
    assert names(report.findings) == []
    assert names(report.findings, "warning") == [f"{what}-unchecked"]
    assert "attach code/aws/launcher_policy.json" in report.findings[0].reason


# --- image


@pytest.fixture
def registry(aws):
    aws.client("ecr").create_repository(repositoryName=REPOSITORY)
    return aws


def image_findings(aws, uri, **settings):
    image = uri and look_at(uri, aws.account)
    return list(check_image(job(image_uri=uri, **settings), image, aws.account))


def ours(**labels):
    return {LABEL: json.dumps(fingerprints()), **labels}


def test_image_of_this_code(registry):
    assert image_findings(registry, put_image(registry, ours())) == []


def test_image_that_is_not_there(registry):
    uri = put_image(registry, ours())
    assert names(image_findings(registry, None)) == ["image-missing"]
    assert names(image_findings(registry, "docker.io/me/image:1")) == ["image-not-ecr"]
    elsewhere = uri.replace("us-east-1", "eu-west-1")
    assert names(image_findings(registry, elsewhere)) == ["image-region"]
    other = uri.replace(REPOSITORY, "something-else")
    assert names(image_findings(registry, other)) == ["image-unknown"]
    unknown = uri.split("@")[0] + "@sha256:" + "0" * 64
    assert names(image_findings(registry, unknown)) == ["image-unknown"]


def test_the_image_that_a_colleague_pushed_is_found(ready, monkeypatch):
    monkeypatch.setattr("brain_to_text.launch.submit.LAST_IMAGE", "/nowhere")
    made = prepare(job(), ready.account)
    assert made.image is None and made.settings.image_uri is None
    git = ["git", "-C", str(REPOSITORY_FOLDER), "rev-parse", "--short=12", "HEAD"]
    revision = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    pushed = put_image(ready, ours(), tag=revision)
    made = prepare(job(), ready.account)
    assert made.settings.image_uri == pushed
    found = preflight(made, ready.account)
    assert names(found.findings) == [] and "pushed from this revision" in found.findings[-1].reason


def test_image_for_another_processor(registry):
    plain = put_image(registry, ours(), architecture="arm64")
    assert names(image_findings(registry, plain)) == ["image-architecture"]
    index = put_image_index(registry, "arm64")
    assert names(image_findings(registry, index)) == ["image-architecture"]


def test_image_of_other_code_names_the_files(registry):
    files = fingerprints()
    files["code/train_model_sagemaker.py"] = "0" * 16
    files["code/brain_to_text/gone.py"] = "1" * 16
    del files["code/evaluate_model.py"]
    uri = put_image(registry, {LABEL: json.dumps(files)})
    text = text_of(image_findings(registry, uri), "code-differs")
    for part in (
        "code/train_model_sagemaker.py",
        "code/brain_to_text/gone.py",
        "evaluate_model.py",
    ):
        assert part in text
    assert "./build_and_push.sh" in text and "--accept-code-difference" in text
    accepted = image_findings(registry, uri, accept_code_difference=True)
    assert names(accepted) == [] and names(accepted, "warning") == ["code-differs"]


def test_what_only_your_machine_uses_may_differ(registry):
    files = fingerprints()
    for path in files:
        if path.endswith(".md") or path.startswith(("code/aws/", "code/brain_to_text/launch/")):
            files[path] = "0" * 16
    files["code/.DS_Store"] = files["code/NOTICE"] = "0" * 16
    assert image_findings(registry, put_image(registry, {LABEL: json.dumps(files)})) == []


def test_image_whose_code_is_unknown(registry, monkeypatch):
    uri = put_image(registry, {})
    assert names(image_findings(registry, uri), "warning") == ["image-code-unknown"]
    labelled = put_image(registry, ours())
    policy = policy_document("launcher_policy.json", without="ecr:GetDownloadUrlForLayer")
    log_in(registry, monkeypatch, policy)
    assert names(image_findings(registry, labelled), "warning") == ["image-code-unknown"]


def test_image_with_and_without_mlflow(registry):
    elsewhere = "https://mlflow.example.org"
    without = put_image(registry, ours(**{"brain-to-text.mlflow": "no"}))
    holds = put_image(registry, ours(**{"brain-to-text.mlflow": "yes"}))
    assert image_findings(registry, without) == []  # nobody asked for MLflow
    assert image_findings(registry, holds, mlflow_tracking_uri=elsewhere) == []
    findings = image_findings(registry, without, mlflow_tracking_uri=elsewhere)
    assert "./build_and_push.sh --mlflow" in text_of(findings, "image-without-mlflow")


# --- data


@pytest.fixture
def bucket(aws):
    aws.client("s3").create_bucket(Bucket=BUCKET)
    put_dataset(aws)
    return aws


def data_findings(aws, **settings):
    asked = job(**settings)
    bucket = list(check_bucket(asked, aws.account))
    return bucket or list(check_data(asked, job_config(asked), aws.account))


def test_data_as_it_should_be(bucket):
    assert data_findings(bucket) == []


def test_bucket_that_is_far_away(bucket):
    s3 = bucket.client("s3")
    s3.create_bucket(
        Bucket="far-away", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
    )
    findings = data_findings(bucket, s3_bucket="far-away")
    assert "--region eu-west-1" in text_of(findings, "bucket-region")


def test_no_data_under_the_prefix(bucket):
    findings = data_findings(bucket, s3_data_prefix="data/hdf5")
    assert "upload the dataset" in text_of(findings, "data-missing")


@pytest.mark.parametrize("split, severity", [("train", "warning"), ("val", "error")])
def test_only_training_or_only_validation_data(bucket, split, severity):
    put_dataset(bucket, "half", splits=(split,))
    name = {"train": "data-no-val", "val": "data-no-train"}[split]
    assert names(data_findings(bucket, s3_data_prefix="half"), severity) == [name]


def test_no_manifest(bucket):
    bucket.client("s3").delete_object(Bucket=BUCKET, Key=f"{PREFIX}/trial_manifest.json.gz")
    findings = data_findings(bucket)
    command = f"prepare_dataset.py index s3://{BUCKET}/{PREFIX}"
    assert command in text_of(findings, "manifest-missing")


@pytest.mark.parametrize("name", ["t15.2023.08.12/data_train.hdf5", "trial_manifest.json.gz"])
def test_manifest_that_is_damaged_or_of_files_that_changed(bucket, name):
    bucket.client("s3").put_object(Bucket=BUCKET, Key=f"{PREFIX}/{name}", Body=b"other bytes")
    assert names(data_findings(bucket)) == ["manifest-stale"]


def test_a_dataset_that_is_still_being_made(bucket):
    mark = Unfinished("encode", "encode OLD NEW", {}, ["s/data_train.hdf5"], "1").to_bytes()
    bucket.client("s3").put_object(Bucket=BUCKET, Key=f"{PREFIX}/trial_manifest.json.gz", Body=mark)
    refusal = text_of(data_findings(bucket), "manifest-stale")
    assert "is unfinished" in refusal and "Repeat 'encode OLD NEW'" in refusal


@pytest.mark.parametrize(
    "data, overrides, said",
    [
        ({"n_classes": 41}, {}, "41"),
        ({"n_features": 64}, {"dataset.neural_dim": "512"}, "64"),
        ({}, {"dataset.sessions": '["t15.2023.08.99"]', "dataset.days_per_batch": "1"}, "08.99"),
        ({"sessions": 2}, {}, "dataset.days_per_batch"),
    ],
)
def test_data_that_the_trainer_would_refuse(bucket, data, overrides, said):
    put_dataset(bucket, "other", **data)
    findings = data_findings(bucket, s3_data_prefix="other", overrides=overrides)
    assert names(findings)
    assert any(said in finding.reason for finding in findings)


def test_volume_smaller_than_the_copied_dataset(bucket):
    def huge(parsed, **_):
        for entry in parsed.get("Contents", []):
            entry["Size"] = 8 * 10**9

    bucket.account.client("s3").meta.events.register("after-call.s3.ListObjectsV2", huge)
    assert "volume-too-small" in names(data_findings(bucket, data_channel="file"))
    assert "volume-too-small" not in names(data_findings(bucket, data_channel="stream"))


def test_nothing_to_start_from(bucket):
    assert names(data_findings(bucket, resume_from="b2t-0")) == ["resume-nothing"]
    uri = f"s3://{BUCKET}/models/none/model.tar.gz"
    assert names(data_findings(bucket, init_from_checkpoint=uri)) == ["init-nothing"]
