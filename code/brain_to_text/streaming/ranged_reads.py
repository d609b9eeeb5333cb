"""One ranged read of one object: the seam between trials and where their bytes lie.

A reader makes exactly one attempt per call; when to try again is not its business. It lives on
fsspec's event loop, which runs in a thread of this process: nothing here survives a fork.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from pathlib import Path
from typing import Protocol

import fsspec.asyn

from ..storage.attempts import PersistentError, ReadError

Bytes = bytes | bytearray | memoryview


class RangedReader(Protocol):
    """One attempt at one byte range; implementations share no state between attempts."""

    loop: asyncio.AbstractEventLoop

    async def read(self, key: str, offset: int, length: int, etag: str) -> Bytes:
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

    async def renew_credentials(self) -> bool:
        """Ask the credential provider again, at most once in a few seconds; True for others.

        Raises:
            CredentialsRejectedError: it has no credentials to give.
        """

    async def close(self) -> None:
        """Close connections."""


class LocalRangedReader:
    """Ranged reads of files in a folder, on threads: the same path as S3 without a network.

    Whether a file is the one in the manifest is for the CRC-32 of its trials to say.
    """

    def __init__(self, folder: Path, concurrency: int) -> None:
        self._folder = folder
        self.loop = fsspec.asyn.get_loop()
        self._threads = concurrent.futures.ThreadPoolExecutor(
            max_workers=min(concurrency, 8), thread_name_prefix="local-read"
        )

    async def read(self, key: str, offset: int, length: int, etag: str) -> bytes:
        return await self.loop.run_in_executor(self._threads, self._read, key, offset, length)

    def _read(self, key: str, offset: int, length: int) -> bytes:
        try:
            with (self._folder / key).open("rb") as file:
                file.seek(offset)
                return file.read(length)
        except FileNotFoundError as error:
            raise PersistentError("no such file", "check that the folder is still there") from error
        except OSError as error:
            raise ReadError(f"{type(error).__name__}: {error.strerror}") from error

    async def renew_credentials(self) -> bool:
        return False

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
