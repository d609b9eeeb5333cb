"""One ranged read of one object: the seam between trials and where their bytes lie.

A reader makes exactly one attempt per call; when to try again is not its business. It lives on
fsspec's event loop, which runs in a thread of this process: nothing here survives a fork.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import re
from pathlib import Path
from typing import Protocol

import fsspec.asyn

S3_ETAG = re.compile(r"[0-9a-f]{32}(-\d+)?")


class ReadError(Exception):
    """An attempt that failed and may work when repeated; the message is the cause."""


class CredentialsRejectedError(ReadError):
    """The server no longer accepts the credentials in use, or the provider has no new ones."""


class PersistentError(ReadError):
    """An answer that seldom changes by asking again: access denied, no such object."""


class ObjectReplacedError(Exception):
    """The object under this key is not the one in the manifest."""


class RangedReader(Protocol):
    """One attempt at one byte range; implementations share no state between attempts."""

    loop: asyncio.AbstractEventLoop

    async def read(self, key: str, offset: int, length: int, etag: str) -> bytearray | memoryview:
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
        """Ask the credential provider again; at most once in a few seconds.

        Raises:
            CredentialsRejectedError: it has no credentials to give.
        """

    async def close(self) -> None:
        """Close connections."""


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
                expected = self._seen.setdefault(key, found) if S3_ETAG.fullmatch(etag) else etag
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
