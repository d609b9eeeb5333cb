"""The unmodified build_and_push.sh against a registry that answers for ECR's host name, and a job
from what it pushed.

The script runs on a PATH that holds the tools it names and no Python (the AWS command line is a
program with an interpreter of its own, named by its path); only variables say where AWS is.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from support.bare_path import bare_path
from support.container_job import BUCKET
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


def find(program):
    found = shutil.which(program)
    assert found, f"{program} is not installed"
    return found


@pytest.fixture(scope="module")
def build_and_push(aws, tmp_path_factory):
    """build_and_push(*arguments, **variables): the script, as typed on a machine without Python."""
    tools = bare_path(tmp_path_factory.mktemp("tools"))
    # the AWS command line may be a Python program: it alone sees this machine's own path
    (tools / "aws").write_text(f'#!/bin/sh\nPATH={os.environ["PATH"]} exec {find("aws")} "$@"\n')
    (tools / "aws").chmod(0o755)
    folders = [tools]
    for place in os.get_exec_path():  # each docker in a folder of its own, in their order
        if (Path(place) / "docker").exists():
            folders.append(tmp_path_factory.mktemp("docker"))
            (folders[-1] / "docker").symlink_to(Path(place) / "docker")
    path = os.pathsep.join(map(str, folders))
    assert shutil.which("python3", path=path) is None

    def run(*arguments, without=(), **variables):
        env = {**os.environ, **aws, "PATH": path, **variables}
        for name in without:
            env.pop(name, None)
        return subprocess.run(
            [str(TOP / "build_and_push.sh"), "--cpu", "--repository", REPOSITORY, *arguments],
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


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


def test_push_skip_pull_and_train(
    image, registry, build_and_push, ecr, own_image_uri, make_job, container_s3, tmp_path
):
    # the image fixture has built these layers, with whatever base this machine has
    # (a tag by name: the revision's own may change while somebody edits the tree)
    tag = "first"
    first = build_and_push("--tag", tag)
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
    content = json.loads(manifest)
    # one plain image in Docker's own format, as SageMaker takes it everywhere
    assert content["mediaType"] == "application/vnd.docker.distribution.manifest.v2+json"
    assert {layer["mediaType"] for layer in content["layers"]} == {
        "application/vnd.docker.image.rootfs.diff.tar.gzip"
    }
    ecr.put_image(
        repositoryName=REPOSITORY, imageManifest=manifest, imageTag=tag, imageDigest=digest
    )
    second = build_and_push("--tag", tag)
    assert second.returncode == 0, second.stderr
    assert second.stdout.strip() == uri
    assert "nothing to build or push" in second.stderr
    assert "Building" not in second.stderr

    docker("rmi", "--force", f"{registry.host}/{REPOSITORY}:{tag}", uri, check=False)
    login = tmp_path / "login"
    docker(
        *("--config", str(login), "login", registry.host),
        *("--username", registry.user, "--password", registry.password),
    )
    docker("--config", str(login), "pull", uri)
    result = make_job({"output-s3-uri": f"s3://{BUCKET}/sagemaker-outputs/pushed"}, image=uri).run()
    assert result.exit_code == 0, result.log
    logs = container_s3.root / BUCKET / "sagemaker-outputs/pushed/logs"
    assert "Finished at step 6" in (logs / "training_log").read_text()
    assert list((logs / "tensorboard").iterdir())


def test_each_way_to_fail_is_one_sentence(build_and_push, ecr):
    def repositories():  # those of other tests too: one process has one emulated account
        return [r["repositoryName"] for r in ecr.describe_repositories()["repositories"]]

    before = repositories()

    def said(*arguments, **settings):
        done = build_and_push("--tag", "never", *arguments, **settings)
        assert (done.returncode, done.stdout) == (1, ""), done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr.strip().splitlines()[-1]

    no_region = said(without=["AWS_DEFAULT_REGION", "AWS_REGION"])
    assert no_region.endswith("no AWS region: give --region, or set AWS_REGION.")
    keys = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]
    assert "no AWS credentials" in said(without=keys, AWS_EC2_METADATA_DISABLED="true")
    nowhere = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    assert "AWS cannot be reached" in said(**nowhere)
    refused = said("--repository", "A Bad Name")
    assert "AWS refused DescribeRepositories: " in refused or "InvalidParameter" in refused
    assert repositories() == before
