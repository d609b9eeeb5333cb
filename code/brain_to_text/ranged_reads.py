"""One ranged read of one object: the seam between trials and where their bytes lie.

A reader makes exactly one attempt per call; when to try again is not its business. It lives on
fsspec's event loop, which runs in a thread of this process: nothing here survives a fork.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import re
import time
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import botocore.exceptions
import fsspec.asyn
import s3fs
from fsspec.exceptions import FSTimeoutError

from .errors import StorageError

# Answers after which the credentials in use are worth renewing at once: a token that the provider
# still believed in, a key that was rotated, a clock that is off.
_EXPIRED = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestExpired",
    "RequestTimeTooSkewed",
    "TokenRefreshRequired",
}
_FINAL = {"AccessDenied", "AllAccessDisabled", "NoSuchBucket", "NoSuchKey", "403", "404"}
_RENEWAL_INTERVAL_SECONDS = 2.0
_S3_ETAG = re.compile(r"[0-9a-f]{32}(-\d+)?")


class ReadError(Exception):
    """An attempt that failed and may work when repeated; the message is the cause."""


class CredentialsRejectedError(ReadError):
    """The server no longer accepts the credentials the request was signed with."""


class PersistentError(ReadError):
    """An answer that seldom changes by asking again: access denied, no such object."""


class ObjectReplacedError(Exception):
    """The object under this key is not the one in the manifest."""


class RangedReader(Protocol):
    """One attempt at one byte range; implementations share no state between attempts."""

    loop: asyncio.AbstractEventLoop

    async def read(self, key: str, offset: int, length: int, etag: str) -> bytearray:
        """Whatever arrived, at most length + 1 bytes.

        Args:
            key: object, relative to the store's root.
            offset, length: the range in bytes.
            etag: of the file in the manifest. Where it is of another kind (the data was indexed in
                a folder, then uploaded, or the reverse) the first ETag seen here takes its place.

        Raises:
            ReadError: this attempt failed.
            ObjectReplacedError: the object's ETag is another one.
        """

    async def renew_credentials(self) -> None:
        """Ask the credential provider again; at most once in a few seconds."""

    async def close(self) -> None:
        """Close connections."""


def open_reader(url: str, concurrency: int, read_timeout_seconds: float) -> RangedReader:
    """The reader for a store's URL: `s3://bucket/prefix`, or a local folder."""
    if url.startswith("s3://"):
        return S3RangedReader(url, concurrency, read_timeout_seconds)
    return LocalRangedReader(Path(url), concurrency)


class S3RangedReader:
    """Ranged GETs through s3fs's client, with s3fs's and botocore's own retries turned off.

    Credentials come from botocore's provider chain and are renewed by the provider; they are never
    copied out of it. The endpoint is AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL where set.

    Args:
        url: s3://bucket/prefix.
        concurrency: connections kept.
        read_timeout_seconds: silence after which an attempt fails.

    Raises:
        StorageError: profile, region or endpoint make no sense.
    """

    def __init__(self, url: str, concurrency: int, read_timeout_seconds: float) -> None:
        self.bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.loop = fsspec.asyn.get_loop()
        self._file_system = s3fs.S3FileSystem(
            asynchronous=True,
            loop=self.loop,
            skip_instance_cache=True,
            use_listings_cache=False,
            config_kwargs={
                "retries": {"mode": "standard", "total_max_attempts": 1},
                "max_pool_connections": concurrency,
                "connect_timeout": read_timeout_seconds,
                "read_timeout": read_timeout_seconds,
                "parameter_validation": False,
                # S3 has no checksum of a part of an object; ours is the manifest's CRC.
                "response_checksum_validation": "when_required",
            },
        )
        try:
            # making a client takes a good part of a second: not at the first read's expense
            fsspec.asyn.sync(self.loop, self._file_system.set_session)
        except (botocore.exceptions.BotoCoreError, ValueError) as error:
            raise StorageError(
                f"No S3 client for {url}: {error}; check AWS_PROFILE, AWS_REGION and "
                "AWS_ENDPOINT_URL_S3."
            ) from error
        self._renewed = 0.0
        self._renewal = asyncio.Lock()
        self._previous_client: Any = None  # requests in flight may still be using it
        self._seen: dict[
            str, str
        ] = {}  # first ETag of files whose own in the manifest is no S3 one

    async def read(self, key: str, offset: int, length: int, etag: str) -> bytearray:
        expected = etag if _S3_ETAG.fullmatch(etag) else self._seen.get(key)
        conditions = {"IfMatch": f'"{expected}"'} if expected else {}
        try:
            client = await self._file_system.set_session()
            answer = await client.get_object(
                Bucket=self.bucket,
                Key=self._prefix + key,
                Range=f"bytes={offset}-{offset + length - 1}",
                **conditions,
            )
            body = answer["Body"]
            try:
                found = answer.get("ETag", "").strip('"')
                if found and found != (expected or self._seen.setdefault(key, found)):
                    raise ObjectReplacedError(f"its ETag is {found}, no longer {expected}")
                return await _read_at_most(body, length)
            finally:
                body.close()
        except (
            botocore.exceptions.BotoCoreError,
            botocore.exceptions.ClientError,
            aiohttp.ClientError,
            FSTimeoutError,
            OSError,
        ) as error:
            raise _fault(error) from error

    async def renew_credentials(self) -> None:
        async with self._renewal:
            if time.monotonic() - self._renewed < _RENEWAL_INTERVAL_SECONDS:
                return
            outdated = self._file_system._s3
            await self._file_system.set_session(refresh=True)
            self._renewed = time.monotonic()
            if self._previous_client is not None:
                await self._previous_client.close()
            self._previous_client = outdated

    async def close(self) -> None:
        for client in (self._previous_client, self._file_system._s3):
            if client is not None:
                await client.close()


async def _read_at_most(body: Any, length: int) -> bytearray:
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


def _fault(error: Exception) -> ReadError | ObjectReplacedError:
    """What a failed attempt means, in words."""
    if isinstance(error, botocore.exceptions.ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", "")
        text = f"HTTP {status} {code}" if str(status) != code else f"HTTP {status}"
        if code in ("PreconditionFailed", "412") or status == 412:
            return ObjectReplacedError("the server says that its ETag is another one")
        if code in _EXPIRED:
            return CredentialsRejectedError(text)
        return PersistentError(text) if code in _FINAL else ReadError(text)
    if isinstance(error, botocore.exceptions.NoCredentialsError):
        return PersistentError("no credentials found by the AWS provider chain")
    reason = " ".join(str(error).split()) or type(error).__name__
    return ReadError(f"{type(error).__name__}: {reason}"[:300])


class LocalRangedReader:
    """Ranged reads of files in a folder, on threads: the same path as S3 without a network."""

    def __init__(self, folder: Path, concurrency: int) -> None:
        self._folder = folder
        self.loop = fsspec.asyn.get_loop()
        self._seen: dict[str, str] = {}
        self._threads = concurrent.futures.ThreadPoolExecutor(
            max_workers=min(concurrency, 8), thread_name_prefix="local-read"
        )

    async def read(self, key: str, offset: int, length: int, etag: str) -> bytearray:
        return await self.loop.run_in_executor(self._threads, self._read, key, offset, length, etag)

    def _read(self, key: str, offset: int, length: int, etag: str) -> bytearray:
        try:
            with (self._folder / key).open("rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                found = f"{status.st_mtime_ns}-{status.st_size}"
                expected = self._seen.setdefault(key, found) if _S3_ETAG.fullmatch(etag) else etag
                if found != expected:
                    raise ObjectReplacedError(f"its time and size are {found}, not {expected}")
                file.seek(offset)
                span = bytearray(length)
                filled = 0
                while count := file.readinto(memoryview(span)[filled:]):
                    filled += count
                del span[filled:]
                return span
        except FileNotFoundError as error:
            raise PersistentError("no such file") from error
        except OSError as error:
            raise ReadError(f"{type(error).__name__}: {error.strerror}") from error

    async def renew_credentials(self) -> None:
        return

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
