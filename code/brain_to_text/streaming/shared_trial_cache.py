"""Trials kept in RAM once per host: memory that every training process of a host sees.

The manifest settles beforehand where each trial lies, so nothing is allocated and nothing locked:
whoever reads a trial first copies it to its place, then raises its flag. Two processes that read
one trial at the same moment write the same bytes.

The memory comes from `memfd_create`: unlike /dev/shm, which containers often limit to 64 MB, it is
limited like any other memory, and it is gone when the last process that has it open ends.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from ..config import DatasetConfig
from ..dataset.manifest import TrialManifest
from .cache_plan import RamPlan, decoded_dtype, plan_ram
from .trial_cache import TrialCache, cache_budget_bytes

T = TypeVar("T")
_ALIGNMENT = 64


class Host(Protocol):
    """The processes of a run, as far as those on one host concern the cache."""

    @property
    def size(self) -> int: ...
    @property
    def local_size(self) -> int: ...
    def from_host_main(self, make: Callable[[], T]) -> T: ...
    def any(self, flag: bool) -> bool: ...


@dataclass(frozen=True)
class Slot:
    """Where one trial lies: first byte in the shared memory, decoded shape [T, C] and type."""

    start: int
    shape: tuple[int, int]
    dtype: np.dtype

    @property
    def n_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


def layout(
    manifest: TrialManifest, plan: RamPlan, cache_dtype: str, budget_bytes: int
) -> tuple[dict[int, Slot], int]:
    """A place for every trial of the plan that fits, in its order: the same on every process.

    Returns:
        (slot by index into `manifest.trials`, bytes in all with the flags in front)
    """
    n = len(manifest.trials)
    used = -(-n // mmap.PAGESIZE) * mmap.PAGESIZE
    slots: dict[int, Slot] = {}
    for index in (*plan.first, *plan.rest):
        trial = manifest.trials[index]
        dtype = decoded_dtype(trial, cache_dtype)
        slot = Slot(used, (trial.n_time_steps, trial.n_features), dtype)
        if used + slot.n_bytes <= budget_bytes:
            slots[index] = slot
            used = -(-(used + slot.n_bytes) // _ALIGNMENT) * _ALIGNMENT
    return slots, used


class SharedTrialCache:
    """A map from trial index to its features, the same one in every process of a host.

    Flags rely on stores becoming visible in order, as they do on x86-64, the image's platform.

    Args:
        memory: at least as large as the layout, zero at first; shared by the host's processes.
        slots: from `layout`.
        n_trials: flags at the start of `memory`.
    """

    def __init__(
        self, memory: mmap.mmap | bytearray, slots: Mapping[int, Slot], n_trials: int
    ) -> None:
        self.budget_bytes = len(memory)
        self._memory = memory
        self._slots = slots
        self._present = np.frombuffer(memory, np.uint8, n_trials)

    def __len__(self) -> int:
        return int(np.count_nonzero(self._present))

    def describe(self) -> str:
        """How much there is and for whom, for the log."""
        return f"{self.budget_bytes / 1e9:.1f} GB for all processes of a host"

    def get(self, index: int) -> np.ndarray | None:
        """The trial's features [T, C], read-only, or None."""
        return self._view(self._slots[index], False) if self._present[index] else None

    def put(self, index: int, features: np.ndarray) -> np.ndarray:
        """Keep a copy of `features` if there is a place for them.

        Returns:
            The kept copy, or `features` itself where there is no place; read-only.
        """
        slot = self._slots.get(index)
        if slot is None:
            features.flags.writeable = False
            return features
        if not self._present[index]:
            np.copyto(self._view(slot, True), features, casting="no")
            self._present[index] = 1
        return self._view(slot, False)

    def _view(self, slot: Slot, writeable: bool) -> np.ndarray:
        values = slot.shape[0] * slot.shape[1]
        view = np.frombuffer(self._memory, slot.dtype, values, slot.start).reshape(slot.shape)
        view.flags.writeable = writeable
        return view


def open_cache(
    manifest: TrialManifest, dataset: DatasetConfig, host: Host | None = None
) -> TrialCache | SharedTrialCache:
    """The cache that a configuration describes: one for all processes of a host, where possible.

    Args:
        host: this process's world; every process of it must call this at the same point.
    """
    world_size, processes = (1, 1) if host is None else (host.size, host.local_size)
    plan = plan_ram(manifest, dataset, world_size, shared=processes > 1)

    def budget() -> int:
        """For one process."""
        prefetch_bytes = int(dataset.prefetch_mb * 1e6)
        return cache_budget_bytes(dataset.cache_gb, plan.n_bytes, prefetch_bytes, processes)

    if host is None or host.size == 1 or dataset.cache_gb == 0:
        return TrialCache(budget(), plan=plan)
    # all hosts take part, also those of one process: the question goes to every process at once
    own, descriptor = os.getpid(), -1

    def make() -> tuple[int, int, int]:
        nonlocal descriptor
        total = processes * budget()
        if processes > 1 and hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("trial-cache")
            os.ftruncate(descriptor, layout(manifest, plan, dataset.cache_dtype, total)[1])
        return own, descriptor, total

    pid, shared, total = host.from_host_main(make)
    slots, size = layout(manifest, plan, dataset.cache_dtype, total)
    memory = _opened(own, pid, shared, size)
    failed = host.any(processes > 1 and memory is None)  # and: everybody has opened it
    if descriptor >= 0:
        os.close(descriptor)
    if failed or memory is None:
        return TrialCache(total // processes, plan=plan)
    return SharedTrialCache(memory, slots, len(manifest.trials))


def _opened(own: int, pid: int, descriptor: int, size: int) -> mmap.mmap | None:
    """The memory that process `pid` of this host made; None where the system does not allow it."""
    if descriptor < 0:
        return None
    try:
        if pid == own:
            return mmap.mmap(descriptor, size)
        other = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR)
        try:
            return mmap.mmap(other, size)
        finally:
            os.close(other)
    except OSError:
        return None
