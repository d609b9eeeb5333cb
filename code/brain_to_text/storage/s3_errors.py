"""What S3's errors mean: whether asking again may help, the cause in words, what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp
import botocore.exceptions
import botocore.parsers
from fsspec.exceptions import FSTimeoutError

from .retry import (
    ArchivedError,
    CredentialsRejectedError,
    MissingError,
    ObjectReplacedError,
    PersistentError,
    ReadError,
)

# What providers of credentials raise: botocore's own, STS's answers, files that are not there,
# answers without a key, credentials that come expired.
PROVIDER_ERRORS = (
    botocore.exceptions.BotoCoreError,
    botocore.exceptions.ClientError,
    OSError,
    KeyError,
    ValueError,
    RuntimeError,
)
# What a call raises: the same, broken connections, and answers that make no sense.
CALL_ERRORS = (
    *PROVIDER_ERRORS,
    aiohttp.ClientError,
    FSTimeoutError,
    botocore.parsers.ResponseParserError,
    TypeError,
    AttributeError,
    IndexError,
)
AWS_LOGIN = "run 'aws configure' or 'aws sso login', or give the job's role access"
# Answers after which the credentials in use are worth renewing at once: a token that the provider
# still believed in, a key that was rotated.
_EXPIRED = "the session token has expired: get a new one with 'aws sso login'"
_REJECTED = {
    **dict.fromkeys(("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"), _EXPIRED),
    "InvalidToken": "AWS_SESSION_TOKEN does not belong to the access key: unset it, or get new "
    "credentials with 'aws sso login'",
    "InvalidAccessKeyId": "there is no such access key (any more): run 'aws configure'",
}
_CLOCK = "this machine's clock is off: set it, for instance by 'sudo timedatectl set-ntp true'"
_DENIED = {"AccessDenied", "AllAccessDisabled", "403"}
_FINAL = {
    "NoSuchBucket": "list your buckets with 'aws s3 ls' and give one with --s3-bucket",
    "RequestTimeTooSkewed": _CLOCK,
    "RequestExpired": _CLOCK,
    "SignatureDoesNotMatch": "the secret key does not belong to the access key, or a proxy on the "
    "way changes requests: check AWS_SECRET_ACCESS_KEY or run 'aws configure'",
}
SETTINGS = "check bucket, prefix, AWS_PROFILE, AWS_REGION and AWS_ENDPOINT_URL_S3"
_PORTAL = (
    "something on the way answers in S3's place, as a login page of the network or a proxy does: "
    "log in there or correct HTTPS_PROXY and AWS_ENDPOINT_URL_S3"
)
_NO_KEYS = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
)
_OF_SETTINGS = (
    botocore.exceptions.ParamValidationError,
    botocore.exceptions.ProfileNotFound,
    botocore.exceptions.InvalidRegionError,
    botocore.exceptions.ConfigParseError,
    botocore.exceptions.ConfigNotFound,
)
_UNREACHABLE = (
    botocore.exceptions.ConnectionError,
    botocore.exceptions.ConnectTimeoutError,
    aiohttp.ClientConnectionError,
    ConnectionError,
)


@contextmanager
def explained() -> Iterator[None]:
    """One attempt at a call of s3fs or botocore.

    Raises:
        ReadError: what went wrong, and what to do about it.
    """
    try:
        yield
    except CALL_ERRORS as error:
        raise fault_of(error) from error


def fault_of(error: BaseException) -> ReadError:
    """What an error of s3fs, botocore, its transport or a provider of credentials means."""
    if isinstance(error.__cause__, botocore.exceptions.ClientError):
        error = error.__cause__  # s3fs makes Python's own errors of S3's
    if isinstance(error, botocore.exceptions.ClientError):
        about = error.response.get("ResponseMetadata", {})
        kind = str(about.get("HTTPHeaders", {}).get("content-type", ""))
        answer = error.response.get("Error", {})
        return answer_fault(
            str(about.get("HTTPStatusCode", "")),
            str(answer.get("Code", "")),
            str(answer.get("Message", "")),
            web_page=kind.startswith("text/html"),
        )
    if isinstance(error, botocore.parsers.ResponseParserError):
        if is_web_page(str(error).partition("b'")[2].encode()):
            return web_page_fault()
        return ReadError(f"an answer that is not S3's ({named_cause(error)})", _PORTAL)
    cause = named_cause(error)
    if isinstance(error, FSTimeoutError):
        return ReadError("no complete answer in time")
    if isinstance(error, _NO_KEYS):
        return PersistentError("no AWS credentials were found", AWS_LOGIN)
    if isinstance(error, botocore.exceptions.CredentialRetrievalError):
        return CredentialsRejectedError(cause, AWS_LOGIN)
    if isinstance(error, botocore.exceptions.NoRegionError):
        return PersistentError("no AWS region is set", "type 'export AWS_REGION=us-east-1'")
    if isinstance(error, _OF_SETTINGS):
        return PersistentError(cause, SETTINGS)
    if isinstance(error, _UNREACHABLE):
        advice = "check the network, the region and AWS_ENDPOINT_URL_S3"
        return ReadError(f"the S3 endpoint cannot be reached ({cause})", advice)
    return ReadError(cause)


def answer_fault(status: str, code: str, words: str = "", web_page: bool = False) -> ReadError:
    """What an error answer of the server means; its own words are part of the cause.

    Args:
        status: of HTTP, three digits.
        code: of S3, as "AccessDenied"; the status again where there was none.
        words: S3's message, where it is at hand.
        web_page: the answer is HTML.
    """
    text = f"HTTP {status} {code}" if status != code else f"HTTP {status}"
    if web_page or code in ("302", "303", "307", "511", "407"):
        return web_page_fault(text)
    words = " ".join(words.split())[:500].rstrip(".")
    text += f": {words}" if words and code != status else ""
    if "412" in (status, code) or code == "PreconditionFailed":
        return ObjectReplacedError("the server says that its ETag is another one")
    if code in _REJECTED:
        return CredentialsRejectedError(text, _REJECTED[code])
    if code in ("NoSuchKey", "404"):
        return MissingError(text, "check that the object exists")
    if code == "InvalidObjectState":
        return ArchivedError(f"it is archived ({text})")
    if code.startswith("KMS.") or (code in _DENIED and "kms:" in words):
        return PersistentError(f"access denied by KMS ({text})", _kms_advice(words))
    if code in _DENIED:
        return PersistentError(f"access denied ({text})")
    if code in _FINAL:
        return PersistentError(text, _FINAL[code])
    return ReadError(text)


def _kms_advice(words: str) -> str:
    action = re.search(r"kms:[A-Z]\w+", words)
    key = re.search(r"arn:[\w-]+:kms:[\w:/-]+", words)
    allowed = f"{action[0] if action else 'kms:Decrypt'} on {key[0] if key else 'the key'}"
    return (
        f"allow {allowed} for these credentials, in their policy and in the key's, and see that "
        "the key is enabled (for a job's role: deploy the stack with KmsKeyArn)"
    )


def is_web_page(body: bytes | bytearray | memoryview) -> bool:
    """True for the beginning of an HTML page: a captive portal's, or a proxy's."""
    start = bytes(body[:200]).lstrip().lower()
    return start.startswith((b"<!doctype html", b"<html", b"<head", b"<body"))


def web_page_fault(text: str = "HTTP 200") -> ReadError:
    return PersistentError(f"a web page instead of S3's answer ({text})", _PORTAL)


def named_cause(error: BaseException) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {reason}"[:300]
