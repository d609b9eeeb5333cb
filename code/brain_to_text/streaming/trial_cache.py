"""Trials kept in RAM under a byte budget, one cache per process.

What comes first stays: nothing is ever evicted. Simulated on the plan's draws this hits a little
more often than LRU or random eviction (tests/benchmarks/RESULTS.md); it moves no memory and hands
out arrays that stay valid. A training trial comes up again and again, a validation trial once per
validation: the former's room is kept free of the latter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

# Left to everything that is not cache when the budget is chosen automatically.
_HEADROOM_BYTES = 2 << 30
_SHARE_OF_REST = 0.75
_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2**63 for "no limit"


class TrialCache:
    """A map from trial index to its features, filled until the budget is reached.

    Args:
        budget_bytes: of all features together; 0 keeps nothing.
        first: bytes of training trials by index; that much of the budget is theirs alone. None:
            any trial is kept.
        rest: validation trials, kept in what the first leave.
    """

    def __init__(
        self,
        budget_bytes: int,
        first: Mapping[int, int] | None = None,
        rest: Collection[int] = (),
    ) -> None:
        self.budget_bytes = budget_bytes
        self._first, self._rest = first, rest
        self._left = budget_bytes
        self._left_for_rest = budget_bytes - sum((first or {}).values())
        self._trials: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def get(self, index: int) -> np.ndarray | None:
        """The trial's features [T, C], read-only, or None."""
        return self._trials.get(index)

    def put(self, index: int, features: np.ndarray) -> np.ndarray:
        """Keep a copy of `features` if there is room for this trial.

        Returns:
            The kept copy, or `features` itself where there was no room; read-only.
        """
        kept = self._reserve(index, features.nbytes)
        if kept:
            features = features.copy()  # apart from the buffer that the read came in
        features.flags.writeable = False
        return self._trials.setdefault(index, features) if kept else features

    def _reserve(self, index: int, n_bytes: int) -> bool:
        with self._lock:
            late = self._first is not None and index not in self._first
            if late and (index not in self._rest or n_bytes > self._left_for_rest):
                return False
            if n_bytes > self._left:
                return False
            self._left -= n_bytes
            self._left_for_rest -= n_bytes if late else 0
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
    own up to the root, its limit less its use; file pages the kernel can drop count as free.

    Args:
        proc, cgroup: where procfs and the cgroup file system are mounted.

    Returns:
        Bytes; 0 at least. Where nothing can be read (no Linux), 4 GiB.
    """
    rooms = [*_machine(proc), *_groups(proc, cgroup)]
    return max(0, min(rooms)) if rooms else 4 << 30


def _machine(proc: Path) -> list[int]:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return []
    return [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]


def _groups(proc: Path, root: Path) -> list[int]:
    """Room left in every cgroup this process is in."""
    try:
        entries = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        entries = []
    rooms: list[int] = []
    for entry in [*entries, "0::/"]:
        _, controllers, path = entry.split(":", 2)
        if controllers == "":
            names, base = ("memory.max", "memory.current", "inactive_file"), root
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            base = root / "memory"
        else:
            continue
        # Inside a container the path may be the host's, which does not exist here: then only the
        # mount's own root, which is the container's group, says anything.
        folder = base / path.lstrip("/")
        for group in [folder, *folder.parents]:
            room = _room(group, *names)
            if room is not None:
                rooms.append(room)
            if group == base:
                break
    return rooms


def _room(group: Path, limit_name: str, usage_name: str, droppable: str) -> int | None:
    try:
        limit_text = (group / limit_name).read_text().strip()
        if limit_text == "max" or int(limit_text) >= _UNLIMITED:
            return None
        used = int((group / usage_name).read_text())
        stat = dict(line.split()[:2] for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return int(limit_text) - used + int(stat.get(droppable, 0))
