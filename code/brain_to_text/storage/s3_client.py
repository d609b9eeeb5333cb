"""botocore's S3 client through s3fs, one attempt per call, and what its failures mean.

Credentials, region and endpoint come from the standard provider chain of the AWS SDK (environment,
profile, container or instance role), which also renews them; nothing here copies a key.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import aiohttp
import botocore.credentials
import botocore.exceptions
import botocore.parsers
import fsspec.asyn
import s3fs
from fsspec.exceptions import FSTimeoutError

from .attempts import (
    CredentialsRejectedError,
    MissingError,
    ObjectReplacedError,
    PersistentError,
    ReadError,
)
from .locations import split_s3_url

T = TypeVar("T")

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
_CALL_ERRORS = (
    *PROVIDER_ERRORS,
    aiohttp.ClientError,
    FSTimeoutError,
    botocore.parsers.ResponseParserError,
    TypeError,
    AttributeError,
    IndexError,
)
_AWS_LOGIN = "run 'aws configure' or 'aws sso login', or give the job's role access"
# Answers after which the credentials in use are worth renewing at once: a token that the provider
# still believed in, a key that was rotated.
_REJECTED = {
    "ExpiredToken": "the session token has expired: get a new one with 'aws sso login' (a job's "
    "role renews its own)",
    "ExpiredTokenException": "the session token has expired: get a new one with 'aws sso login'",
    "TokenRefreshRequired": "the session token has expired: get a new one with 'aws sso login'",
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
_SETTINGS = "check bucket, prefix, AWS_PROFILE, AWS_REGION and AWS_ENDPOINT_URL_S3"
_PORTAL = (
    "something on the way answers in S3's place, as a login page of the network or a proxy does: "
    "log in there or correct HTTPS_PROXY and AWS_ENDPOINT_URL_S3"
)


# What an error means that is no answer of S3's: the fault, its cause ("{}": the error's own words),
# the advice.
_MEANINGS: tuple[tuple[tuple[type[Exception], ...], type[ReadError], str, str], ...] = (
    (
        (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError),
        PersistentError,
        "no AWS credentials were found",
        _AWS_LOGIN,
    ),
    ((botocore.exceptions.CredentialRetrievalError,), CredentialsRejectedError, "{}", _AWS_LOGIN),
    (
        (botocore.exceptions.NoRegionError,),
        PersistentError,
        "no AWS region is set",
        "type 'export AWS_REGION=us-east-1'",
    ),
    (
        (
            botocore.exceptions.ParamValidationError,
            botocore.exceptions.ProfileNotFound,
            botocore.exceptions.InvalidRegionError,
            botocore.exceptions.ConfigParseError,
            botocore.exceptions.ConfigNotFound,
        ),
        PersistentError,
        "{}",
        _SETTINGS,
    ),
    (
        (
            botocore.exceptions.ConnectionError,
            botocore.exceptions.ConnectTimeoutError,
            aiohttp.ClientConnectionError,
            ConnectionError,
        ),
        ReadError,
        "the S3 endpoint cannot be reached ({})",
        "check the network, the region and AWS_ENDPOINT_URL_S3",
    ),
)


class S3Client:
    """One client of this process, made on first use, on fsspec's event loop.

    Args:
        url: s3://bucket/prefix.
        connections: kept at once.
        silence_seconds: of the server, after which an attempt fails.

    Raises:
        StorageError: the URL names no place.
    """

    def __init__(self, url: str, connections: int, silence_seconds: float) -> None:
        self.bucket, prefix = split_s3_url(url)
        self.root = f"{prefix}/" if prefix else ""
        self.loop: asyncio.AbstractEventLoop = fsspec.asyn.get_loop()
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        self._file_system = s3fs.S3FileSystem(
            asynchronous=True,
            loop=self.loop,
            skip_instance_cache=True,
            use_listings_cache=False,
            config_kwargs={
                "retries": {"mode": "standard", "total_max_attempts": 1},
                "max_pool_connections": connections,
                "connect_timeout": silence_seconds,
                "read_timeout": silence_seconds,
                # S3 has no checksum of a part of an object; ours is the manifest's CRC.
                "response_checksum_validation": "when_required",
                # servers other than S3 are rarely reachable as BUCKET.HOST
                **({"s3": {"addressing_style": "path"}} if endpoint else {}),
            },
        )
        # the one in use last; before it the one that requests in flight may still be using
        self._clients: list[Any] = []
        # a client that nobody closes would keep its sockets
        weakref.finalize(self, _release, self.loop, self._clients)

    async def connect(self) -> Any:
        """aiobotocore's client."""
        client = await self._file_system.set_session()
        if not self._clients or self._clients[-1] is not client:
            self._clients.append(client)
        return client

    async def call(self, request: Callable[[Any], Awaitable[T]]) -> T:
        """`request(client)`, once.

        Raises:
            ReadError, ObjectReplacedError: what went wrong, and what to do about it.
        """
        try:
            client = await self.connect()
        except _CALL_ERRORS as error:
            if isinstance(error, ValueError):  # of an endpoint or a profile
                raise PersistentError(one_line(error), _SETTINGS) from error
            raise fault_of(error) from error
        try:
            return await request(client)
        except _CALL_ERRORS as error:
            raise fault_of(error) from error

    async def renew_credentials(self) -> bool:
        """Make a client anew, so that the providers are asked again.

        Returns:
            False where it is no use: the same credentials, and they come from no provider that
            renews them.

        Raises:
            CredentialsRejectedError: it has none to give.
        """
        try:
            before = await _keys_of(self._clients[-1]) if self._clients else None
            await self._file_system.set_session(refresh=True)
            after = await _keys_of(await self.connect())
        except PROVIDER_ERRORS as error:
            cause = f"credentials cannot be renewed ({one_line(error)})"
            raise CredentialsRejectedError(cause, _AWS_LOGIN) from error
        while len(self._clients) > 2:
            await self._clients.pop(0).close()
        return after is None or after != before

    async def close(self) -> None:
        """Close connections; a later call would open them anew."""
        self._file_system._s3 = None
        await _close(self._clients)


async def _close(clients: list[Any]) -> None:
    while clients:
        await clients.pop().close()


def _release(loop: asyncio.AbstractEventLoop, clients: list[Any]) -> None:
    if clients and loop.is_running():
        asyncio.run_coroutine_threadsafe(_close(clients), loop)


async def _keys_of(client: Any) -> Any:
    """The credentials that a client signs with, None where their provider renews them."""
    credentials = client._request_signer._credentials
    if isinstance(credentials, botocore.credentials.RefreshableCredentials):
        return None
    return await credentials.get_frozen_credentials()


async def read_at_most(body: Any, length: int) -> bytearray:
    """The body, cut off one byte after `length`: a server that ignores the range sends it all."""
    span = bytearray(length)
    view = memoryview(span)
    filled = 0
    while chunk := await body.read(length - filled or 1):
        if filled == length:
            return span + chunk
        view[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    view.release()
    del span[filled:]
    return span


def fault_of(error: Exception) -> ReadError | ObjectReplacedError:
    """What an error of botocore, its transport or a provider of credentials means."""
    if isinstance(error, botocore.exceptions.ClientError):
        about = error.response.get("ResponseMetadata", {})
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = str(about.get("HTTPStatusCode", ""))
        return answer_fault(status, code, b"<html" if _is_of_a_web_page(about) else b"")
    if isinstance(error, botocore.parsers.ResponseParserError):
        if is_web_page(str(error).partition("b'")[2].encode()):
            return web_page_fault()
        return ReadError(f"an answer that is not S3's ({one_line(error)})", _PORTAL)
    for kinds, fault, cause, advice in _MEANINGS:
        if isinstance(error, kinds):
            return fault(cause.format(one_line(error)), advice)
    return ReadError(one_line(error))


def answer_fault(status: str, code: str, body: bytes = b"") -> ReadError | ObjectReplacedError:
    """What an error answer of the server means.

    Args:
        status: of HTTP, three digits.
        code: of S3, as "AccessDenied"; the status again where there was none.
        body: of the answer, where it is at hand.
    """
    text = f"HTTP {status} {code}" if status != code else f"HTTP {status}"
    if "412" in (status, code) or code == "PreconditionFailed":
        return ObjectReplacedError("the server says that its ETag is another one")
    if is_web_page(body) or code in ("302", "303", "307", "511", "407"):
        return web_page_fault(text)
    if code in _REJECTED:
        return CredentialsRejectedError(text, _REJECTED[code])
    if code in ("NoSuchKey", "404"):
        return MissingError(text, "check that the object exists")
    if code in _DENIED:
        return PersistentError(f"access denied ({text})")
    if code in _FINAL:
        return PersistentError(text, _FINAL[code])
    return ReadError(text)


def is_web_page(body: bytes | bytearray | memoryview) -> bool:
    """True for the beginning of an HTML page: a captive portal's, or a proxy's."""
    start = bytes(body[:200]).lstrip().lower()
    return start.startswith((b"<!doctype html", b"<html", b"<head", b"<body"))


def _is_of_a_web_page(about: dict[str, Any]) -> bool:
    return str(about.get("HTTPHeaders", {}).get("content-type", "")).startswith("text/html")


def web_page_fault(text: str = "HTTP 200") -> ReadError:
    return PersistentError(f"a web page instead of S3's answer ({text})", _PORTAL)


def one_line(error: BaseException) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {reason}"[:300]
