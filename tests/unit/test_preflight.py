"""Every way a job can be doomed before it starts, provoked one at a time."""

import importlib
import json
import subprocess
from collections import Counter
from functools import partial

import pytest
from botocore.parsers import ResponseParserError
from brain_to_text.config_reader import load_config
from brain_to_text.dataset.manifest import Unfinished
from brain_to_text.launch.checks import check_machine
from brain_to_text.launch.image import LABEL, REPOSITORY, fingerprints
from brain_to_text.launch.request import JobSettings
from brain_to_text.launch.submit import preflight, prepare, submit
from support.aws_emulation import (
    BUCKET,
    PREFIX,
    ROLE,
    USER,
    allow_role,
    emulated_aws,
    log_in,
    policy_document,
    put_dataset,
    put_image,
    ready_to_train,
)
from support.aws_emulation import REPOSITORY as IMAGES

pytestmark = pytest.mark.aws


@pytest.fixture
def aws(monkeypatch):
    with emulated_aws(monkeypatch) as emulated:
        yield emulated


@pytest.fixture
def ready(aws, monkeypatch):
    monkeypatch.setattr("brain_to_text.launch.submit.LAST_IMAGE", "/nowhere")
    ready_to_train(aws, monkeypatch)
    return aws


def job(aws, **settings):
    known = {"s3_bucket": BUCKET, "role": ROLE, "image_uri": aws.image_uri, "job_name": "b2t-1"}
    return JobSettings(**{**known, **settings})


def report(aws, **settings):
    made = preflight(prepare(job(aws, **settings), aws.account), aws.account)
    assert all("\n" not in finding.reason for finding in made.findings)
    return made


def test_a_job_that_is_ready_has_no_findings(ready):
    made = report(ready)
    assert made.findings == () and made.lines()[-1] == "Checked: 0 errors, 0 warnings"
    assert "AWS Price List, us-east-1" in "\n".join(made.lines())


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
    made = prepare(job(ready), ready.account)
    assert preflight(made, ready.account).of("error") == []
    submit(made, ready.account)
    assert set(counts.values()) == {1} and len(counts) == 5
    (sent,) = ready.sent
    assert sent == made.request
    assert sent["AlgorithmSpecification"]["TrainingImage"].startswith(f"{tagged}@sha256:")


# --- what is wrong: one thing at a time


def nothing(aws):
    return None


def role_without(action, aws):
    allow_role(aws, policy_document("job_policy.json", without=action))


def quota(use, number, aws):
    aws.quotas[f"ml.g5.2xlarge for {use}"] = number


def no_role(aws):
    iam, name = aws.client("iam"), ROLE.rpartition("/")[2]
    for policy in iam.list_role_policies(RoleName=name)["PolicyNames"]:
        iam.delete_role_policy(RoleName=name, PolicyName=policy)
    iam.delete_role(RoleName=name)


def image(labels, aws, **more):
    return {"image_uri": put_image(aws, {LABEL: json.dumps(fingerprints()), **labels}, **more)}


def other_code(aws, **accepted):
    files = fingerprints()
    files["code/train_model_sagemaker.py"] = files["code/brain_to_text/gone.py"] = "0" * 16
    del files["code/evaluate_model.py"]
    return {"image_uri": put_image(aws, {LABEL: json.dumps(files)}), **accepted}


def may_everything(aws):
    allow = {"Effect": "Allow", "Action": "*", "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [allow]})
    aws.client("iam").put_user_policy(UserName=USER, PolicyName="all", PolicyDocument=policy)


def image_elsewhere(old, new, aws):
    may_everything(aws)
    return {"image_uri": aws.image_uri.replace(old, new)}


def dataset(aws, overrides=None, **kind):
    put_dataset(aws, "data/other", **kind)
    return {"s3_data_prefix": "data/other", "overrides": overrides or {}}


def changed(name, content, aws):
    key = f"{PREFIX}/{name}"
    aws.client("s3").put_object(Bucket=BUCKET, Key=key, Body=content)


def no_manifest(aws):
    aws.client("s3").delete_object(Bucket=BUCKET, Key=f"{PREFIX}/trial_manifest.json.gz")


def far_away(aws):
    place = {"LocationConstraint": "eu-west-1"}
    aws.client("s3").create_bucket(Bucket="far-away", CreateBucketConfiguration=place)
    may_everything(aws)
    return {"s3_bucket": "far-away"}


def huge(aws):
    def eight_gb(parsed, **_):
        for entry in parsed.get("Contents", []):
            entry["Size"] = 8 * 10**9

    aws.account.client("s3").meta.events.register("after-call.s3.ListObjectsV2", eight_gb)
    return {"data_channel": "file"}


SESSION = {"dataset.sessions": '["t15.2023.08.99"]', "dataset.days_per_batch": "1"}
NOT_PUSHED = f"123456789012.dkr.ecr.us-east-1.amazonaws.com/{IMAGES}@sha256:{'0' * 64}"
HALF_MADE = Unfinished("encode", "encode OLD NEW", {}, ["s/data_train.hdf5"], "1").to_bytes()
# (what is done to the account, settings, how severe, kind, part of the sentence); what is done may
# give more settings
CASES = [
    (
        lambda aws: aws.quotas.update({"ml.m5.xlarge for training job usage": 1}),
        {"instance_type": "ml.m5.xlarge"},
        "warning",
        "instance-cpu",
        "ml.g5.2xlarge",
    ),
    (nothing, {"instance_type": "ml.p3.2xlarge"}, "error", "gpu-too-old", "V100"),
    (nothing, {"batch_size": 512}, "error", "gpu-memory", "--batch-size"),
    (nothing, {"max_run_hours": 2.0}, "error", "max-run", "--max-run-hours"),
    (
        partial(quota, "training job usage", 2),
        {
            "instance_type": "ml.g4dn.xlarge",
            "batch_size": 8,
            "overrides": {"amp_dtype": "bfloat16"},
        },
        "note",
        "precision",
        "A T4 has no bfloat16: float16 instead.",
    ),
    (no_role, {}, "error", "role-unknown", "does not exist in account"),
    *(
        (partial(role_without, action), {}, "error", "permission-denied", f"{action} on {resource}")
        for action, resource in (
            ("s3:ListBucket", f"arn:aws:s3:::{BUCKET}: "),
            ("ecr:BatchGetImage", "arn:aws:ecr:us-east-1:123456789012:repository/brain-to-text-t"),
            ("cloudwatch:PutMetricData", "*: add it as in code/aws/job_policy.json"),
        )
    ),
    (nothing, {"output_prefix": "mine"}, "error", "permission-denied", "/mine/b2t-1/checkpoints/"),
    (nothing, {"debug_shell": True}, "error", "permission-denied", "AllowShell=yes"),
    (nothing, {"instance_count": 3}, "error", "quota", "is 2 and the job needs 3"),
    (
        partial(quota, "spot training job usage", 0),
        {"spot": True, "max_run_hours": 40.0},
        "error",
        "quota",
        "spot training job usage' in us-east-1 is 0",
    ),
    (nothing, {"keep_alive_minutes": 10}, "error", "quota", "training warm pool usage"),
    (lambda aws: setattr(aws, "image_uri", None), {}, "error", "image-missing", "./build_and_push"),
    (nothing, {"image_uri": "docker.io/me/image:1"}, "error", "image-not-ecr", "is not in ECR"),
    (
        partial(image_elsewhere, "us-east-1", "eu-west-1"),
        {},
        "error",
        "image-region",
        "build_and_push.sh --region us-east-1",
    ),
    (
        partial(image_elsewhere, "brain-to-text", "something-else"),
        {},
        "error",
        "image-unknown",
        "in a repository something-else-training",
    ),
    (nothing, {"image_uri": NOT_PUSHED}, "error", "image-unknown", "has no image sha256:000"),
    (partial(image, {}, architecture="arm64"), {}, "error", "image-architecture", "for arm64 and"),
    (
        partial(image, {}, architecture="arm64", index=True),
        {},
        "error",
        "image-architecture",
        "for arm64 and",
    ),
    (
        other_code,
        {},
        "error",
        "code-differs",
        "(code/brain_to_text/gone.py, code/evaluate_model.py, code/train_model_sagemaker.py): run",
    ),
    (partial(other_code, accept_code_difference=True), {}, "warning", "code-differs", "gone.py"),
    (
        lambda aws: {"image_uri": put_image(aws, {})},
        {},
        "warning",
        "image-code-unknown",
        "does not say what code it was made of",
    ),
    (
        partial(image, {"brain-to-text.mlflow": "no"}),
        {"mlflow_tracking_uri": "https://mlflow.example.org"},
        "error",
        "image-without-mlflow",
        "./build_and_push.sh --mlflow",
    ),
    (far_away, {}, "error", "bucket-region", "use --region eu-west-1"),
    (nothing, {"s3_data_prefix": "data/hdf5"}, "error", "data-missing", "upload the dataset"),
    (partial(dataset, splits=("train",)), {}, "warning", "data-no-val", "--save_final_model true"),
    (partial(dataset, splits=("val",)), {}, "error", "data-no-train", "upload them"),
    (no_manifest, {}, "warning", "manifest-missing", f"index s3://{BUCKET}/{PREFIX}"),
    (
        partial(changed, "t15.2023.08.12/data_train.hdf5", b"other bytes"),
        {},
        "error",
        "manifest-stale",
        "prepare_dataset.py index",
    ),
    (
        partial(changed, "trial_manifest.json.gz", HALF_MADE),
        {},
        "error",
        "manifest-stale",
        "Repeat 'encode OLD NEW'",
    ),
    (
        partial(dataset, overrides={"dataset.neural_dim": "512"}, n_features=64),
        {},
        "error",
        "",
        "64",
    ),
    (partial(dataset, overrides=SESSION), {}, "error", "", "08.99"),
    (partial(dataset, sessions=2), {}, "error", "", "dataset.days_per_batch"),
    (huge, {}, "error", "volume-too-small", "--data-channel stream"),
    (nothing, {"resume_from": "b2t-0"}, "error", "resume-nothing", "left no checkpoint under"),
    (
        nothing,
        {"init_from_checkpoint": f"s3://{BUCKET}/data/none.tar.gz"},
        "error",
        "init-nothing",
        "model.tar.gz or a best_checkpoint",
    ),
]


def find(aws, prepared, settings, severity, kind, said):
    more = prepared(aws) or {}
    found = report(aws, **settings, **more).findings
    assert [f for f in found if f.severity == severity and kind in f.kind and said in f.reason], (
        found
    )


def test_each_setting_that_cannot_work_is_found_and_says_what_to_do(ready):
    for case in CASES:
        if case[0] is nothing:
            find(ready, *case)


CHANGES = [case for case in CASES if case[0] is not nothing]


@pytest.mark.parametrize("case", CHANGES, ids=[case[3] or "data" for case in CHANGES])
def test_each_problem_of_the_account_is_found_and_says_what_to_do(ready, case):
    find(ready, *case)


def test_several_errors_are_reported_together(aws, monkeypatch):
    monkeypatch.setattr("brain_to_text.launch.submit.LAST_IMAGE", "/nowhere")
    aws.client("s3").create_bucket(Bucket=BUCKET)
    found = report(aws, role=None, image_uri=None).of("error")
    assert [f.kind for f in found] == ["role-missing", "image-missing", "data-missing"]


def test_the_batch_size_that_is_suggested_fits():
    asked = JobSettings(s3_bucket=BUCKET)
    (large,) = check_machine(asked, load_config(None, {"batch_size": 512}))
    fits = large.reason.split("--batch-size ")[1].rstrip(".")
    assert list(check_machine(asked, load_config(None, {"batch_size": fits}))) == []


def test_a_deny_of_the_organisation_wins_over_the_roles_policy(ready):
    ready.organisation = [
        {"Statement": [{"Effect": "Deny", "NotAction": ["s3:*", "iam:*"], "Resource": "*"}]}
    ]
    denied = {
        f.reason.split(" may not ")[1].split(" on ")[0]
        for f in report(ready).of("error")
        if f.kind == "permission-denied"
    }
    assert "logs:PutLogEvents" in denied
    assert not [action for action in denied if action.startswith("s3:")]


# --- what nobody could look at


@pytest.mark.parametrize(
    "action, kind",
    [
        ("iam:SimulatePrincipalPolicy", "permissions-unchecked"),
        ("servicequotas:ListServiceQuotas", "quota-unchecked"),
        ("ecr:BatchGetImage", "image-unchecked"),
        ("ecr:GetDownloadUrlForLayer", "image-code-unknown"),
        ("s3:GetObject", "data-unchecked"),
    ],
)
def test_what_you_may_not_look_at_is_a_warning(ready, monkeypatch, action, kind):
    log_in(ready, monkeypatch, policy_document("launcher_policy.json", action))
    (finding,) = report(ready).findings
    assert (finding.severity, finding.kind) == ("warning", kind)
    assert "launcher_policy.json" in finding.reason or kind == "image-code-unknown"


@pytest.mark.parametrize(
    ("call", "severity", "kind"),
    [
        ("sts.GetCallerIdentity", "error", "credentials"),
        ("ecr.BatchGetImage", "warning", "image-unchecked"),
    ],
)
def test_a_page_of_a_proxy_instead_of_an_answer(ready, call, severity, kind):
    def page(**_):
        raise ResponseParserError("Unable to parse response, invalid XML received: <html>")

    client = ready.account.client(call.split(".")[0])
    client.meta.events.register(f"before-call.{call}", page)
    (finding,) = report(ready).findings
    assert (finding.severity, finding.kind) == (severity, kind)
    assert "could not be reached" in finding.reason


# --- the image


def test_the_image_that_a_colleague_pushed_is_found(ready):
    assert prepare(job(ready, image_uri=None), ready.account).image is None
    git = ["git", "-C", str(REPOSITORY), "rev-parse", "--short=12", "HEAD"]
    revision = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    pushed = image({}, ready, tag=revision)["image_uri"]
    assert prepare(job(ready, image_uri=None), ready.account).settings.image_uri == pushed
    (finding,) = report(ready, image_uri=None).findings
    assert finding.severity == "note" and "pushed from this revision" in finding.reason


def test_what_only_your_machine_uses_may_differ_and_mlflow_may_be_there(ready):
    files = fingerprints()
    for path in files:
        if path.endswith(".md") or path.startswith(("code/aws/", "code/brain_to_text/launch/")):
            files[path] = "0" * 16
    files["code/.DS_Store"] = files["code/NOTICE"] = "0" * 16
    uri = put_image(ready, {LABEL: json.dumps(files), "brain-to-text.mlflow": "yes"})
    server = "https://mlflow.example.org"
    assert report(ready, image_uri=uri, mlflow_tracking_uri=server).findings == ()
