"""Verified neural features of any trials, by index, from S3 or a folder.

Every distinct trial of a call that is not cached costs one ranged GET, many of them in flight.
Bytes that are too few, too many or different from the manifest's CRC are read again; nobody sees
them. A reader makes exactly one attempt per call; it lives on fsspec's event loop, which runs in a
thread of this process: nothing here survives a fork.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import fsspec.asyn
import numpy as np

from ..config import DatasetConfig
from ..dataset.manifest import TrialManifest
from ..dataset.trial_record import TrialRecord
from ..errors import BrainToTextError, DataError, StorageError
from ..storage.locations import is_s3
from ..storage.retry import (
    Attempts,
    ObjectReplacedError,
    PersistentError,
    ReadError,
    RetryPolicy,
)
from ..storage.store import ObjectStore
from .stream_stats import StreamStats
from .trial_cache import TrialCache, cache_budget_bytes

Bytes = bytes | bytearray | memoryview


class TrialStream:
    """Reads trials by index into `manifest.trials`.

    Use it in the process and thread family that made it: after a fork it refuses to work.

    Args:
        store: the data's prefix or folder; only its URL is used.
        manifest: where each trial's bytes lie, and their CRC-32.
        concurrency: trials read and decoded at once, over all batches being prepared; each has at
            most one ranged GET in flight.
        cache: of decoded trials, in RAM; by default none is kept.
        retry: time limits of one read.
        threads: verify and inflate this many trials at once.
        reader: for tests and benchmarks, instead of the one for the store's URL.

    Raises:
        StorageError: see `s3_reads.S3RangedReader`.
    """

    def __init__(
        self,
        store: ObjectStore,
        manifest: TrialManifest,
        *,
        concurrency: int = 16,
        cache: TrialCache | None = None,
        retry: RetryPolicy | None = None,
        threads: int = 4,
        reader: RangedReader | None = None,
    ) -> None:
        self.url = url = store.url
        self.manifest = manifest
        self.cache = TrialCache(0) if cache is None else cache
        # that holds any trial's features: files of both precisions are possible
        half = len(manifest.trials) > 0 and all(manifest.table.half)
        self.dtype = np.dtype("<f2" if half else "<f4")
        self.stats = StreamStats()
        self._retry = retry or RetryPolicy()
        if reader is None and is_s3(url):
            from .s3_reads import S3RangedReader  # local folders need no S3 client

            reader = S3RangedReader(url, concurrency, self._retry.read_timeout_seconds)
        self._reader = reader or LocalRangedReader(Path(url), concurrency)
        self._slots = asyncio.Semaphore(concurrency)
        self._reads: dict[int, _SharedRead] = {}
        self._decoders = concurrent.futures.ThreadPoolExecutor(threads, "trial-decode")
        self._process = os.getpid()
        self._closed = False

    @classmethod
    def from_config(
        cls,
        store: ObjectStore,
        manifest: TrialManifest,
        dataset: DatasetConfig,
        processes: int = 1,
    ) -> TrialStream:
        """The stream that a configuration describes, shared by training and validation.

        Args:
            processes: training processes on this host; an automatic cache is its share of the RAM.
        """
        n_bytes = manifest.table.feature_bytes()
        train, val = (
            {i: int(n_bytes[i]) for i in manifest.select(split, dataset.sessions)}
            for split in ("train", "val")
        )
        everything = sum(train.values()) + sum(val.values())
        prefetch_bytes = int(dataset.prefetch_mb * 1e6)
        budget = cache_budget_bytes(dataset.cache_gb, everything, prefetch_bytes, processes)
        return cls(
            store,
            manifest,
            concurrency=dataset.max_concurrent_reads,
            cache=TrialCache(budget, train, val),
            retry=RetryPolicy(
                budget_seconds=dataset.retry_budget_seconds,
                read_timeout_seconds=dataset.read_timeout_seconds,
            ),
            threads=dataset.num_dataloader_workers,
        )

    def fetch(self, indices: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Features of each trial, in the order asked for.

        Returns:
            Read-only arrays [T, C] in the stored dtype; a trial asked for twice is the same array
            twice.

        Raises:
            StorageError: a trial could not be read within the retry budget.
            DataError: a file is not the one in the manifest.
        """
        reads = self.submit(indices)
        try:
            return reads.result()
        finally:
            reads.cancel()  # when waiting was interrupted; without effect once it is done

    def submit(
        self, indices: Sequence[int] | np.ndarray
    ) -> concurrent.futures.Future[list[np.ndarray]]:
        """Start `fetch` and return at once; cancelling the future gives up its reads."""
        if os.getpid() != self._process:
            raise StorageError(
                f"The stream of {self.url} was opened before this process was forked and cannot be "
                "used in it: use threads (dataset.num_dataloader_workers) or spawned processes."
            )
        if self._closed:
            raise StorageError(f"The stream of {self.url} is closed: open a new TrialStream.")
        wanted = [int(i) for i in indices]
        found = {i: features for i in set(wanted) if (features := self.cache.get(i)) is not None}
        missing = [i for i in dict.fromkeys(wanted) if i not in found]
        self.stats.add(cache_hits=len(found), cache_misses=len(missing))
        if missing:
            return asyncio.run_coroutine_threadsafe(
                self._gather(wanted, found, missing), self._reader.loop
            )
        ready: concurrent.futures.Future[list[np.ndarray]] = concurrent.futures.Future()
        ready.set_result([found[i] for i in wanted])
        return ready

    def close(self) -> None:
        """Give up reads in flight, close connections, stop threads."""
        if self._closed:
            return
        self._closed = True
        if os.getpid() == self._process:
            asyncio.run_coroutine_threadsafe(self._shut_down(), self._reader.loop).result()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> TrialStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _shut_down(self) -> None:
        tasks = [read.task for read in self._reads.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._reader.close()

    async def _gather(
        self, wanted: list[int], found: dict[int, np.ndarray], missing: list[int]
    ) -> list[np.ndarray]:
        """Wait for every missing trial; reads that other batches wait for too are shared."""
        reads = []
        for index in missing:
            read = self._reads.get(index)
            if read is None:
                read = self._reads[index] = _SharedRead(asyncio.create_task(self._load(index)))
                read.task.add_done_callback(functools.partial(self._forget, index, read))
            read.waiters += 1
            reads.append(read)
        try:
            arrays = await asyncio.gather(*(asyncio.shield(read.task) for read in reads))
        finally:
            for index, read in zip(missing, reads, strict=True):
                read.waiters -= 1
                if read.waiters == 0 and not read.task.done():
                    self._forget(index, read, read.task)
                    read.task.cancel()
        found.update(zip(missing, arrays, strict=True))
        return [found[i] for i in wanted]

    def _forget(self, index: int, read: _SharedRead, task: asyncio.Task[np.ndarray]) -> None:
        if self._reads.get(index) is read:
            del self._reads[index]
        if task.done() and not task.cancelled():
            task.exception()  # seen here, so that asyncio does not report it a second time

    async def _load(self, index: int) -> np.ndarray:
        """One trial: read until verified, the budget is spent, or the answer is final."""
        kept = self.cache.get(index)  # another batch's read may have ended since `submit` looked
        if kept is not None:
            return kept
        record = self.manifest.trials[index]
        # One slot for all attempts at a trial: what others read cannot use up its budget, and a
        # throttled prefix is asked less.
        async with self._slots:
            self.stats.add(trials_read=1, bytes_needed=record.stored_bytes)
            attempts = Attempts(self._retry)
            get = functools.partial(self._get, record)
            while True:
                try:
                    span = await attempts.run(get, record.length)
                    return await self._reader.loop.run_in_executor(
                        self._decoders, self._accept, index, record, span
                    )
                except ObjectReplacedError as fault:
                    raise self._replaced(record, str(fault)) from fault
                except ReadError as fault:
                    wrong = isinstance(fault, _WrongBytesError)
                    try:
                        await attempts.wait_after(fault, self._reader.renew_credentials, wrong)
                    except ReadError:
                        raise self._gave_up(record, attempts, fault) from fault
                    self.stats.add(retries=1)

    async def _get(self, record: TrialRecord) -> Bytes:
        """Exactly the trial's bytes, by one GET."""
        self.stats.add(requests=1)
        etag = self.manifest.files[record.key].etag
        span = await self._reader.read(record.key, record.offset, record.length, etag)
        self.stats.add(bytes_fetched=len(span))
        if len(span) < record.length:
            raise ReadError(f"got {len(span)} of {record.length} bytes")
        if len(span) > record.length:
            raise ReadError(f"got more than the {record.length} bytes asked for")
        return span

    def _accept(self, index: int, record: TrialRecord, span: Bytes) -> np.ndarray:
        """Check the bytes, decode them, keep them. Runs on a decoder thread."""
        crc = zlib.crc32(span)
        if crc != record.crc32:
            raise _WrongBytesError(f"CRC-32 is {crc:08x}, expected {record.crc32:08x}")
        return self.cache.put(index, record.decode(memoryview(span)))

    def _replaced(self, record: TrialRecord, reason: str) -> DataError:
        return DataError(
            f"File {record.key} under {self.url} was replaced while the run was reading it: "
            f"{reason}; run `python code/prepare_dataset.py index {self.url}` and start again."
        )

    def _gave_up(
        self, record: TrialRecord, attempts: Attempts, fault: ReadError
    ) -> BrainToTextError:
        place = (
            f"trial {record.trial} of {record.key} under {self.url} "
            f"(bytes {record.offset}-{record.offset + record.length - 1})"
        )
        if isinstance(fault, _WrongBytesError):
            return DataError(
                f"The bytes of {place} are not those in the manifest, {attempts.count} reads in: "
                f"{fault}; run `python code/prepare_dataset.py index {self.url}` if the file was "
                "replaced, or upload it again if it is damaged."
            )
        advice = attempts.advice or (
            "check the role's s3:GetObject permission and that the object exists"
            if isinstance(fault, PersistentError)
            else "start the job again to resume, or raise dataset.retry_budget_seconds"
        )
        return StorageError(
            f"Reading {place} failed after {attempts.count} attempts in "
            f"{attempts.elapsed_seconds:.1f} s of the {self._retry.budget_seconds:g} s budget, "
            f"last cause: {attempts.last_cause}; {advice}."
        )


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


class _SharedRead:
    """A read in flight and how many batches wait for it; the last to leave cancels it."""

    def __init__(self, task: asyncio.Task[np.ndarray]) -> None:
        self.task = task
        self.waiters = 0


class _WrongBytesError(ReadError):
    """As many bytes as asked for, but not the ones in the manifest."""
