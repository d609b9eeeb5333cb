"""Batches prepared ahead of the training loop, in order, within limits on number and bytes."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch

from ..config import DatasetConfig
from .batch import Batch
from .stream_stats import StreamStats
from .trial_stream import Reads


@dataclass(frozen=True)
class PrefetchLimits:
    """How far ahead batches are prepared.

    Attributes:
        batches: at most this many at once.
        n_bytes: at most this many bytes at once, except that one batch is always allowed.
        threads: batches put together at the same time.
    """

    batches: int = 4
    n_bytes: int = 2 << 30
    threads: int = 4

    @classmethod
    def from_config(cls, dataset: DatasetConfig, share: float) -> PrefetchLimits:
        """As a configuration describes them, with `share` of its bytes."""
        n_bytes = int(share * dataset.prefetch_mb * 1e6)
        return cls(dataset.prefetch_batches, n_bytes, dataset.num_dataloader_workers)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for every pass of a process: what torch reserves for a stream stays with it."""
    return torch.cuda.Stream(device)


class Prefetcher:
    """Iterates over the batches of steps start … stop-1 on their device, several under way.

    On a GPU the next batch is copied while the current one computes. An exception in a preparation
    is raised when its turn comes. Close it when leaving early: reads under way are given up at
    once.

    Args:
        begin: starts one step's reads and returns at once: them, and what waits for them and puts
            the batch together, called on a preparing thread.
        n_bytes: memory one step's batch needs, known before it is read.
        start, stop: the steps.
        limits: how far ahead.
        stats: counts batches and waiting.
        device: where batches end up; None leaves them on the CPU.
    """

    def __init__(
        self,
        begin: Callable[[int], tuple[Reads, Callable[[], Batch]]],
        n_bytes: Callable[[int], int],
        start: int,
        stop: int,
        limits: PrefetchLimits,
        stats: StreamStats,
        device: torch.device | None = None,
    ) -> None:
        self._begin = begin
        self._n_bytes = n_bytes
        self._next_step = start
        self._stop = stop
        self._limits = limits
        self._stats = stats
        self._device = device
        on_gpu = device is not None and device.type == "cuda"
        self._copy_stream = _copy_stream(device) if on_gpu else None
        self._copied: Batch | None = None
        self._queue: deque[tuple[int, Reads, Future[Batch]]] = deque()
        self._bytes_ahead = 0
        self._threads = ThreadPoolExecutor(limits.threads, "prepare-batch")
        self._fill()
        # a list, not self: a future must not keep alive what closes when nobody holds it any more
        ready = self._first_ready = list[float]()
        if self._queue:
            self._queue[0][2].add_done_callback(lambda _: ready.append(time.perf_counter()))

    @property
    def first_ready(self) -> float:
        """When the first preparation was finished (`time.perf_counter`), inf before."""
        return self._first_ready[0] if self._first_ready else math.inf

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Batch:
        batch, self._copied = self._copied, None
        if batch is None:
            batch = self._take()
        self._stats.add(batches=1)
        if self._copy_stream is not None:
            consumer = torch.cuda.current_stream(self._device)
            consumer.wait_stream(self._copy_stream)
            for tensor in (batch.features, batch.labels, batch.phoneme_labels):
                if tensor is not None:
                    tensor.record_stream(consumer)
            if self.ready():
                self._copied = self._take()
        return batch

    def ready(self) -> bool:
        """True when the next batch is there; not when there is only its error to raise."""
        if not self._queue:
            return False
        future = self._queue[0][2]
        return future.done() and not future.cancelled() and future.exception() is None

    def close(self) -> None:
        """Give up everything under way."""
        self._copied = None
        self._stop = self._next_step
        while self._queue:
            _, reads, batch = self._queue.popleft()
            reads.cancel()
            batch.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_queue"):
            self.close()

    def _take(self) -> Batch:
        """The next batch in the queue, on its device."""
        self._fill()
        if not self._queue:
            self.close()
            raise StopIteration
        started = time.perf_counter()
        try:
            batch = self._queue[0][2].result()
        except BaseException:
            self.close()
            raise
        self._stats.add(wait_seconds=time.perf_counter() - started)
        self._bytes_ahead -= self._queue.popleft()[0]
        self._fill()
        if self._device is None:
            return batch
        with torch.cuda.stream(self._copy_stream):
            return batch.to(self._device)

    def _fill(self) -> None:
        while self._next_step < self._stop and len(self._queue) < self._limits.batches:
            size = self._n_bytes(self._next_step)
            if self._queue and self._bytes_ahead + size > self._limits.n_bytes:
                return
            reads, finish = self._begin(self._next_step)
            self._queue.append((size, reads, self._threads.submit(finish)))
            self._bytes_ahead += size
            self._next_step += 1
