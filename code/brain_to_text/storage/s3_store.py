"""An S3 prefix as an object store: every call with a deadline, retries, its cause and advice."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import fsspec.asyn

from ..errors import StorageError
from .locations import KMS_KEY_VARIABLE, ObjectInfo, s3_url, split_s3_url
from .retry import (
    Attempts,
    MissingError,
    ObjectReplacedError,
    PersistentError,
    ReadError,
    RetryPolicy,
)
from .s3_client import S3Client, read_at_most
from .s3_errors import is_web_page, web_page_fault

T = TypeVar("T")
PART_BYTES = 16 << 20  # whole objects are read and written in parts of this size, in parallel
_AT_ONCE = 8  # parts
_CONNECTIONS = 64
_MOST_OBJECTS = 1_000_000  # in one listing
_PAGE_BYTES = 1 << 20  # of a listing, about


class S3Store:
    """An S3 prefix, for the process that made it.

    Args:
        url: s3://bucket/prefix.
        retry: what one request, a part of an object, or a page of a listing may cost in time.

        kms_key: see `open_store`.

    Raises:
        StorageError: see `split_s3_url`.
    """

    def __init__(
        self, url: str, *, retry: RetryPolicy | None = None, kms_key: str | None = None
    ) -> None:
        self.bucket, self.prefix = split_s3_url(url)
        self.url = s3_url(self.bucket, self.prefix)
        self._retry = retry or RetryPolicy()
        self._client: S3Client | None = None
        key = kms_key or os.environ.get(KMS_KEY_VARIABLE)
        self._encryption = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": key} if key else {}

    def list(self) -> dict[str, ObjectInfo]:
        root = f"{self.prefix}/" if self.prefix else ""
        found: dict[str, ObjectInfo] = {}
        token: str | None = None
        while True:
            request = functools.partial(_page, {"Bucket": self.bucket, "Prefix": root}, token)
            entries, following = self._run(self._repeated("list", "", request, _PAGE_BYTES))
            for entry in entries:
                name = entry.key.removeprefix(root)
                if name and not name.endswith("/"):
                    found[name] = dataclasses.replace(entry, key=name)
            if following is None:
                return found
            if following == token or not entries:
                raise self._error("list", "", "the server never comes to the listing's end")
            if len(found) > _MOST_OBJECTS:
                cause = f"there are more than {_MOST_OBJECTS:,} objects"
                raise self._error("list", "", cause, "give the prefix of the dataset itself")
            token = following

    def read(self, key: str, size: int | None = None) -> bytes:
        size = self._size(key) if size is None else size
        if 0 < size <= PART_BYTES:
            return self._run(self._all_parts(key, [(None, size)]))
        parts = [(start, min(PART_BYTES, size - start)) for start in range(0, size, PART_BYTES)]
        return self._run(self._all_parts(key, parts))

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        return self._run(self._all_parts(key, [(offset, length)]))

    def write(self, key: str, data: bytes) -> None:
        self._run(self._write(key, data))

    def exists(self, key: str) -> bool:
        try:
            self._size(key)
        except _NotFoundError:
            return False
        return True

    def close(self) -> None:
        """Close connections; the next call opens them anew."""
        client, self._client = self._client, None
        if client is not None:
            fsspec.asyn.sync(client.loop, client.close)

    # --- one request ------------------------------------------------------------------------------

    @property
    def client(self) -> S3Client:
        """Made on first use."""
        if self._client is None:
            self._client = S3Client(self.url, _CONNECTIONS, self._retry.read_timeout_seconds)
        return self._client

    def _object(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.client.root + key}

    def _run(self, coroutine: Awaitable[T]) -> T:
        async def run() -> T:
            return await coroutine

        return fsspec.asyn.sync(self.client.loop, run)

    async def _repeated(
        self, verb: str, key: str, request: Callable[[Any], Awaitable[T]], n_bytes: int
    ) -> T:
        """The result of a request, asked for until it is there, final, or out of time.

        Raises:
            StorageError: what was asked, how often, the last cause, and what to do.
        """
        client = self.client
        attempts = Attempts(self._retry, f"Still trying to {verb} {self._place(key)}")
        while True:
            try:
                await client.call(_nothing)  # making it takes time that is not the server's
                if attempts.count == 0:
                    attempts.started = time.monotonic()
                return await attempts.run(lambda: client.call(request), n_bytes)
            except ObjectReplacedError as fault:
                raise self._error(verb, key, str(fault)) from fault
            except MissingError as fault:
                raise self._error(verb, key, str(fault), fault.advice, _NotFoundError) from fault
            except ReadError as fault:
                try:
                    await attempts.wait_after(fault, client.renew_credentials)
                except ReadError:
                    raise self._gave_up(verb, key, attempts) from fault

    def _place(self, key: str) -> str:
        return f"{self.url}/{key}" if key else self.url

    def _gave_up(self, verb: str, key: str, attempts: Attempts) -> StorageError:
        cause, advice = attempts.last_cause, attempts.advice
        if "NoSuchBucket" in cause:
            cause = f"there is no bucket '{self.bucket}'"
        if cause.startswith("access denied"):
            action = "s3:PutObject" if verb == "write" else "s3:GetObject and s3:ListBucket"
            advice = f"allow {action} on it for these credentials"
        times = f"after {attempts.count} attempts in {attempts.elapsed_seconds:.1f} s"
        return self._error(verb, key, f"{cause}, {times}", advice)

    def _error(
        self,
        verb: str,
        key: str,
        cause: str,
        advice: str = "",
        kind: type[StorageError] = StorageError,
    ) -> StorageError:
        test = f"test with 'aws s3 ls {self.url}/'"
        advice = f"{advice}; {test}" if advice else test
        return kind(f"Cannot {verb} {self._place(key)}: {cause}; {advice}.")

    # --- objects ----------------------------------------------------------------------------------

    def _size(self, key: str) -> int:
        async def head(client: Any) -> int:
            answer = await client.head_object(**self._object(key))
            if answer.get("ContentType", "").startswith("text/html"):
                raise web_page_fault()
            return int(answer["ContentLength"])

        try:
            return self._run(self._repeated("read", key, head, 0))
        except _NotFoundError:
            raise
        except StorageError:
            # the answer to HEAD has no body, and so no reason
            self._run(self._all_parts(key, [(0, 1)]))
            raise

    async def _all_parts(self, key: str, parts: Sequence[tuple[int | None, int]]) -> bytes:
        slots = asyncio.Semaphore(_AT_ONCE)

        async def one(offset: int | None, length: int) -> tuple[str, bytes]:
            async def get(client: Any) -> tuple[str, bytes]:
                span = {}
                if offset is not None:
                    span["Range"] = f"bytes={offset}-{offset + length - 1}"
                answer = await client.get_object(**self._object(key), **span)
                return answer.get("ETag", ""), await _body(answer["Body"], length)

            async with slots:
                return await self._repeated("read", key, get, length)

        answers = await _together(one(*part) for part in parts)
        if len({etag for etag, _ in answers}) > 1:
            raise self._error("read", key, "it was replaced while it was read", "try again")
        return b"".join(data for _, data in answers)

    async def _write(self, key: str, data: bytes) -> None:
        place = self._object(key)

        async def ask(method: str, n_bytes: int, **more: Any) -> Any:
            def request(client: Any) -> Awaitable[Any]:
                return getattr(client, method)(**place, **more)

            return await self._repeated("write", key, request, n_bytes)

        if len(data) <= PART_BYTES:
            await ask("put_object", len(data), Body=data, **self._encryption)
            return
        begun = await ask("create_multipart_upload", 0, **self._encryption)
        place["UploadId"] = begun["UploadId"]
        slots = asyncio.Semaphore(_AT_ONCE)

        async def put(number: int, body: bytes) -> dict[str, Any]:
            async with slots:
                answer = await ask("upload_part", len(body), PartNumber=number, Body=body)
            return {"PartNumber": number, "ETag": answer["ETag"]}

        starts = range(0, len(data), PART_BYTES)
        try:
            parts = await _together(
                put(number, data[start : start + PART_BYTES])
                for number, start in enumerate(starts, start=1)
            )
            await ask("complete_multipart_upload", len(data), MultipartUpload={"Parts": parts})
        except BaseException:
            with contextlib.suppress(StorageError):
                await ask("abort_multipart_upload", 0)
            raise


class _NotFoundError(StorageError):
    """There is no such object."""


async def _nothing(client: Any) -> None:
    """No request."""


async def _page(
    place: dict[str, str], token: str | None, client: Any
) -> tuple[builtins.list[ObjectInfo], str | None]:
    """A page's objects by their whole keys, and the token of the next page if there is one."""
    more = {"ContinuationToken": token} if token else {}
    answer = await client.list_objects_v2(**place, **more)
    if not answer.keys() & {"Name", "KeyCount", "IsTruncated", "Contents"}:
        raise web_page_fault()
    entries = [
        ObjectInfo(
            str(entry["Key"]),
            int(entry["Size"]),
            str(entry.get("ETag", "")).strip('"'),
            str(entry.get("StorageClass", "")),
        )
        for entry in answer.get("Contents", ())
    ]
    return entries, answer["NextContinuationToken"] if answer.get("IsTruncated") else None


async def _body(body: Any, length: int) -> bytes:
    """Exactly `length` bytes of an answer.

    Raises:
        PersistentError: there are fewer or more, or it is a web page.
    """
    try:
        data = bytes(await read_at_most(body, length))
    finally:
        body.close()
    if is_web_page(data):
        raise web_page_fault()
    if len(data) != length:
        got = len(data) if len(data) < length else "more"
        raise PersistentError(f"got {got} of {length} bytes", "upload it again if it is cut off")
    return data


async def _together(coroutines: Iterable[Coroutine[Any, Any, T]]) -> builtins.list[T]:
    """All results; the first failure cancels the others."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
