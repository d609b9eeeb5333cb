"""What S3's errors mean: whether asking again may help, the cause in words, what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp
import botocore.exceptions
import botocore.parsers
from fsspec.exceptions import FSTimeoutError

from .aws_remedies import DENIED, REJECTED, is_about_a_key, remedy
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
    advice = remedy(code, words)
    if code in REJECTED:
        return CredentialsRejectedError(text, advice)
    if code in ("NoSuchKey", "404"):
        return MissingError(text, "check that the object exists")
    if code == "InvalidObjectState":
        return ArchivedError(f"it is archived ({text})")
    if is_about_a_key(code, words):
        return PersistentError(f"access denied by KMS ({text})", advice)
    if code in DENIED:
        return PersistentError(f"access denied ({text})", advice)
    if code == "NoSuchBucket":
        advice = "list your buckets with 'aws s3 ls' and give one with --s3-bucket"
    return PersistentError(text, advice) if advice else ReadError(text)


def is_web_page(body: bytes | bytearray | memoryview) -> bool:
    """True for the beginning of an HTML page: a captive portal's, or a proxy's."""
    start = bytes(body[:200]).lstrip().lower()
    return start.startswith((b"<!doctype html", b"<html", b"<head", b"<body"))


def web_page_fault(text: str = "HTTP 200") -> ReadError:
    return PersistentError(f"a web page instead of S3's answer ({text})", _PORTAL)


def named_cause(error: BaseException) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {reason}"[:300]
