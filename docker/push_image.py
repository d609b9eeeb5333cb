"""Build the training image and push it to ECR: what ./build_and_push.sh runs.

Prints progress on stderr and, as the only line on stdout, the digest URI; the same URI is kept in
.local/image_uri, where the launcher finds its default.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from build_image import REPOSITORY, ImageError, build_image, docker_client, source_revision

DEFAULT_REPOSITORY = "brain-to-text-training"
PLATFORM = "linux/amd64"  # every SageMaker training instance with an NVIDIA GPU
IMAGE_URI_FILE = REPOSITORY / ".local" / "image_uri"
DAYS_UNTAGGED = 14
LIFECYCLE = {
    "rules": [
        {
            "rulePriority": 1,
            "description": f"drop untagged images after {DAYS_UNTAGGED} days",
            "selection": {
                "tagStatus": "untagged",
                "countType": "sinceImagePushed",
                "countUnit": "days",
                "countNumber": DAYS_UNTAGGED,
            },
            "action": {"type": "expire"},
        }
    ]
}


@dataclass(frozen=True)
class Target:
    """Where an image goes.

    Attributes:
        registry: "ACCOUNT.dkr.ecr.REGION.amazonaws.com".
        repository: the repository's name.
        tag: one version; tags are immutable.
    """

    registry: str
    repository: str
    tag: str

    @property
    def uri(self) -> str:
        return f"{self.registry}/{self.repository}:{self.tag}"

    def by_digest(self, digest: str) -> str:
        return f"{self.registry}/{self.repository}@{digest}"


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        uri = build_only(options) if options.no_push else build_and_push(options)
    except ImageError as problem:
        print(f"build_and_push: {problem}", file=sys.stderr)
        return 1
    print(uri)
    return 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="build_and_push.sh")
    parser.add_argument("--repository", default=DEFAULT_REPOSITORY)
    parser.add_argument("--region")
    parser.add_argument("--tag")
    parser.add_argument("--no-push", action="store_true")
    parser.add_argument("--base-image", default=os.environ.get("BASE_IMAGE") or None)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--mlflow", action="store_true")
    parser.add_argument("--kms-key")
    parser.add_argument("--require-clean", action="store_true")
    parser.add_argument("--platform", default=PLATFORM)
    return parser.parse_args(arguments)


def build_only(options: argparse.Namespace) -> str:
    """Build; the local tag."""
    tag = f"{options.repository}:{options.tag or default_tag(options)}"
    say(f"Building {tag} for {options.platform}; nothing will be pushed.")
    build(tag, options)
    return tag


def build(tag: str, options: argparse.Namespace) -> None:
    """Build what the options describe as `tag`."""
    build_image(
        [tag],
        cpu=options.cpu,
        mlflow=options.mlflow,
        base_image=options.base_image,
        platform=options.platform,
    )


def build_and_push(options: argparse.Namespace) -> str:
    """Build and push unless the tag is there already; the digest URI.

    Raises:
        ImageError: no region or credentials, ECR refused, a dirty tree with --require-clean, or the
            build or push failed.
    """
    import boto3

    session = boto3.Session(region_name=options.region)
    if not session.region_name:
        raise ImageError("no AWS region: give --region, or set AWS_REGION.")
    tag = options.tag or default_tag(options)
    with explained():
        identity = session.client("sts").get_caller_identity()
        ecr = session.client("ecr")
        say(f"Account {identity['Account']}, region {session.region_name}, as {identity['Arn']}.")
        registry = ensure_repository(ecr, options.repository, options.kms_key)
        target = Target(registry, options.repository, tag)
        digest = pushed_digest(ecr, target)
        if digest:
            say(f"{target.uri} is already there: nothing to build or push.")
        else:
            say(f"Building {target.uri} for {options.platform}.")
            build(target.uri, options)
            push(ecr, target)
            digest = pushed_digest(ecr, target) or local_digest(target)
    uri = target.by_digest(digest)
    IMAGE_URI_FILE.parent.mkdir(exist_ok=True)
    IMAGE_URI_FILE.write_text(uri + "\n")
    say("The launcher takes this image by default; its digest URI:")
    return uri


def default_tag(options: argparse.Namespace) -> str:
    """The git revision; a tree with changes is marked by a hash of them, or refused.

    Raises:
        ImageError: not a git repository, or uncommitted changes with --require-clean.
    """
    revision = source_revision()
    if revision == "unknown":
        raise ImageError("this folder is not a git repository: name the image with --tag.")
    tag = revision.removesuffix("-dirty")[:12]
    if revision.endswith("-dirty"):
        if options.require_clean:
            raise ImageError(
                "code/ or docker/ has uncommitted changes: commit, or leave out --require-clean."
            )
        tag = f"{tag}-dirty-{hash_of_changes()}"
        say(f"The tree has uncommitted changes: the tag says so ({tag}).")
    # tags are immutable, so every kind of image needs one of its own
    return tag + ("-cpu" if options.cpu else "") + ("-mlflow" if options.mlflow else "")


def hash_of_changes() -> str:
    """Eight hex digits over what differs from HEAD in what the image is made of."""
    digest = hashlib.sha256()
    paths = ["--", "code", "docker", "LICENSE"]
    digest.update(_git("diff", "HEAD", *paths))
    for name in _git("ls-files", "-z", "--others", "--exclude-standard", *paths).split(b"\0"):
        if name:
            digest.update(name + b"\0" + (REPOSITORY / os.fsdecode(name)).read_bytes())
    return digest.hexdigest()[:8]


# --- ECR


def ensure_repository(ecr: Any, name: str, kms_key: str | None) -> str:
    """The registry's host name; the repository is created if and only if it does not exist."""
    try:
        found = ecr.describe_repositories(repositoryNames=[name])["repositories"][0]
    except ecr.exceptions.RepositoryNotFoundException:
        encryption = (
            {"encryptionType": "KMS", "kmsKey": kms_key}
            if kms_key
            else {"encryptionType": "AES256"}
        )
        found = ecr.create_repository(
            repositoryName=name,
            imageTagMutability="IMMUTABLE",
            imageScanningConfiguration={"scanOnPush": True},
            encryptionConfiguration=encryption,
        )["repository"]
        ecr.put_lifecycle_policy(repositoryName=name, lifecyclePolicyText=json.dumps(LIFECYCLE))
        say(f"Created the ECR repository {name} (immutable tags, scan on push, encrypted).")
    return str(found["repositoryUri"]).split("/", 1)[0]


def pushed_digest(ecr: Any, target: Target) -> str | None:
    """The digest of this tag in ECR, or None."""
    try:
        found = ecr.describe_images(
            repositoryName=target.repository, imageIds=[{"imageTag": target.tag}]
        )
    except ecr.exceptions.ImageNotFoundException:
        return None
    return str(found["imageDetails"][0]["imageDigest"])


def push(ecr: Any, target: Target) -> None:
    """Push with a login that lives in a temporary folder and is gone afterwards.

    Raises:
        ImageError: the registry refused the login or the push.
    """
    grant = ecr.get_authorization_token()["authorizationData"][0]
    user, _, password = base64.b64decode(grant["authorizationToken"]).decode().partition(":")
    docker = docker_client()
    with tempfile.TemporaryDirectory(prefix="ecr-login-") as folder:
        login = subprocess.run(
            [docker, "--config", folder, "login", target.registry]
            + ["--username", user, "--password-stdin"],
            input=password,
            capture_output=True,
            text=True,
            check=False,
        )
        if login.returncode:
            raise ImageError(f"{target.registry} refused the login: {_last_line(login.stderr)}.")
        say(f"Pushing {target.uri}.")
        pushed = subprocess.run(
            [docker, "--config", folder, "push", target.uri],
            stdout=sys.stderr,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    if pushed.returncode:
        raise ImageError(f"pushing {target.uri} failed: {_last_line(pushed.stderr)}.")


def local_digest(target: Target) -> str:
    """The digest the engine noted when it pushed."""
    noted = subprocess.run(
        [docker_client(), "image", "inspect", "--format", "{{json .RepoDigests}}", target.uri],
        capture_output=True,
        text=True,
        check=True,
    )
    wanted = f"{target.registry}/{target.repository}@"
    for entry in json.loads(noted.stdout):
        if entry.startswith(wanted):
            return str(entry.removeprefix(wanted))
    raise ImageError(f"{target.uri} was pushed but the engine noted no digest: push it again.")


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn AWS's errors into one sentence."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
    from botocore.parsers import ResponseParserError

    try:
        yield
    except NoCredentialsError as error:
        raise ImageError(
            "no AWS credentials: run `aws configure`, or set AWS_PROFILE, then try again."
        ) from error
    except ClientError as error:
        said = error.response.get("Error", {})
        raise ImageError(
            f"AWS refused {error.operation_name}: {said.get('Code')}: {said.get('Message')} "
            "(the permissions that are needed are in code/README_SAGEMAKER.md)."
        ) from error
    except (BotoCoreError, ResponseParserError) as error:
        raise ImageError(f"AWS cannot be reached: {error}.") from error


# --- small things


def _git(*arguments: str) -> bytes:
    return subprocess.run(
        ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, check=True
    ).stdout


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if not re.match(r"WARNING", line)]
    return lines[-1].rstrip(".") if lines else "no message"


def say(sentence: str) -> None:
    print(f"==> {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
