"""The unmodified build_and_push.sh against a registry that answers for ECR's host name; then the
user's whole way: launch what was pushed from its digest URI, fetch what it made.

Programs run in processes of their own, as typed; only variables say where this machine's AWS is.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
from brain_to_text.scoring.trained_model import open_model
from moto.server import ThreadedMotoServer
from support.container_job import BUCKET, TINY_JOB
from support.ecr_emulation import missing_part, serve_registry
from support.engine import docker

pytestmark = [pytest.mark.docker, pytest.mark.aws, pytest.mark.slow]

TOP = Path(__file__).resolve().parents[2]
ACCOUNT, REGION, REPOSITORY = "123456789012", "us-east-1", "pushed-by-a-test"


@pytest.fixture(scope="module")
def registry(engine, tmp_path_factory):
    if problem := missing_part():
        pytest.skip(problem)
    with serve_registry(tmp_path_factory.mktemp("registry"), ACCOUNT, REGION) as running:
        yield running


@pytest.fixture(scope="module")
def aws(registry):
    """Variables that send STS and ECR calls to an emulation."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "secretsecretsecret",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    server.stop()


@pytest.fixture(scope="module")
def ecr(aws):
    return boto3.client(
        "ecr",
        endpoint_url=aws["AWS_ENDPOINT_URL"],
        region_name=REGION,
        aws_access_key_id=aws["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=aws["AWS_SECRET_ACCESS_KEY"],
    )


def build_and_push(aws, *arguments):
    return subprocess.run(
        [str(TOP / "build_and_push.sh"), "--cpu", "--repository", REPOSITORY, *arguments],
        env={**os.environ, **aws},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def own_image_uri():
    """The launcher's default, put back after the test."""
    file = TOP / ".local" / "image_uri"
    before = file.read_text() if file.exists() else None
    yield file
    if before is None:
        file.unlink(missing_ok=True)
    else:
        file.write_text(before)


def test_push_skip_pull_and_run(image, registry, aws, ecr, own_image_uri, tmp_path):
    # the image fixture has built these layers, with whatever base this machine has
    # (a tag by name: the revision's own may change while somebody edits the tree)
    tag = "first"
    first = build_and_push(aws, "--tag", tag)
    assert first.returncode == 0, first.stderr
    uri = first.stdout.strip()
    host, _, name_and_digest = uri.partition("/")
    name, _, digest = name_and_digest.partition("@")
    assert (host, name) == (registry.host, REPOSITORY)
    assert digest.startswith("sha256:")
    assert f"Account {ACCOUNT}, region {REGION}" in first.stderr
    assert own_image_uri.read_text().strip() == uri

    made = ecr.describe_repositories(repositoryNames=[REPOSITORY])["repositories"][0]
    assert made["imageTagMutability"] == "IMMUTABLE"
    assert made["imageScanningConfiguration"] == {"scanOnPush": True}
    assert made["encryptionConfiguration"]["encryptionType"] == "AES256"
    policy = json.loads(ecr.get_lifecycle_policy(repositoryName=REPOSITORY)["lifecyclePolicyText"])
    assert policy["rules"][0]["selection"]["tagStatus"] == "untagged"

    # the login was for this push only
    assert "auth-token" not in first.stdout + first.stderr
    saved = Path.home() / ".docker" / "config.json"
    assert not saved.exists() or registry.host not in saved.read_text()

    # the emulation learns of the push, as ECR would by itself
    manifest = registry.manifest(REPOSITORY, tag)
    media_type = json.loads(manifest)["mediaType"]
    assert "index" not in media_type  # one plain image, as SageMaker wants it
    ecr.put_image(
        repositoryName=REPOSITORY, imageManifest=manifest, imageTag=tag, imageDigest=digest
    )
    second = build_and_push(aws, "--tag", tag)
    assert second.returncode == 0, second.stderr
    assert second.stdout.strip() == uri
    assert "nothing to build or push" in second.stderr
    assert "Building" not in second.stderr
    assert len(ecr.describe_repositories()["repositories"]) == 1

    docker("rmi", "--force", f"{registry.host}/{REPOSITORY}:{tag}", uri, check=False)
    login = tmp_path / "login"
    docker(
        *("--config", str(login), "login", registry.host),
        *("--username", registry.user, "--password", registry.password),
    )
    docker("--config", str(login), "pull", uri)
    assert "usage" in docker("run", "--rm", uri, "python", "train_model_sagemaker.py", "--help")


@pytest.fixture
def user(aws, container_s3, tmp_path):
    """A user's variables, and what keeps the test from the machine's own settings."""
    (tmp_path / "docker").mkdir()
    (tmp_path / "sdk.yaml").write_text(
        "SchemaVersion: '1.0'\nSageMaker: {PythonSDK: {Modules: {TelemetryOptOut: true}}}\n"
    )
    return {
        **os.environ,
        **aws,
        "AWS_ENDPOINT_URL_S3": container_s3.endpoint_url,
        "AWS_EC2_METADATA_DISABLED": "true",
        "DOCKER_CONFIG": str(tmp_path / "docker"),
        "SAGEMAKER_USER_CONFIG_OVERRIDE": str(tmp_path / "sdk.yaml"),
    }


def run(user, *command):
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=TOP, env=user, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture
def job_name():
    """A local job's name; the launcher's note of it is removed after the test."""
    yield "journey"
    (TOP / ".local" / "local-jobs" / "journey.json").unlink(missing_ok=True)


def test_push_launch_and_fetch(
    image, registry, user, container_s3, own_image_uri, job_name, tmp_path
):
    launcher = (sys.executable, "code/launch_sagemaker_job.py")
    pushed = run(user, "./build_and_push.sh", "--cpu")
    uri = pushed.stdout.strip()
    name = f"{registry.host}/brain-to-text-training"
    assert re.fullmatch(rf"{re.escape(name)}@sha256:[0-9a-f]{{64}}", uri)
    # it is to be pulled back: nothing of that name stays here
    tags = docker("images", "--format", "{{.Repository}}:{{.Tag}}", name).split()
    docker("rmi", "--force", uri, *tags, check=False)

    settings = [w for key, value in TINY_JOB.items() for w in (f"--{key}", str(value))]
    where = ("--instance-type", "local", "--job-name", job_name)
    launched = run(user, *launcher, *where, *settings)
    assert "Checked: 0 errors" in launched.stderr
    assert f"--fetch {job_name}" in launched.stdout
    assert uri in docker("images", "--digests", "--format", "{{.Repository}}@{{.Digest}}")

    fetched = run(user, *launcher, "--fetch", job_name, "--to", tmp_path / "fetched")
    assert "best" in fetched.stdout and f"--s3-bucket {BUCKET}" in fetched.stdout
    assert open_model(tmp_path / "fetched/model").config.dataset.batch_size == 4
    assert (tmp_path / "fetched/output/report.html").stat().st_size > 10_000
    assert list((tmp_path / "fetched/output/tensorboard").iterdir())
    logs = container_s3.root / BUCKET / "sagemaker-outputs" / job_name / "logs"
    assert "Finished at step 6" in (logs / "training_log").read_text()
    assert list((logs / "tensorboard").iterdir())
    said = "".join(done.stdout + done.stderr for done in (pushed, launched, fetched))
    assert registry.password not in said and user["AWS_SECRET_ACCESS_KEY"] not in said


def test_without_push_no_account_is_asked(image, aws):
    nowhere = {**aws, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    done = build_and_push(nowhere, "--no-push", "--tag", "local-only")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{REPOSITORY}:local-only"


def test_each_way_to_fail_is_one_sentence(image, registry, aws):
    no_region = {name: value for name, value in aws.items() if "REGION" not in name}
    done = build_and_push(no_region)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("no AWS region: give --region, or set AWS_REGION.")
    unreachable = {**aws, "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    done = build_and_push(unreachable)
    assert done.returncode == 1
    assert "AWS cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr
