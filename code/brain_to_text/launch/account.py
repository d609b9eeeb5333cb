"""The AWS account a command talks to: session, region, clients, and AWS errors as sentences."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError, ProfileNotFound
from botocore.parsers import ResponseParserError

from ..errors import JobError
from ..storage.aws_errors import DENIED, remedy
from ..storage.store import check_aws_variables

# What a call raises that AWS refused or did not get, or that a proxy's page answered.
NO_ANSWER = (BotoCoreError, ClientError, ResponseParserError)
# What refusals mean to somebody at the launcher.
_MAY_NOT = "your user may not do this: attach code/aws/launcher_policy.json"
_REMEDIES = {
    **dict.fromkeys(DENIED, _MAY_NOT),
    "ResourceInUse": "a job of that name exists: give another --job-name",
    "ResourceLimitExceeded": "raise the quota in Service Quotas, or choose another --instance-type",
    "ThrottlingException": "AWS asks for patience: try again in a minute",
}


class AwsAccount:
    """One boto3 session with a known region; clients are made once, on first use.

    Args:
        region: AWS region; None for AWS_REGION, AWS_DEFAULT_REGION or the profile's region.
        profile: profile of the AWS configuration files; None for the default chain.

    Raises:
        JobError: no region is known, or the profile does not exist.
        StorageError: see `check_aws_variables`.
    """

    def __init__(self, region: str | None = None, profile: str | None = None) -> None:
        import boto3  # half a second that --help and --dry-run need not wait

        check_aws_variables()
        chosen = region or os.environ.get("AWS_REGION") or None
        try:
            self.session = boto3.Session(region_name=chosen, profile_name=profile)
        except ProfileNotFound as error:
            raise JobError(f"{error}: choose one of `aws configure list-profiles`.") from error
        if self.session.region_name is None:
            lacking = "No AWS region is set"
            if self.session.get_credentials() is None:
                lacking = "No AWS credentials were found, and no AWS region is set"
            raise JobError(f"{lacking}: set --region, AWS_REGION or run `aws configure`.")
        self.region: str = self.session.region_name
        self._clients: dict[tuple[str, str], Any] = {}

    def client(self, service: str, region: str | None = None) -> Any:
        """The boto3 client of a service, in this account's region unless another is given."""
        key = (service, region or self.region)
        if key not in self._clients:
            self._clients[key] = self.session.client(service, region_name=key[1])
        return self._clients[key]

    def objects(self, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
        """Every object under a prefix, as S3 lists it.

        Raises:
            ClientError: S3 refused.
        """
        pages = self.client("s3").get_paginator("list_objects_v2")
        for page in pages.paginate(
            Bucket=bucket, Prefix=prefix, OptionalObjectAttributes=["RestoreStatus"]
        ):
            yield from page.get("Contents", [])

    @property
    def dns_suffix(self) -> str:
        """What the names of AWS's hosts end in, in this region's partition."""
        return "amazonaws.com.cn" if self.region.startswith("cn-") else "amazonaws.com"

    @cached_property
    def identity(self) -> dict[str, str]:
        """Caller identity: Account, Arn, UserId. Raises JobError when the credentials fail."""
        with explained("asking AWS who you are"):
            return dict(self.client("sts").get_caller_identity())


def error_code(error: Exception) -> str:
    """The AWS error code of a botocore ClientError, "" for anything else."""
    response = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def sentence(error: Exception, doing: str) -> str:
    """One sentence for a botocore error: what was being done, what AWS answered, what to do."""
    code, name = error_code(error), type(error).__name__
    if code:
        words = " ".join(str(error.response["Error"].get("Message", "")).split())  # type: ignore[attr-defined]
        advice = remedy(code, words) or _REMEDIES.get(code, "")
        refusal = f"AWS refused while {doing} ({code}: {words.rstrip('.')})"
        return f"{refusal}: {advice}." if advice else f"{refusal}."
    if name in ("NoCredentialsError", "PartialCredentialsError"):
        return (
            f"No AWS credentials were found while {doing}: run `aws configure`, or set AWS_PROFILE."
        )
    words = " ".join(str(error).split()).rstrip(".")
    return f"AWS could not be reached while {doing} ({name}: {words}): check network and endpoint."


@contextmanager
def explained(doing: str, **known: str) -> Iterator[None]:
    """Turn botocore's errors inside the block into a JobError of one sentence.

    Args:
        known: sentences by AWS error code, instead of the general one.
    """
    try:
        yield
    except NO_ANSWER as error:
        raise JobError(known.get(error_code(error)) or sentence(error, doing)) from error
