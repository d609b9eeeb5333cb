"""Objects by key, in an S3 prefix or in a folder, behind one interface.

Credentials, region and endpoint come from the standard provider chain of the AWS SDK (environment,
profile, container or instance role), which also renews them; nothing here copies a key.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from ..errors import StorageError

PART_BYTES = 16 * 2**20  # whole files are read and written in parts of this size, in parallel
_PARTIAL = ".partial"  # suffix of local files that are still being written; never listed


@dataclass(frozen=True)
class ObjectInfo:
    """One entry of a listing. `key` is relative to the store; `etag` changes with the content."""

    key: str
    size: int
    etag: str


class ObjectStore(Protocol):
    """What readers and writers of a dataset need; every method raises StorageError."""

    url: str

    def list(self) -> dict[str, ObjectInfo]:
        """Everything below the root, recursively, in one listing; empty if there is nothing."""
        ...

    def read(self, key: str, size: int | None = None) -> bytes:
        """A whole object; `size`, when known, allows reading it in parallel parts."""
        ...

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Create or replace an object; nobody ever sees half of it."""
        ...

    def exists(self, key: str) -> bool: ...

    def open(self, key: str) -> BinaryIO:
        """A seekable binary file for reading."""
        ...


def open_store(location: str | Path) -> ObjectStore:
    """The store behind an `s3://bucket/prefix` URL or a folder path.

    Raises:
        StorageError: the text is neither.
    """
    text = str(location)
    if text.startswith("s3://"):
        return S3Store(text)
    if "://" in text:
        raise StorageError(
            f"'{text}' is neither a folder nor an s3:// URL: use s3://BUCKET/PREFIX."
        )
    return LocalStore(location)


def listing_after_writing(
    store: ObjectStore, sizes: Mapping[str, int], patience: float = 30.0
) -> dict[str, ObjectInfo]:
    """The listing's entries of objects that were just written, sorted by key.

    S3 lists a write at once; some servers that speak its protocol need seconds.

    Args:
        sizes: by key, the size in bytes that the listing must show.
        patience: seconds to wait for that.

    Raises:
        StorageError: an object still is not listed as it was written.
    """
    deadline = time.monotonic() + patience
    while True:
        listing = store.list()
        late = [k for k, size in sizes.items() if k not in listing or listing[k].size != size]
        if not late:
            return {key: listing[key] for key in sorted(sizes)}
        if time.monotonic() > deadline:
            raise StorageError(
                f"{store.url} does not list {late[0]} as it was written {patience:.0f} s ago: look "
                f"at it, then type 'python code/prepare_dataset.py index {store.url}'."
            )
        time.sleep(0.5)


class LocalStore:
    """A folder. Writes go to a temporary name first, so that a crash leaves no half file."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.url = str(folder)

    def list(self) -> dict[str, ObjectInfo]:
        found = {}
        with self._explain("list", ""):
            for path in sorted(self.folder.rglob("*")):
                if path.is_file() and not path.name.endswith(_PARTIAL):
                    status = path.stat()
                    key = path.relative_to(self.folder).as_posix()
                    etag = f"{status.st_mtime_ns}-{status.st_size}"
                    found[key] = ObjectInfo(key, status.st_size, etag)
        return found

    def read(self, key: str, size: int | None = None) -> bytes:
        with self._explain("read", key):
            return (self.folder / key).read_bytes()

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        with self._explain("read", key), (self.folder / key).open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        return _complete(data, length, self.folder / key, offset)

    def write(self, key: str, data: bytes) -> None:
        path = self.folder / key
        with self._explain("write", key):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(_PARTIAL, f".{path.name}.", path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                Path(partial).chmod(0o644)
                Path(partial).replace(path)
            finally:
                Path(partial).unlink(missing_ok=True)

    def exists(self, key: str) -> bool:
        return (self.folder / key).is_file()

    def open(self, key: str) -> BinaryIO:
        with self._explain("read", key):
            return (self.folder / key).open("rb")

    @contextmanager
    def _explain(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            path = self.folder / key if key else self.folder
            raise StorageError(
                f"Cannot {verb} {path} ({error.strerror or error}): check the path and its "
                f"permissions with 'ls -l {path.parent}'."
            ) from error


class S3Store:
    """An S3 prefix, through s3fs.

    `filesystem` is made on first use, in each process anew; its methods are synchronous, and the
    coroutines behind them (`_cat_file`, …) run on `filesystem.loop`.
    """

    def __init__(self, url: str, *, connections: int = 64, read_timeout: float = 15.0) -> None:
        self.bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self.prefix = prefix.strip("/")
        if not self.bucket:
            raise StorageError(f"'{url}' names no bucket: use s3://BUCKET/PREFIX.")
        self.url = f"s3://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")
        self._connections = connections
        self._read_timeout = read_timeout
        self._filesystem: Any = None
        self._process = 0

    @property
    def filesystem(self) -> Any:
        """The s3fs filesystem of this process (a fork would share its sockets: never reused)."""
        if self._filesystem is None or self._process != os.getpid():
            import s3fs

            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            self._filesystem = s3fs.S3FileSystem(
                anon=False,
                use_listings_cache=False,
                skip_instance_cache=True,
                config_kwargs={
                    "max_pool_connections": self._connections,
                    "read_timeout": self._read_timeout,
                    "connect_timeout": 10,
                    # a part of an object cannot be checked against the sum of the whole;
                    # trials have their own CRC-32 in the manifest
                    "response_checksum_validation": "when_required",
                    # servers other than S3 are rarely reachable as BUCKET.HOST
                    **({"s3": {"addressing_style": "path"}} if endpoint else {}),
                },
            )
            self._process = os.getpid()
        return self._filesystem

    def path(self, key: str) -> str:
        """`bucket/prefix/key`, the name s3fs uses."""
        return "/".join(part for part in (self.bucket, self.prefix, key) if part)

    def list(self) -> dict[str, ObjectInfo]:
        root = f"{self.prefix}/" if self.prefix else ""
        found: dict[str, ObjectInfo] = {}
        page: dict[str, Any] = {"Bucket": self.bucket, "Prefix": root}
        with self._explain("list", ""):
            while True:
                answer = self.filesystem.call_s3("list_objects_v2", **page)
                for entry in answer.get("Contents", ()):
                    key = entry["Key"][len(root) :]
                    if key and not key.endswith("/"):
                        etag = entry["ETag"].strip('"')
                        found[key] = ObjectInfo(key, int(entry["Size"]), etag)
                if not answer.get("IsTruncated"):
                    return found
                page["ContinuationToken"] = answer["NextContinuationToken"]

    def read(self, key: str, size: int | None = None) -> bytes:
        if size is None or size <= PART_BYTES:
            with self._explain("read", key):
                data = self.filesystem.cat_file(self.path(key), max_concurrency=1)
            return _complete(data, len(data) if size is None else size, f"{self.url}/{key}", 0)
        starts = range(0, size, PART_BYTES)
        ends = [min(start + PART_BYTES, size) for start in starts]
        with self._explain("read", key):
            parts = self.filesystem.cat_ranges(
                [self.path(key)] * len(ends), list(starts), ends, on_error="raise"
            )
        for start, end, part in zip(starts, ends, parts, strict=True):
            _complete(part, end - start, f"{self.url}/{key}", start)
        return b"".join(parts)

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        with self._explain("read", key):
            data = self.filesystem.cat_file(self.path(key), start=offset, end=offset + length)
        return _complete(data, length, f"{self.url}/{key}", offset)

    def write(self, key: str, data: bytes) -> None:
        with self._explain("write", key):
            self.filesystem.pipe_file(self.path(key), data, chunksize=PART_BYTES)

    def exists(self, key: str) -> bool:
        with self._explain("read", key):
            return bool(self.filesystem.exists(self.path(key)))

    def open(self, key: str) -> BinaryIO:
        with self._explain("read", key):
            file = self.filesystem.open(self.path(key), "rb", cache_type="readahead")
        return cast(BinaryIO, file)

    @contextmanager
    def _explain(self, verb: str, key: str) -> Iterator[None]:
        """Turn what s3fs and botocore raise into one sentence."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (OSError, BotoCoreError, ClientError) as error:
            where = f"{self.url}/{key}" if key else self.url
            raise StorageError(_s3_sentence(error, verb, where, self.bucket)) from error


def _s3_sentence(error: Exception, verb: str, where: str, bucket: str) -> str:
    """What went wrong with an S3 request, and what to type next."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    code = response.get("Error", {}).get("Code", "")
    name = type(error).__name__
    detail = " ".join(str(error).split()) or name
    if name in ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"):
        advice = "run 'aws configure', or give the job's role access"
        return f"Cannot {verb} {where}: no AWS credentials were found; {advice}."
    if name == "NoRegionError":
        return f"Cannot {verb} {where}: no AWS region is set; type 'export AWS_REGION=us-east-1'."
    if code == "NoSuchBucket" or (
        isinstance(error, FileNotFoundError) and where == f"s3://{bucket}"
    ):
        return (
            f"Cannot {verb} {where}: there is no bucket '{bucket}'; "
            "list yours with 'aws s3 ls' and give one with --s3-bucket."
        )
    if isinstance(error, PermissionError):
        action = "s3:PutObject" if verb == "write" else "s3:GetObject and s3:ListBucket"
        return (
            f"Cannot {verb} {where}: access denied ({code or detail}); allow {action} on it for "
            f"these credentials and test with 'aws s3 ls {where.rstrip('/')}'."
        )
    if isinstance(error, FileNotFoundError):
        folder = where.rsplit("/", 1)[0]
        return f"Cannot {verb} {where}: no such object; see what exists with 'aws s3 ls {folder}/'."
    if name in ("EndpointConnectionError", "ConnectTimeoutError", "ConnectionError"):
        return (
            f"Cannot {verb} {where}: the S3 endpoint cannot be reached ({detail}); check the "
            "network, the region and AWS_ENDPOINT_URL_S3."
        )
    return f"Cannot {verb} {where}: {detail} ({code or name}); test with 'aws s3 ls s3://{bucket}'."


def _complete(data: bytes, length: int, where: object, offset: int) -> bytes:
    """`data` if it is as long as asked for; servers do answer short without an error."""
    if len(data) != length:
        raise StorageError(
            f"{where} gave {len(data):,} of {length:,} bytes from offset {offset:,}: the object is "
            "shorter than it was or the transfer was cut; try again, then upload it again."
        )
    return data
