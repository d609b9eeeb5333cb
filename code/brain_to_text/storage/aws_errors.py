"""What the errors of AWS mean: whether asking again may help, the cause, and what to type.

Codes that only one service or one command can explain are where that service is called. Needs no
package: botocore is there where one of its errors is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import DataError
from .locations import KMS_KEY_VARIABLE, restore_advice
from .retry import PATIENCE, CredentialsRejectedError, MissingObjectError, RequestError

DENIED = ("AccessDenied", "AccessDeniedException", "AllAccessDisabled", "403")
AWS_LOGIN = "run 'aws configure' or 'aws sso login', or give the job's role access"
_LOGIN = "the session token has expired: get a new one with 'aws sso login'"
_CLOCK = "this machine's clock is off: set it, for instance by 'sudo timedatectl set-ntp true'"
_KEY = "there is no such access key (any more): run 'aws configure'"
_SETTINGS = "check bucket, prefix, AWS_PROFILE, AWS_REGION and AWS_ENDPOINT_URL_S3"
_PORTAL = (
    "something on the way answers in S3's place, as a login page of the network or a proxy does: "
    "log in there or correct HTTPS_PROXY and AWS_ENDPOINT_URL_S3"
)
# The credentials in use are worth renewing at once: the provider still believed in a token, or a
# key was rotated.
_REJECTED = {
    "ExpiredToken": _LOGIN,
    "ExpiredTokenException": _LOGIN,
    "TokenRefreshRequired": _LOGIN,
    "InvalidToken": "AWS_SESSION_TOKEN does not belong to the access key: unset it, or get new "
    "credentials with 'aws sso login'",
    "InvalidAccessKeyId": _KEY,
}
_REMEDIES = _REJECTED | {
    "InvalidClientTokenId": _KEY,
    "UnrecognizedClientException": _KEY,
    "RequestTimeTooSkewed": _CLOCK,
    "RequestExpired": _CLOCK,
    "SignatureDoesNotMatch": "the secret key does not belong to the access key, or a proxy on the "
    "way changes requests: check AWS_SECRET_ACCESS_KEY or run 'aws configure'",
    "NoSuchBucket": "list your buckets with 'aws s3 ls' and give one with --s3-bucket",
}


def remedy(code: str, words: str) -> str:
    """What to do about an error code of any service; "" where code and words do not tell."""
    if _about_a_key(code, words):
        action = re.search(r"kms:[A-Z]\w+", words)
        key = re.search(r"arn:[\w-]+:kms:[\w:/-]+", words)
        allowed = f"{action[0] if action else 'kms:Decrypt'} on {key[0] if key else 'the key'}"
        return (
            f"allow {allowed} for these credentials, in their policy and in the key's, and see "
            "that the key is enabled (for a job's role: deploy the stack with KmsKeyArn)"
        )
    if code in DENIED and "service control policy" in words:
        return "your organisation forbids it: ask which types, regions and networks it allows"
    return _REMEDIES.get(code, "")


def _about_a_key(code: str, words: str) -> bool:
    """Whether KMS refused, itself or through the service that answered."""
    return code.startswith("KMS.") or (code in DENIED and "kms:" in words)


@contextmanager
def explained(verb: str, url: str) -> Iterator[None]:
    """One attempt at a call of an S3 client.

    Args:
        verb, url: what is done, and to which prefix or object: "read", "s3://bucket/key".

    Raises:
        RequestError: what went wrong, and what to do about it.
    """
    try:
        yield
    except RequestError:
        raise
    except Exception as error:  # clients have no common class of errors
        raise fault_of(error, verb, url) from error


def fault_of(error: BaseException, verb: str, url: str) -> RequestError:
    """What an error of s3fs, botocore, its transport or a provider of credentials means."""
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    if isinstance(error.__cause__, exceptions.ClientError):
        error = error.__cause__  # s3fs makes Python's own errors of S3's
    if isinstance(error, exceptions.ClientError):
        about = error.response.get("ResponseMetadata", {})
        answer = error.response.get("Error", {})
        return answer_fault(
            verb,
            url,
            str(about.get("HTTPStatusCode", "")),
            str(answer.get("Code", "")),
            str(answer.get("Message", "")),
            html=str(about.get("HTTPHeaders", {}).get("content-type", "")).startswith("text/html"),
        )
    cause = named_cause(error)
    if isinstance(error, ResponseParserError):
        if is_web_page(str(error).partition("b'")[2].encode()):
            return web_page_fault()
        return RequestError(f"an answer that is not S3's ({cause})", _PORTAL)
    if isinstance(error, TimeoutError):
        return RequestError("no complete answer in time")
    if isinstance(error, (exceptions.NoCredentialsError, exceptions.PartialCredentialsError)):
        return RequestError("no AWS credentials were found", AWS_LOGIN, PATIENCE)
    if isinstance(error, exceptions.CredentialRetrievalError):
        return CredentialsRejectedError(cause, AWS_LOGIN)
    if isinstance(error, exceptions.NoRegionError):
        return RequestError("no AWS region is set", "type 'export AWS_REGION=us-east-1'", PATIENCE)
    of_settings = (
        exceptions.ParamValidationError,
        exceptions.ProfileNotFound,
        exceptions.InvalidRegionError,
        exceptions.ConfigParseError,
        exceptions.ConfigNotFound,
        ValueError,
    )
    if isinstance(error, of_settings):
        return RequestError(cause, _SETTINGS, PATIENCE)
    if isinstance(error, (exceptions.ConnectionError, ConnectionError)):
        advice = "check the network, the region and AWS_ENDPOINT_URL_S3"
        return RequestError(f"the S3 endpoint cannot be reached ({cause})", advice)
    return RequestError(cause)


def answer_fault(
    verb: str, url: str, status: str, code: str, words: str = "", html: bool = False
) -> RequestError:
    """What an error answer of S3 means; its own words are part of the cause.

    Args:
        verb, url: see `explained`.
        status: of HTTP, three digits.
        code: of S3, as "AccessDenied"; the status again where there was none.
        words: S3's message, where it is at hand.
        html: the answer is a web page.
    """
    text = f"HTTP {status} {code}" if status != code else f"HTTP {status}"
    if html or code in ("302", "303", "307", "511", "407"):
        return web_page_fault(text)
    words = " ".join(words.split())[:500].rstrip(".")
    text += f": {words}" if words and code != status else ""
    advice = remedy(code, words)
    if "412" in (status, code) or code == "PreconditionFailed":
        return replaced_fault("the server says that its ETag is another one", url)
    if code in _REJECTED:
        return CredentialsRejectedError(text, advice)
    if code in ("NoSuchKey", "404"):
        return RequestError(text, "check that the object exists", 1, MissingObjectError)
    if code == "InvalidObjectState":
        return RequestError(f"it is archived ({text})", restore_advice(url), 1)
    if code in DENIED and not advice:
        action = "s3:GetObject and s3:ListBucket"
        if verb == "write":
            action = f"s3:PutObject (or set {KMS_KEY_VARIABLE} to the ARN of a KMS key where the "
            action += "bucket's policy demands the encryption header)"
        advice = f"allow {action} for these credentials; test with 'aws s3 ls {url}'"
    if _about_a_key(code, words):
        text = f"access denied by KMS ({text})"
    elif code in DENIED:
        text = f"access denied ({text})"
    elif code == "NoSuchBucket":
        text = f"there is no bucket '{url.split('/')[2]}' ({text})"
    return RequestError(text, advice, PATIENCE if advice else None)


def replaced_fault(reason: str, url: str) -> RequestError:
    """The object is no longer the one that the manifest, or the reader, began with."""
    return RequestError(
        f"it was replaced since it was indexed ({reason})",
        f"run `python code/prepare_dataset.py index {url.rsplit('/', 2)[0]}` and start again",
        1,
        DataError,
    )


def is_web_page(body: bytes | memoryview) -> bool:
    """True for the beginning of an HTML page: a captive portal's, or a proxy's."""
    start = bytes(body[:200]).lstrip().lower()
    return start.startswith((b"<!doctype html", b"<html", b"<head", b"<body"))


def web_page_fault(text: str = "HTTP 200") -> RequestError:
    """Somebody else answers in S3's place."""
    return RequestError(f"a web page instead of S3's answer ({text})", _PORTAL, PATIENCE)


def named_cause(error: BaseException) -> str:
    """An error of a library on one line, with the name of its class."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {reason}"[:300]
