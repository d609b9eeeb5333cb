"""The unmodified build_and_push.sh against a registry that answers for ECR's host name.

It builds a small repository of its own, whose image has one layer; jobs from the real image are in
test_training_job.py. The script runs on a PATH that holds the tools it names and no Python (the AWS
command line is a program with an interpreter of its own, named by its path); only variables say
where AWS is.
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
from support.ecr_emulation import missing_part, serve_registry
from support.engine import docker

pytestmark = [pytest.mark.docker, pytest.mark.aws]

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


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository with the script and an image that is pushed in a moment."""
    folder = tmp_path_factory.mktemp("repository")
    for name, content in {
        "code/train.py": "print('trained')",
        "docker/Dockerfile": "FROM scratch\nCOPY code /opt/ml/code\nCMD ['train']\n",
        "docker/hook.py": "",
        "docker/requirements_sagemaker.txt": "",
        "docker/requirements_sagemaker_torch.txt": "",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    shutil.copy(TOP / "build_and_push.sh", folder)
    return folder


@pytest.fixture(scope="module")
def build_and_push(aws, repository, tmp_path_factory):
    """build_and_push(*arguments, **variables): the script, as typed on a machine without Python."""
    tools = bare_path(tmp_path_factory.mktemp("tools"))
    # the AWS command line may be a Python program: it alone sees this machine's own path
    command = shutil.which("aws")
    assert command, "the AWS command line is not installed"
    (tools / "aws").write_text(f'#!/bin/sh\nPATH={os.environ["PATH"]} exec {command} "$@"\n')
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
            [str(repository / "build_and_push.sh"), "--repository", REPOSITORY, *arguments],
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_push_skip_and_pull(registry, build_and_push, repository, ecr, tmp_path):
    tag = "first"
    first = build_and_push("--tag", tag)
    assert first.returncode == 0, first.stderr
    uri = first.stdout.strip()
    host, _, name_and_digest = uri.partition("/")
    name, _, digest = name_and_digest.partition("@")
    assert (host, name) == (registry.host, REPOSITORY) and digest.startswith("sha256:")
    assert f"Account {ACCOUNT}, region {REGION}" in first.stderr
    assert (repository / ".local" / "image_uri").read_text().strip() == uri

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

    # one plain image in Docker's own format, as SageMaker takes it everywhere
    manifest = registry.manifest(REPOSITORY, tag)
    content = json.loads(manifest)
    assert content["mediaType"] == "application/vnd.docker.distribution.manifest.v2+json"
    assert {layer["mediaType"] for layer in content["layers"]} == {
        "application/vnd.docker.image.rootfs.diff.tar.gzip"
    }
    # the emulation learns of the push, as ECR would by itself
    ecr.put_image(
        repositoryName=REPOSITORY, imageManifest=manifest, imageTag=tag, imageDigest=digest
    )
    second = build_and_push("--tag", tag)
    assert (second.returncode, second.stdout.strip()) == (0, uri), second.stderr
    assert "nothing to build or push" in second.stderr and "Building" not in second.stderr

    # what is pulled by the digest is what was built
    built = docker("image", "inspect", "--format", "{{.Id}}", f"{registry.host}/{REPOSITORY}:{tag}")
    docker("rmi", "--force", f"{registry.host}/{REPOSITORY}:{tag}", uri, check=False)
    login = ("--config", str(tmp_path / "login"))
    who = ("--username", registry.user, "--password", registry.password)
    docker(*login, "login", registry.host, *who)
    docker(*login, "pull", uri)
    assert docker("image", "inspect", "--format", "{{.Id}}", uri) == built
    docker("rmi", "--force", uri, check=False)


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
