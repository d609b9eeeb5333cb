"""Trials kept in RAM under a byte budget.

What comes first stays: nothing is ever evicted. Simulated on the plan's draws this hits a little
more often than LRU or random eviction (tests/benchmarks/RESULTS.md); it moves no memory and hands
out views that stay valid. So that a validation pass does not fill it for good, a plan says which
trials it is for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

import numpy as np

from . import memory
from .cache_plan import RamPlan

SEGMENT_BYTES = 256 << 20
_ALIGNMENT = 64
# Left to everything that is not cache when the budget is chosen automatically.
_HEADROOM_BYTES = 2 << 30
_SHARE_OF_REST = 0.75


class TrialCache:
    """A map from trial index to its features, filled until the budget is reached.

    Memory is taken in large segments that trials are packed into, so that the process's use stays
    within the budget whatever the sizes of the trials.

    Args:
        budget_bytes: total size of all segments; 0 keeps nothing.
        segment_bytes: taken from the system at a time.
        plan: which trials to keep; by default any. Its first ones have their bytes of the budget
            for themselves, apart from what the ends of segments leave unused.
    """

    def __init__(
        self,
        budget_bytes: int,
        segment_bytes: int = SEGMENT_BYTES,
        plan: RamPlan | None = None,
    ) -> None:
        self.budget_bytes = budget_bytes
        self._segment_bytes = segment_bytes
        self._plan = plan
        self._left_for_rest = 0 if plan is None else budget_bytes - sum(plan.first.values())
        self._trials: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()
        self._segment = np.empty(0, dtype=np.uint8)
        self._used = 0  # of the current segment
        self._taken = 0  # of the budget, over all segments

    def __len__(self) -> int:
        return len(self._trials)

    def describe(self) -> str:
        """How much there is and for whom, for the log."""
        return f"{self.budget_bytes / 1e9:.1f} GB for this process"

    def get(self, index: int) -> np.ndarray | None:
        """The trial's features [T, C], read-only, or None."""
        return self._trials.get(index)

    def put(self, index: int, features: np.ndarray) -> np.ndarray:
        """Keep a copy of `features` if there is room for this trial.

        Returns:
            The kept copy, or `features` itself where there was no room; read-only.
        """
        place = self._reserve(index, features.nbytes)
        if place is None:
            features.flags.writeable = False
            return features
        kept = place.view(features.dtype).reshape(features.shape)
        np.copyto(kept, features)
        kept.flags.writeable = False
        return self._trials.setdefault(index, kept)

    def _reserve(self, index: int, n_bytes: int) -> np.ndarray | None:
        plan = self._plan
        with self._lock:
            rest = None if plan is None or index in plan.first else plan.rest
            if rest is not None and (index not in rest or n_bytes > self._left_for_rest):
                return None
            start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
            if start + n_bytes > len(self._segment):
                size = min(self._segment_bytes, self.budget_bytes - self._taken)
                if size < n_bytes:
                    return None
                self._segment = np.empty(size, dtype=np.uint8)
                self._taken += size
                start = 0
            self._used = start + n_bytes
            if rest is not None:
                self._left_for_rest -= n_bytes
            return self._segment[start : start + n_bytes]


def cache_budget_bytes(
    setting: float | Literal["auto"],
    dataset_bytes: int,
    prefetch_bytes: int,
    processes: int = 1,
    available: Callable[[], int] = memory.available_bytes,
) -> int:
    """Bytes that one process may cache.

    Args:
        setting: `dataset.cache_gb`, GB for this process, or "auto": three quarters of the memory
            that is available now beyond prefetching and 2 GiB, shared by the host's processes.
        dataset_bytes: size of everything that can be cached; more is never taken.
        prefetch_bytes: memory for batches prepared ahead, per process.
        processes: training processes on this host.
        available: bytes that can still be allocated on this host.
    """
    if setting != "auto":
        return min(int(setting * 1e9), dataset_bytes + SEGMENT_BYTES)
    rest = available() - _HEADROOM_BYTES - processes * prefetch_bytes
    budget = int(_SHARE_OF_REST * rest / processes)
    return max(0, min(budget, dataset_bytes + SEGMENT_BYTES))
