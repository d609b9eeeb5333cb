"""Verified features of any trials, by index, from S3 or a folder.

Every distinct trial of a call that is not cached costs one ranged GET, many of them in flight, each
on a thread that reads, verifies and decodes its trial. Bytes that are too few, too many or others
than the manifest's CRC says are read again; nobody sees them.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import numpy as np

from ..config import DatasetConfig
from ..dataset.manifest import TrialManifest
from ..dataset.trial_record import TrialRecord
from ..errors import DataError, StorageError
from ..storage.locations import dataset_command
from ..storage.retry import PATIENCE, RequestError
from ..storage.store import ObjectStore
from .stream_stats import StreamStats
from .trial_cache import TrialCache, cache_budget_bytes


class TrialStream:
    """Reads trials by index into `manifest.trials`.

    Use it in the process that made it: after a fork it refuses to work.

    Args:
        store: the data's prefix or folder; closed with the stream.
        manifest: where each trial's bytes lie, and their CRC-32.
        concurrency: trials read and decoded at once, over all batches being prepared; each has at
            most one ranged GET in flight.
        cache: of decoded trials, in RAM; by default none is kept.
        threads: verify and inflate this many trials at once.
    """

    def __init__(
        self,
        store: ObjectStore,
        manifest: TrialManifest,
        *,
        concurrency: int = 16,
        cache: TrialCache | None = None,
        threads: int = 4,
    ) -> None:
        self.url = store.url
        self.manifest = manifest
        self.cache = TrialCache(0) if cache is None else cache
        # that holds any trial's features: files of both precisions are possible
        half = len(manifest.trials) > 0 and all(manifest.trials.half)
        self.dtype = np.dtype("<f2" if half else "<f4")
        self.stats = StreamStats()
        self._store = store
        self._readers = ThreadPoolExecutor(concurrency, "read-trial")
        self._decoding = threading.Semaphore(threads)
        self._under_way: dict[int, _Read] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._process = os.getpid()

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
        n_bytes = manifest.trials.feature_bytes()
        train, val = (manifest.select(split, dataset.sessions) for split in ("train", "val"))
        train_bytes, val_bytes = (int(n_bytes[np.asarray(s, int)].sum()) for s in (train, val))
        prefetch_bytes = int(dataset.prefetch_mb * 1e6)
        budget = cache_budget_bytes(
            dataset.cache_gb, train_bytes + val_bytes, prefetch_bytes, processes
        )
        return cls(
            store,
            manifest,
            concurrency=dataset.max_concurrent_reads,
            cache=TrialCache(budget, set(val), budget - train_bytes),
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
        return self.submit(indices).result()

    def submit(self, indices: Sequence[int] | np.ndarray) -> Reads:
        """Start `fetch` and return at once; a trial that another batch is reading is shared."""
        if os.getpid() != self._process:
            raise StorageError(
                f"The stream of {self.url} was opened before this process was forked and cannot be "
                "used in it: use threads (dataset.num_dataloader_workers) or spawned processes."
            )
        if self._closing.is_set():
            raise StorageError(f"The stream of {self.url} is closed: open a new TrialStream.")
        trials: dict[int, np.ndarray | _Read] = {}
        for index in dict.fromkeys(int(i) for i in indices):
            cached = self.cache.get(index)
            trials[index] = self._begin(index) if cached is None else cached
            self.stats.add(cache_hits=cached is not None, cache_misses=cached is None)
        return Reads(trials, [int(i) for i in indices], self._lock)

    def close(self) -> None:
        """Give up what nobody has begun to read; a GET in flight ends within its time limit."""
        self._closing.set()
        if os.getpid() != self._process:
            return
        self._readers.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            under_way = list(self._under_way.values())
        for read in under_way:
            read.cancel()
        self._store.close()

    def __enter__(self) -> TrialStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, index: int) -> _Read:
        with self._lock:
            read = self._under_way.get(index)
            if read is not None and not read.cancelled():
                read.waiting += 1
                return read
            read = self._under_way[index] = _Read()
        self._readers.submit(self._finish, index, read)
        return read

    def _finish(self, index: int, read: _Read) -> None:
        """One trial, from its first attempt to its last. Runs on a reading thread."""
        # another batch's read may have ended since `submit` looked
        features = self.cache.get(index)
        error: BaseException | None = None
        try:
            if features is None:
                features = self._load(index, read)
        except BaseException as raised:  # noqa: BLE001 (raised where the trial is waited for)
            error = raised
        with self._lock:
            if self._under_way.get(index) is read:
                del self._under_way[index]
        if not read.set_running_or_notify_cancel():
            return
        if features is None:
            read.set_exception(error)
        else:
            read.set_result(features)

    def _load(self, index: int, read: _Read) -> np.ndarray:
        record = self.manifest.trials[index]
        etag = self.manifest.files[record.key].etag

        def attempt() -> np.ndarray:
            self.stats.add(requests=1)
            span = self._store.read_range(record.key, record.offset, record.length, etag)
            self.stats.add(bytes_fetched=len(span))
            return self._decoded(record, span)

        def wait(seconds: float) -> None:
            if self._closing.wait(seconds) or read.cancelled():
                raise CancelledError

        wait(0)
        self.stats.add(trials_read=1, bytes_needed=record.stored_bytes)
        features = self._store.retries.run(
            f"read {record.trial} (bytes {record.offset}-{record.offset + record.length - 1}) of "
            f"{self.url}/{record.key}",
            attempt,
            "start the job again to resume, or raise dataset.retry_budget_seconds",
            wait,
        )
        return self.cache.put(index, features)

    def _decoded(self, record: TrialRecord, span: bytes | memoryview) -> np.ndarray:
        """The features that verified bytes hold."""
        if len(span) != record.length:
            got = str(len(span)) if len(span) < record.length else "more"
            raise RequestError(f"got {got} of {record.length} bytes")
        with self._decoding:
            crc = zlib.crc32(span)
            if crc != record.crc32:
                raise RequestError(
                    f"its bytes are not those in the manifest (CRC-32 is {crc:08x}, expected "
                    f"{record.crc32:08x})",
                    f"run {dataset_command('index', self.url)} if the file was "
                    "replaced, or upload it again if it is damaged",
                    PATIENCE,
                    DataError,
                )
            return record.decode(memoryview(span))


class Reads:
    """The trials of one batch, some of them still being read.

    Args:
        trials: each distinct one's features, or its read under way.
        wanted: the batch, in its order.
        lock: of the stream.
    """

    def __init__(
        self, trials: dict[int, np.ndarray | _Read], wanted: list[int], lock: threading.Lock
    ) -> None:
        self._trials = trials
        self._wanted = wanted
        self._lock = lock
        self._reads = [trial for trial in trials.values() if isinstance(trial, _Read)]

    def result(self) -> list[np.ndarray]:
        """Wait for all of them; as `TrialStream.fetch`.

        Raises:
            CancelledError: `cancel` was called, or the stream is closed.
        """
        try:
            arrays = {
                index: trial.result() if isinstance(trial, _Read) else trial
                for index, trial in self._trials.items()
            }
        finally:
            self.cancel()  # when waiting was interrupted; without effect once all are there
        return [arrays[index] for index in self._wanted]

    def cancel(self) -> None:
        """Give up what no other batch waits for; without effect once it is done."""
        with self._lock:
            while self._reads:
                read = self._reads.pop()
                read.waiting -= 1
                if read.waiting == 0:
                    read.cancel()


class _Read(Future[np.ndarray]):
    """One trial's read, and how many batches wait for it; the last to leave cancels it."""

    waiting = 1
