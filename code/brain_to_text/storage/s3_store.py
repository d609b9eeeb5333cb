"""An S3 prefix as an object store: every call with a deadline, retries, its cause and advice.

Requests go through s3fs. Credentials, region and endpoint come from the standard provider chain of
the AWS SDK (environment, profile, container or instance role), which also renews them.
"""

from __future__ import annotations

import datetime
import functools
import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import botocore.credentials
import botocore.exceptions
import botocore.session
import s3fs

from ..errors import StorageError
from .locations import KMS_KEY_VARIABLE, ObjectInfo, restore_advice, s3_url, split_s3_url
from .retry import (
    Announcer,
    ArchivedError,
    Attempts,
    CredentialsRejectedError,
    FinalError,
    MissingError,
    PersistentError,
    ReadError,
    RetryPolicy,
)
from .s3_errors import (
    AWS_LOGIN,
    PROVIDER_ERRORS,
    SETTINGS,
    explained,
    is_web_page,
    named_cause,
    web_page_fault,
)

T = TypeVar("T")
PART_BYTES = 16 << 20  # larger objects are read and written in parts of this size, in parallel
_AT_ONCE = 8  # parts
_RETRIES_OF_PARTS = 5  # by s3fs, so that one part's failure does not repeat the others
_CONNECTIONS = 64
_MOST_OBJECTS = 1_000_000  # in one listing
_PAGE_BYTES = 1 << 20  # of a listing, about
_RENEWAL_INTERVAL_SECONDS = 2.0


class S3Store:
    """An S3 prefix, for the process that made it and its threads.

    Args:
        url: s3://bucket/prefix.
        retry: what one request, or a page of a listing, may cost in time.
        kms_key: see `open_store`.

    Raises:
        StorageError: see `split_s3_url`.
    """

    def __init__(
        self, url: str, *, retry: RetryPolicy | None = None, kms_key: str | None = None
    ) -> None:
        self.bucket, self.prefix = split_s3_url(url)
        self.url = s3_url(self.bucket, self.prefix)
        self._root = f"{self.prefix}/" if self.prefix else ""
        self._retry = retry or RetryPolicy()
        self._connection = S3Connection(_CONNECTIONS, self._retry.read_timeout_seconds)
        self._announce = Announcer()
        key = kms_key or os.environ.get(KMS_KEY_VARIABLE)
        self._encryption = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": key} if key else {}

    def list(self) -> dict[str, ObjectInfo]:
        found: dict[str, ObjectInfo] = {}
        token: str | None = None
        while True:
            page = self._repeated("list", "", functools.partial(self._page, token))
            for entry in page.get("Contents", ()):
                key = str(entry["Key"]).removeprefix(self._root)
                if key and not key.endswith("/"):
                    found[key] = _info(key, entry)
            if not page.get("IsTruncated"):
                return found
            following = page["NextContinuationToken"]
            if following == token or not page.get("Contents"):
                raise self._error("list", "", "the server never comes to the listing's end")
            if len(found) > _MOST_OBJECTS:
                cause = f"there are more than {_MOST_OBJECTS:,} objects"
                raise self._error("list", "", cause, "give the prefix of the dataset itself")
            token = following

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        if length is None:
            length = int(self._head(key)["ContentLength"]) - offset
        if length <= 0:
            return b""
        if offset == 0 and length > PART_BYTES:
            return self._read_large(key, length)
        span = {"start": offset, "end": offset + length}
        return self._repeated(
            "read",
            key,
            lambda s3, limit: _exactly(s3.cat_file(self._path(key), timeout=limit, **span), length),
            length,
        )

    def _read_large(self, key: str, length: int) -> bytes:
        before = self._head(key)["ETag"]
        parts = {"chunksize": PART_BYTES, "max_concurrency": _AT_ONCE}
        data = self._repeated(
            "read",
            key,
            lambda s3, limit: _exactly(
                s3.cat_file(self._path(key), timeout=limit, **parts), length
            ),
            length,
            retries=_RETRIES_OF_PARTS,
        )
        if self._head(key)["ETag"] != before:
            raise self._error("read", key, "it was replaced while it was read", "try again")
        return data

    def write(self, key: str, data: bytes) -> None:
        in_parts = len(data) >= 2 * PART_BYTES  # as s3fs decides
        parts = {"chunksize": PART_BYTES, "max_concurrency": _AT_ONCE}

        def put(s3: s3fs.S3FileSystem, limit: float) -> None:
            # what is cut off by a time limit would leave its parts in the bucket, where they cost
            more = {**parts, **self._encryption, "timeout": None if in_parts else limit}
            s3.pipe_file(self._path(key), data, **more)

        self._repeated("write", key, put, len(data), _RETRIES_OF_PARTS if in_parts else 1)

    def exists(self, key: str) -> bool:
        try:
            self._head(key)
        except _NotFoundError:
            return False
        return True

    def close(self) -> None:
        """Close connections; the next call opens them anew."""
        self._connection.close()

    # --- one request ------------------------------------------------------------------------------

    def _path(self, key: str) -> str:
        return f"{self.bucket}/{self._root}{key}"

    def _repeated(
        self,
        verb: str,
        key: str,
        request: Callable[[s3fs.S3FileSystem, float], T],
        n_bytes: int = 0,
        retries: int = 1,
    ) -> T:
        """The result of a request, asked for until it is there, final, or out of time.

        Args:
            request: called with the client and the seconds that it may take.
            retries: attempts of s3fs itself within one of ours.

        Raises:
            StorageError: what was asked, how often, the last cause, and what to do.
        """
        limit = self._retry.attempt_seconds(n_bytes or _PAGE_BYTES)
        attempts = Attempts(self._retry, f"{verb} {self._place(key)}", self._announce)

        def attempt() -> T:
            client = self._connection.client(retries)
            with explained():
                return request(client, limit)

        try:
            return attempts.run(attempt, self._connection.credentials.renew)
        except ReadError as fault:
            raise self._gave_up(verb, key, attempts, fault) from fault

    def _page(self, token: str | None, s3: s3fs.S3FileSystem, limit: float) -> dict[str, Any]:
        where: dict[str, Any] = {"Bucket": self.bucket, "Prefix": self._root}
        if token is not None:
            where["ContinuationToken"] = token
        if not self.bucket.endswith("--x-s3"):  # directory buckets archive nothing
            where["OptionalObjectAttributes"] = ["RestoreStatus"]
        page: dict[str, Any] = s3.call_s3("list_objects_v2", timeout=limit, **where)
        if not page.keys() & {"Name", "KeyCount", "IsTruncated", "Contents"}:
            raise web_page_fault()
        return page

    def _head(self, key: str) -> dict[str, Any]:
        def head(s3: s3fs.S3FileSystem, limit: float) -> dict[str, Any]:
            where = {"Bucket": self.bucket, "Key": self._root + key}
            answer: dict[str, Any] = s3.call_s3("head_object", timeout=limit, **where)
            if answer.get("ContentType", "").startswith("text/html"):
                raise web_page_fault()
            return answer

        try:
            return self._repeated("read", key, head)
        except _NotFoundError:
            raise
        except StorageError:
            self.read(key, 0, 1)  # the answer to HEAD has no body, and so no reason
            raise

    # --- what to say ------------------------------------------------------------------------------

    def _place(self, key: str) -> str:
        return f"{self.url}/{key}" if key else self.url

    def _gave_up(self, verb: str, key: str, attempts: Attempts, fault: ReadError) -> StorageError:
        cause, advice = str(fault), fault.advice
        if "NoSuchBucket" in cause:
            cause = f"there is no bucket '{self.bucket}' ({cause})"
        if isinstance(fault, ArchivedError):
            advice = restore_advice(self._place(key))
        elif cause.startswith("access denied") and not advice:
            action = "s3:PutObject" if verb == "write" else "s3:GetObject and s3:ListBucket"
            advice = f"allow {action} on it for these credentials"
            if verb == "write" and not self._encryption:
                advice += (
                    f", or set {KMS_KEY_VARIABLE} to the ARN of a KMS key where the bucket's "
                    "policy demands the encryption header"
                )
        if not isinstance(fault, FinalError):
            cause += f", after {attempts.count} attempts in {attempts.elapsed_seconds:.1f} s"
        missing = isinstance(fault, MissingError)
        return self._error(verb, key, cause, advice, _NotFoundError if missing else StorageError)

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


class _NotFoundError(StorageError):
    """There is no such object."""


def _info(key: str, entry: dict[str, Any]) -> ObjectInfo:
    storage_class = str(entry.get("StorageClass", ""))
    if "RestoreExpiryDate" in entry.get("RestoreStatus", {}):
        storage_class = "STANDARD"  # an archived object's copy that can be read for a while
    etag = str(entry.get("ETag", "")).strip('"')
    return ObjectInfo(key, int(entry["Size"]), etag, storage_class)


def _exactly(data: bytes, length: int) -> bytes:
    """An answer's `length` bytes.

    Raises:
        PersistentError: there are fewer or more, or it is a web page.
    """
    if is_web_page(data):
        raise web_page_fault()
    if len(data) != length:
        got = len(data) if len(data) < length else "more"
        raise PersistentError(f"got {got} of {length} bytes", "upload it again if it is cut off")
    return data


class S3Connection:
    """s3fs's clients of this process, made on first use and anew after credentials were rejected.

    Args:
        connections: kept at once.
        silence_seconds: of the server, after which an attempt fails.
    """

    def __init__(self, connections: int, silence_seconds: float) -> None:
        self._connections, self._silence = connections, silence_seconds
        self._clients: dict[tuple[int, int], s3fs.S3FileSystem] = {}
        self._lock = threading.Lock()
        self.credentials = Credentials()

    def client(self, retries: int = 1) -> s3fs.S3FileSystem:
        """The client that makes up to `retries` attempts at each request itself.

        Raises:
            ReadError: profile, region or endpoint make no sense.
        """
        kind = (retries, self.credentials.renewals)
        with self._lock, explained():
            if kind not in self._clients:
                # s3fs closes an earlier client once nobody reads through it any more
                self._clients = {k: c for k, c in self._clients.items() if k[1] == kind[1]}
                try:
                    self._clients[kind] = self._connected(retries)
                except ValueError as error:  # of an endpoint or a profile
                    raise PersistentError(named_cause(error), SETTINGS) from error
            return self._clients[kind]

    def _connected(self, retries: int) -> s3fs.S3FileSystem:
        client = s3fs.S3FileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            config_kwargs={
                "retries": {"mode": "standard", "total_max_attempts": 1},
                "max_pool_connections": self._connections,
                "connect_timeout": self._silence,
                "read_timeout": self._silence,
                # S3 has no checksum of a part of an object; ours is the manifest's CRC.
                "response_checksum_validation": "when_required",
                # servers other than S3 are rarely reachable as BUCKET.HOST
                **({"s3": {"addressing_style": "path"}} if endpoint_url() else {}),
            },
        )
        client.retries = retries
        client.connect()
        return client

    def close(self) -> None:
        """Close connections; a later call opens them anew."""
        with self._lock:
            self._clients = {}


def endpoint_url() -> str | None:
    """The endpoint that the environment names for S3."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


class Credentials:
    """What botocore's provider chain gives, for all threads together.

    Attributes:
        renewals: how often the chain was asked anew.
    """

    def __init__(self) -> None:
        self.renewals = 0
        self._lock = threading.Lock()
        self._asked = -_RENEWAL_INTERVAL_SECONDS
        self._fault: CredentialsRejectedError | None = None
        self._hope = False
        self._current: botocore.credentials.Credentials | None = None

    def find(self) -> None:
        """Ask the chain.

        Raises:
            BotoCoreError, ValueError: there are none, or the settings make no sense.
        """
        current = botocore.session.Session().get_credentials()
        if current is None:
            raise botocore.exceptions.NoCredentialsError
        self._current = current

    def __call__(self) -> Any:
        """What obstore signs with; it asks again for nearly every request."""
        assert self._current is not None
        frozen = self._current.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=30),
        }

    def renew(self) -> bool:
        """Ask the chain anew, at most once in a few seconds; in between its last answer stands.

        Returns:
            False where it is no use: the same credentials, and they come from no provider that
            renews them.

        Raises:
            CredentialsRejectedError: they have none to give.
        """
        with self._lock:
            if time.monotonic() - self._asked > _RENEWAL_INTERVAL_SECONDS:
                self.renewals += 1
                try:
                    self._hope, self._fault = self._changed(), None
                except PROVIDER_ERRORS as error:
                    cause = f"credentials cannot be renewed ({named_cause(error)})"
                    self._fault = CredentialsRejectedError(cause, AWS_LOGIN)
                self._asked = time.monotonic()
            if self._fault is not None:
                raise CredentialsRejectedError(str(self._fault), self._fault.advice)
            return self._hope

    def _changed(self) -> bool:
        before = self._current
        self.find()
        assert self._current is not None
        after = self._current.get_frozen_credentials()
        if isinstance(self._current, botocore.credentials.RefreshableCredentials):
            return True
        return before is not None and before.get_frozen_credentials() != after
