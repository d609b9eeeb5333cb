"""Trials in RAM under a byte budget, one cache per process.

What comes first stays: nothing is ever evicted. Simulated on the plan's draws this hits a little
more often than LRU or random eviction (tests/benchmarks/RESULTS.md); it moves no memory and hands
out arrays that stay valid. A training trial comes up again and again, a validation trial once per
validation: validation gets what training cannot fill.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal

import numpy as np

# Left to everything that is not cache when the budget is chosen automatically.
_HEADROOM_BYTES = 2 << 30
_SHARE_OF_REST = 0.75
_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2**63 for "no limit"
# by controller, of cgroup v2 (one hierarchy, whose entry names none) and v1: limit, use, and the
# line of memory.stat that says what the kernel can drop
_MEMORY_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


class TrialCache:
    """A map from trial index to its features, filled until the budget is reached.

    Args:
        budget_bytes: of all features together; 0 for no cache.
        validation: trials that together get no more than `validation_bytes` of it.
    """

    def __init__(
        self, budget_bytes: int, validation: Collection[int] = (), validation_bytes: int = 0
    ) -> None:
        self.budget_bytes = budget_bytes
        self._validation = validation
        self._left, self._left_for_validation = budget_bytes, validation_bytes
        self._trials: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def get(self, index: int) -> np.ndarray | None:
        """The trial's features [T, C], read-only, or None."""
        return self._trials.get(index)

    def put(self, index: int, features: np.ndarray) -> np.ndarray:
        """Store a copy of `features` if the budget allows it.

        Returns:
            The stored copy, or else `features` itself; read-only.
        """
        stored = self._reserve(index in self._validation, features.nbytes)
        if stored:
            features = features.copy()  # apart from the buffer that the read came in
        features.flags.writeable = False
        return self._trials.setdefault(index, features) if stored else features

    def _reserve(self, validation: bool, n_bytes: int) -> bool:
        with self._lock:
            if n_bytes > self._left or (validation and n_bytes > self._left_for_validation):
                return False
            self._left -= n_bytes
            self._left_for_validation -= n_bytes if validation else 0
            return True


def cache_budget_bytes(
    setting: float | Literal["auto"],
    dataset_bytes: int,
    prefetch_bytes: int,
    processes: int = 1,
    available: Callable[[], int] | None = None,
) -> int:
    """Bytes that one process may cache.

    Args:
        setting: `dataset.cache_gb`, GB for this process, or "auto": three quarters of the memory
            that is available now beyond prefetching and 2 GiB, shared by the host's processes.
        dataset_bytes: size of everything that can be cached; more is never taken.
        prefetch_bytes: memory for batches prepared ahead, per process.
        processes: training processes on this host.
        available: bytes that can still be allocated on this host; by default asks the system.
    """
    if setting != "auto":
        return min(int(setting * 1e9), dataset_bytes)
    rest = (available or available_bytes)() - _HEADROOM_BYTES - processes * prefetch_bytes
    budget = int(_SHARE_OF_REST * rest / processes)
    return max(0, min(budget, dataset_bytes))


def available_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can still be allocated before the machine or the container runs out.

    The least of what the kernel calls available and, for each cgroup (v1 or v2) from this process's
    up to the root, its limit less its use; file pages the kernel can drop count as free.

    Args:
        proc, cgroup: where procfs and the cgroup file system are mounted.

    Returns:
        Bytes; 0 at least. Where nothing can be read (no Linux), 4 GiB.
    """
    free = [
        int(line.split()[1]) * 1024
        for line in _lines(proc / "meminfo")
        if line.startswith("MemAvailable:")
    ]
    for entry in [*_lines(proc / "self/cgroup"), "0::/"]:
        _, controllers, path = entry.split(":", 2)
        for controller in _MEMORY_FILES.keys() & set(controllers.split(",")):
            # Inside a container the path may be the host's, which does not exist here: then only
            # the mount's own root, which is the container's group, says anything.
            root = cgroup / controller
            group = root / path.lstrip("/")
            groups = [g for g in (group, *group.parents) if g.is_relative_to(root)]
            free += [_left(g, *_MEMORY_FILES[controller]) for g in groups]
    return max(0, min([n for n in free if n < _UNLIMITED], default=4 << 30))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _left(group: Path, limit_name: str, usage_name: str, droppable: str) -> int:
    """Bytes below a cgroup's limit; `_UNLIMITED` where it has none or says nothing."""
    try:
        limit = int((group / limit_name).read_text())
        used = int((group / usage_name).read_text())
    except (OSError, ValueError):  # "max"
        return _UNLIMITED
    stat = dict(line.split()[:2] for line in _lines(group / "memory.stat"))
    return limit - used + int(stat.get(droppable, 0)) if limit < _UNLIMITED else _UNLIMITED
