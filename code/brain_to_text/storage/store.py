"""Objects by key, in an S3 prefix or in a folder, behind one interface."""

from __future__ import annotations

import errno
import os
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from ..errors import DataError, StorageError
from ..redaction import one_line
from .locations import ObjectInfo, is_s3
from .retry import PATIENCE, RequestError, Retries, RetryPolicy

_PARTIAL = ".partial"  # suffix of local files that are still being written; never listed
_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_SECURITY_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
}


class ObjectStore(Protocol):
    """What readers and writers of a dataset need; every method raises StorageError.

    Attributes:
        url: of the prefix, or the folder's path.
        retries: for requests made of several attempts, as trials' reads are.
    """

    url: str
    retries: Retries

    def list(self) -> dict[str, ObjectInfo]:
        """Everything below the root, recursively, in one listing; empty if there is nothing."""
        ...

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """`length` bytes from `offset` on, by default up to the object's end.

        On S3 a known length spares a request; a large object is read in parallel parts.
        """
        ...

    def read_range(self, key: str, offset: int, length: int, etag: str) -> bytes | memoryview:
        """One attempt at one byte range, from any thread: whatever arrived.

        Args:
            etag: of the file in the manifest. Where it is of another kind (the data was indexed in
                a folder, then uploaded, or the reverse) the first ETag seen here takes its place.

        Raises:
            RequestError: this attempt failed, or the object's ETag is another one.
        """
        ...

    def write(self, key: str, data: bytes) -> None:
        """Create or replace an object; nobody ever sees half of it."""
        ...

    def exists(self, key: str) -> bool: ...

    def close(self) -> None:
        """Close connections; the next call opens them anew."""


def open_store(
    location: str | Path, *, retry: RetryPolicy | None = None, kms_key: str | None = None
) -> ObjectStore:
    """The store behind an `s3://bucket/prefix` URL or a folder path.

    Args:
        retry: what one request, or a page of a listing, may cost in time.
        kms_key: id or ARN of the KMS key that encrypts what is written to S3; by default that of
            the variable S3_KMS_KEY_ID, and without one what the bucket does by itself.

    Raises:
        StorageError: the text is neither, no S3 client is installed, or see
            `check_aws_variables`.
    """
    text = str(location)
    if is_s3(text):
        check_aws_variables()
        try:
            from .s3_store import S3Store  # folders need no S3 client
        except ModuleNotFoundError as error:
            raise StorageError(
                f"{text} is on S3, and the Python package {error.name} is not installed: type "
                "`pip install 's3fs>=2026' boto3`, or give a folder."
            ) from error
        return S3Store(text, retry=retry, kms_key=kms_key)
    if "://" in text:
        raise StorageError(
            f"'{text}' is neither a folder nor an s3:// URL: use s3://BUCKET/PREFIX."
        )
    return LocalStore(location, retry)


def check_aws_variables() -> None:
    """Refuse AWS_… variables that hold a stray line end, before an AWS client sees them.

    A client puts credentials into HTTP headers; what it says about one that no header can hold
    prints the secret. A .env file with Windows line ends or $(cat FILE) there leaves them behind.

    Raises:
        StorageError: names the variable, never its value.
    """
    for name in sorted(os.environ):
        value = os.environ[name]
        if not name.startswith("AWS_"):
            continue
        plain = value.isascii() and " " not in value if name in _CREDENTIALS else True
        if not value.isprintable() or not plain:
            end = " at its end" if value[-1] in "\r\n \t" else ""
            raise StorageError(
                f"The environment variable {name} holds a character{end} that does not belong there"
                " (a line end, a blank or a letter with an accent): set it anew, for instance with "
                f'\'export {name}=$(printf %s "${name}" | tr -cd "[!-~]")\'.'
            )


class LocalStore:
    """A folder. Writes go to a temporary name first, so that a crash leaves no half file.

    Links are followed. A file's ETag is its inode and the times of its last changes, of which the
    system sets one that nobody can turn back: another ETag may be a copy, the same is the same.
    """

    def __init__(self, folder: str | Path, retry: RetryPolicy | None = None) -> None:
        self.folder = Path(folder)
        self.url = str(folder)
        self.retries = Retries(retry or RetryPolicy())

    def list(self) -> dict[str, ObjectInfo]:
        """As `ObjectStore.list`.

        Raises:
            StorageError: also for a folder or file that cannot be read, a link to nothing, and what
                is no file (a pipe, a device); names it. Hidden ones are left out.
        """
        with self._explain("list", ""):
            paths = sorted(_files(self.folder)) if self.folder.exists() else []
        found = {}
        for path in paths:
            name = path.relative_to(self.folder).as_posix()
            key = os.fsencode(name).decode(errors="replace")  # no UTF-8: listed, never taken
            with self._explain("read", key), path.open("rb") as file:
                stat = os.fstat(file.fileno())
            etag = f"file:{stat.st_ino:x}-{stat.st_mtime_ns:x}-{stat.st_ctime_ns:x}"
            found[key] = ObjectInfo(key, stat.st_size, etag)
        return found

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        with self._explain("read", key), self._path(key).open("rb") as file:
            file.seek(offset)
            return file.read(-1 if length is None else length)

    def read_range(self, key: str, offset: int, length: int, etag: str) -> bytes:
        """As `ObjectStore.read_range`; whether a file is the one meant is for its trials' CRC."""
        try:
            with self._path(key).open("rb") as file:
                file.seek(offset)
                return file.read(length)
        except OSError as error:
            final_after = PATIENCE if isinstance(error, FileNotFoundError) else None
            advice = f"check it with 'ls -l {one_line(str(self.folder))}'"
            raise RequestError(str(error.strerror), advice, final_after) from error

    def write(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with self._explain("write", key):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_PARTIAL}")
            try:
                with partial.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def close(self) -> None:
        """Nothing is open between calls."""

    def _path(self, key: str) -> Path:
        if ".." in key.split("/") or key.startswith("/"):
            raise StorageError(
                f"'{key}' leads out of {self.folder}: rename it where it comes from."
            )
        return self.folder / key

    @contextmanager
    def _explain(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            path = Path(error.filename or self.folder / key)
            advice = f"check the path and its permissions with 'ls -l {one_line(str(path.parent))}'"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                advice = "free space there, then repeat the command"
            raise StorageError(
                f"Cannot {verb} {one_line(str(path))} ({error.strerror or error}): {advice}."
            ) from error


def _files(root: Path) -> Iterator[Path]:
    """Every file below `root`, links followed; a folder inside itself ends there."""
    for name, names, files in os.walk(root, onerror=_raised, followlinks=True):
        folder = Path(name)
        if any(folder.samefile(above) for above in folder.parents if above.is_relative_to(root)):
            names.clear()
            continue
        for path in (folder / file for file in files if not file.endswith(_PARTIAL)):
            if path.is_file():
                yield path
            elif not path.name.startswith("."):
                what = "a link to nothing" if path.is_symlink() else "neither a file nor a folder"
                raise OSError(errno.EINVAL, what, str(path))


def _raised(error: OSError) -> None:
    raise error


def gunzipped(data: bytes, name: str, advice: str) -> bytes:
    """What gzipped bytes hold; their CRC-32 and length decide before anybody looks inside.

    Args:
        name: of the file, for the message.
        advice: what to do about a damaged one.

    Raises:
        DataError: damaged, cut off, or followed by something else.
    """
    inflater = zlib.decompressobj(wbits=31)
    try:
        text = inflater.decompress(data)
    except zlib.error as error:
        raise DataError(f"{name} is damaged ({error}): {advice}.") from error
    if not inflater.eof or inflater.unused_data:
        raise DataError(f"{name} is damaged (it ends too early or too late): {advice}.")
    return text
