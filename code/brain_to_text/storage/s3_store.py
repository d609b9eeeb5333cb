"""An S3 prefix as an object store: every call with a deadline, retries, its cause and advice."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import s3fs

from ..errors import StorageError
from .aws_errors import explained, is_web_page, replaced_fault, web_page_fault
from .locations import KMS_KEY_VARIABLE, S3_ETAG, ObjectInfo, s3_url, split_s3_url
from .retry import PATIENCE, MissingObjectError, RequestError, Retries, RetryPolicy
from .s3_clients import S3Clients

T = TypeVar("T")
PART_BYTES = 16 << 20  # larger objects are read and written in parts of this size, in parallel
_AT_ONCE = 8  # parts
_RETRIES_OF_PARTS = 5  # by s3fs, so that one part's failure does not repeat the others
_MOST_PAGES = 1000  # of a listing, each of a thousand objects
_PAGE_BYTES = 1 << 20  # of a listing, about


class S3Store:
    """An S3 prefix, for the process that made it and its threads.

    Args:
        url: s3://bucket/prefix.
        retry, kms_key: see `open_store`.

    Raises:
        StorageError: see `split_s3_url`.
    """

    def __init__(
        self, url: str, *, retry: RetryPolicy | None = None, kms_key: str | None = None
    ) -> None:
        self.bucket, self.prefix = split_s3_url(url)
        self.url = s3_url(self.bucket, self.prefix)
        self._root = f"{self.prefix}/" if self.prefix else ""
        policy = retry or RetryPolicy()
        self._clients = S3Clients(self.url, policy)
        self.retries = Retries(policy, self._clients.renew)
        self._seen: dict[str, str] = {}  # first ETag of files whose ETag in the manifest isn't S3's
        key = kms_key or os.environ.get(KMS_KEY_VARIABLE)
        self._encryption = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": key} if key else {}

    def list(self) -> dict[str, ObjectInfo]:
        found: dict[str, ObjectInfo] = {}
        where: dict[str, Any] = {"Bucket": self.bucket, "Prefix": self._root}
        if not self.bucket.endswith("--x-s3"):  # directory buckets archive nothing
            where["OptionalObjectAttributes"] = ["RestoreStatus"]
        for _ in range(_MOST_PAGES):
            page = self._run("list", "", functools.partial(_page, where))
            for entry in page.get("Contents", ()):
                key = str(entry["Key"]).removeprefix(self._root)
                if key and not key.endswith("/"):
                    found[key] = _info(key, entry)
            if not page.get("IsTruncated"):
                return found
            where["ContinuationToken"] = page.get("NextContinuationToken", "")
        endless = RequestError(
            f"the listing does not end after {_MOST_PAGES:,} pages",
            "give the prefix of the dataset itself",
        )
        raise endless.sentence(f"list {self.url}")

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        if length is not None and length <= PART_BYTES:
            return self._part(key, offset, length)
        before = self._head(key)
        end = int(before["ContentLength"]) if length is None else offset + length
        starts = range(offset, end, PART_BYTES)
        with ThreadPoolExecutor(_AT_ONCE, "read-part") as pool:
            data = b"".join(
                pool.map(lambda start: self._part(key, start, min(PART_BYTES, end - start)), starts)
            )
        if len(starts) > 1 and self._head(key).get("ETag") != before.get("ETag"):
            replaced = RequestError("it was replaced while it was read", "try again")
            raise replaced.sentence(f"read {self._url_of(key)}")
        return data

    def read_range(self, key: str, offset: int, length: int, etag: str) -> bytes | memoryview:
        """As `ObjectStore.read_range`. s3fs shows no ETag: there the CRC-32 decides alone."""
        expected = etag if S3_ETAG.fullmatch(etag) else self._seen.get(key)
        found, span = self._clients.read_range(key, offset, length, expected)
        if found and etag and found != (expected or self._seen.setdefault(key, found)):
            reason = f"its ETag is {found}, no longer {expected}"
            raise replaced_fault(reason, self._url_of(key))
        if len(span) != length and is_web_page(span):
            raise web_page_fault()
        return span

    def write(self, key: str, data: bytes) -> None:
        in_parts = len(data) >= 2 * PART_BYTES  # as s3fs decides
        parts = {"chunksize": PART_BYTES, "max_concurrency": _AT_ONCE}

        def put(s3: s3fs.S3FileSystem, limit: float) -> None:
            # what is cut off by a time limit would leave its parts in the bucket, where they cost
            more = {**parts, **self._encryption, "timeout": None if in_parts else limit}
            s3.pipe_file(f"{self.bucket}/{self._root}{key}", data, **more)

        self._run("write", key, put, len(data), _RETRIES_OF_PARTS if in_parts else 1)

    def exists(self, key: str) -> bool:
        try:
            self._head(key)
        except MissingObjectError:
            return False
        return True

    def close(self) -> None:
        self._clients.close()

    # --- one request ------------------------------------------------------------------------------

    def _url_of(self, key: str) -> str:
        return f"{self.url}/{key}" if key else self.url

    def _run(
        self,
        verb: str,
        key: str,
        request: Callable[[s3fs.S3FileSystem, float], T],
        n_bytes: int = _PAGE_BYTES,
        retries: int = 1,
    ) -> T:
        """The result of a request to s3fs, made until it is there, final, or out of time.

        Args:
            request: called with the client and the seconds that it may take.
            retries: attempts of s3fs itself within one of ours.

        Raises:
            BrainToTextError: see `Retries.run`.
        """
        limit = self.retries.policy.attempt_seconds(n_bytes)
        url = self._url_of(key)

        def attempt() -> T:
            client = self._clients.s3fs_client(retries)
            with explained(verb, url):
                return request(client, limit)

        return self._repeated(verb, key, attempt)

    def _repeated(self, verb: str, key: str, attempt: Callable[[], T]) -> T:
        advice = f"test with 'aws s3 ls {self.url}/'"
        return self.retries.run(f"{verb} {self._url_of(key)}", attempt, advice)

    def _part(self, key: str, offset: int, length: int) -> bytes:
        """Exactly these bytes, in one answer."""

        def attempt() -> bytes:
            span = self.read_range(key, offset, length, "")
            if is_web_page(span):
                raise web_page_fault()
            if len(span) != length:
                got = len(span) if len(span) < length else "more"
                cause = f"got {got} of {length} bytes"
                raise RequestError(cause, "upload it again if it is cut off", PATIENCE)
            return bytes(span)

        return self._repeated("read", key, attempt) if length else b""

    def _head(self, key: str) -> dict[str, Any]:
        def head(s3: s3fs.S3FileSystem, limit: float) -> dict[str, Any]:
            where = {"Bucket": self.bucket, "Key": self._root + key}
            answer: dict[str, Any] = s3.call_s3("head_object", timeout=limit, **where)
            if answer.get("ContentType", "").startswith("text/html"):
                raise web_page_fault()
            return answer

        try:
            return self._run("read", key, head)
        except MissingObjectError:
            raise
        except StorageError:
            self._part(key, 0, 1)  # the answer to HEAD has no body, and so no reason
            raise


def _page(where: dict[str, Any], s3: s3fs.S3FileSystem, limit: float) -> dict[str, Any]:
    page: dict[str, Any] = s3.call_s3("list_objects_v2", timeout=limit, **where)
    if not page.keys() & {"Name", "KeyCount", "IsTruncated", "Contents"}:
        raise web_page_fault()
    return page


def _info(key: str, entry: dict[str, Any]) -> ObjectInfo:
    storage_class = str(entry.get("StorageClass", ""))
    if "RestoreExpiryDate" in entry.get("RestoreStatus", {}):
        storage_class = "STANDARD"  # an archived object's copy that can be read for a while
    etag = str(entry.get("ETag", "")).strip('"')
    return ObjectInfo(key, int(entry["Size"]), etag, storage_class)
