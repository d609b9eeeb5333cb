"""What a stream of trials did: the counts behind every statement about its speed."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class StreamCounts:
    """Totals since the stream was opened, or between two moments (`later - earlier`).

    Attributes:
        requests: GETs sent (attempts, so retries count); reads of a local file count too.
        bytes_fetched: payload of the answers that came to their end, also where they were too short
            or wrong; what arrived before a connection broke is not known.
        bytes_needed: bytes of the trials that had to be read, as stored; without what a file has
            between the chunks of a trial, which its one GET reads too.
        trials_read: trials that had to be read.
        cache_hits, cache_misses: distinct trials of batches found in RAM, or not.
        batches: batches handed out.
        wait_seconds: time the training loop waited for a batch.
    """

    requests: int = 0
    bytes_fetched: int = 0
    bytes_needed: int = 0
    trials_read: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    batches: int = 0
    wait_seconds: float = 0.0

    def __sub__(self, earlier: StreamCounts) -> StreamCounts:
        before = dataclasses.asdict(earlier)
        return StreamCounts(**{k: v - before[k] for k, v in dataclasses.asdict(self).items()})

    @classmethod
    def total(cls, parts: Iterable[StreamCounts]) -> StreamCounts:
        """Sums over processes, except for waiting: the longest wait is the one that counts."""
        rows = [dataclasses.asdict(part) for part in parts]
        summed = {name: sum(row[name] for row in rows) for name in rows[0]}
        return cls(**{**summed, "wait_seconds": max(row["wait_seconds"] for row in rows)})

    @property
    def retries(self) -> int:
        """Attempts after a trial's first."""
        return self.requests - self.trials_read

    @property
    def hit_rate(self) -> float:
        """Share of distinct trials that needed no read; 0 when none was asked for."""
        asked = self.cache_hits + self.cache_misses
        return self.cache_hits / asked if asked else 0.0

    def describe(self) -> str:
        """One line for a log or a run's summary."""
        return (
            f"{self.requests:,} GETs, {self.bytes_fetched / 1e6:,.1f} MB, "
            f"cache hits {100 * self.hit_rate:.1f} %, {self.retries:,} retries, "
            f"waited {self.wait_seconds:.1f} s for {self.batches:,} batches"
        )


class StreamStats:
    """Counters that threads add to and the training loop reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dataclasses.asdict(StreamCounts())

    def add(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._counts[name] += amount

    def snapshot(self) -> StreamCounts:
        """Totals so far; subtract two snapshots for an interval."""
        with self._lock:
            return StreamCounts(**self._counts)
