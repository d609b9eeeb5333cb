"""One cache for all processes of a host: fixed places, the same bytes, no more than the budget."""

from __future__ import annotations

import itertools
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brain_to_text.config import DatasetConfig
from brain_to_text.dataset.manifest import TrialManifest
from brain_to_text.dataset.trial_record import TrialRecord
from brain_to_text.streaming import shared_trial_cache
from brain_to_text.streaming.cache_plan import RamPlan, plan_ram
from brain_to_text.streaming.shared_trial_cache import SharedTrialCache, layout, open_cache
from brain_to_text.streaming.trial_cache import TrialCache
from hypothesis import given
from hypothesis import strategies as st


def manifest_of(lengths: list[int], splits: list[str] | None = None) -> TrialManifest:
    trials = tuple(
        TrialRecord(
            session="t15.2023.08.11",
            split=(splits or ["train"] * len(lengths))[i],
            key="t15.2023.08.11/data_train.hdf5",
            trial=f"trial_{i:04d}",
            n_time_steps=n,
            n_features=4,
            dtype="<f4",
            offset=0,
            length=n * 16,
        )
        for i, n in enumerate(lengths)
    )
    return TrialManifest(trials, {}, 4, 1681, "self_loop")


def plan_of(manifest: TrialManifest, cache_dtype: str = "stored") -> RamPlan:
    return plan_ram(manifest, DatasetConfig(cache_dtype=cache_dtype))  # type: ignore[arg-type]


def features(index: int, n_bins: int) -> np.ndarray:
    return np.full((n_bins, 4), index, np.float32)


@given(
    st.lists(st.tuples(st.integers(1, 400), st.sampled_from(["train", "val", "test"])), min_size=1),
    st.integers(0, 100_000),
    st.sampled_from(["stored", "float16"]),
)
def test_places_do_not_overlap_and_stay_within_the_budget(
    trials: list[tuple[int, str]], budget: int, dtype: str
) -> None:
    manifest = manifest_of([n for n, _ in trials], [split for _, split in trials])
    slots, size = layout(manifest, plan_of(manifest, dtype), dtype, budget)
    assert size <= max(budget, 0) + 64 or not slots
    ends = sorted((slot.start, slot.start + slot.n_bytes) for slot in slots.values())
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(ends))
    assert all(len(trials) <= start and stop <= budget for start, stop in ends)
    assert not any(trials[i][1] == "test" for i in slots)
    for index, slot in slots.items():
        assert slot.shape == (trials[index][0], 4)
        assert slot.n_bytes == trials[index][0] * 4 * (2 if dtype == "float16" else 4)


def test_validation_trials_get_what_training_leaves() -> None:
    manifest = manifest_of([100] * 20, ["val"] * 10 + ["train"] * 10)
    slots, _ = layout(manifest, plan_of(manifest), "stored", mmap.PAGESIZE + 12 * 1600)
    assert {i for i in slots if i >= 10} == set(range(10, 20))
    assert len(slots) == 12


def test_what_is_put_is_found_and_what_has_no_place_is_handed_back() -> None:
    manifest = manifest_of([50, 60, 70])
    slots, size = layout(manifest, plan_of(manifest), "stored", mmap.PAGESIZE + 2000)
    cache = SharedTrialCache(bytearray(size), slots, 3)
    kept = {i: cache.put(i, features(i, 50 + 10 * i)) for i in range(3)}
    assert len(cache) == len(slots) < 3
    for i in range(3):
        found = cache.get(i)
        assert (found is not None) == (i in slots)
        assert np.array_equal(kept[i], features(i, 50 + 10 * i))
        assert not kept[i].flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        next(iter(kept.values()))[0, 0] = 1


class Processes:
    """A world of threads that stand for the processes of two hosts."""

    def __init__(self, hosts: int, per_host: int) -> None:
        self.size, self.local_size = hosts * per_host, per_host
        self._meeting = threading.Barrier(self.size)
        self._said: dict[int, Any] = {}

    def run(self, work: Callable[[Any], Any]) -> list[Any]:
        """work(process) on every process at once."""
        results: list[Any] = [None] * self.size
        threads = [
            threading.Thread(target=lambda r=r: results.__setitem__(r, work(_Process(self, r))))
            for r in range(self.size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def gather(self, rank: int, value: Any) -> dict[int, Any]:
        self._said[rank] = value
        self._meeting.wait()
        said = dict(self._said)
        self._meeting.wait()
        return said


class _Process:
    def __init__(self, world: Processes, rank: int) -> None:
        self.size, self.local_size = world.size, world.local_size
        self._world, self._rank = world, rank

    def from_host_main(self, make: Callable[[], Any]) -> Any:
        first = self._rank - self._rank % self.local_size
        return self._world.gather(self._rank, make() if first == self._rank else None)[first]

    def any(self, flag: bool) -> bool:
        return any(self._world.gather(self._rank, flag).values())


def test_processes_of_a_host_share_and_hosts_do_not() -> None:
    manifest = manifest_of([50] * 8)
    caches = Processes(hosts=2, per_host=2).run(
        lambda process: open_cache(manifest, DatasetConfig(cache_gb=0.001), process)
    )
    assert all(isinstance(cache, SharedTrialCache) for cache in caches)
    caches[0].put(3, features(3, 50))
    assert np.array_equal(caches[1].get(3), features(3, 50))
    assert caches[2].get(3) is None and caches[3].get(3) is None
    assert "all processes" in caches[0].describe()


def test_budgets_of_a_hosts_processes_are_put_together() -> None:
    manifest = manifest_of([1000] * 100)  # 1.6 MB
    alone = open_cache(manifest, DatasetConfig(cache_gb=0.0004))
    assert isinstance(alone, TrialCache)
    caches = Processes(hosts=1, per_host=4).run(
        lambda process: open_cache(manifest, DatasetConfig(cache_gb=0.0004), process)
    )
    assert 4 * alone.budget_bytes * 0.95 < caches[0].budget_bytes <= 4 * alone.budget_bytes


@pytest.mark.parametrize("hosts, per_host, cache_gb", [(2, 1, 0.001), (1, 2, 0)])
def test_one_process_per_host_or_no_cache_needs_nothing_shared(hosts, per_host, cache_gb) -> None:
    caches = Processes(hosts, per_host).run(
        lambda process: open_cache(manifest_of([50] * 8), DatasetConfig(cache_gb=cache_gb), process)
    )
    assert all(isinstance(cache, TrialCache) for cache in caches)


def test_where_sharing_is_not_allowed_each_process_keeps_its_own(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(shared_trial_cache.mmap, "mmap", refuse)
    caches = Processes(hosts=1, per_host=2).run(
        lambda process: open_cache(manifest_of([50] * 8), DatasetConfig(cache_gb=0.001), process)
    )
    assert all(isinstance(cache, TrialCache) for cache in caches)
    assert "this process" in caches[0].describe()


READER = """
import sys
from pathlib import Path
from brain_to_text.streaming.shared_trial_cache import SharedTrialCache, Slot, _opened
import numpy as np
pid, descriptor, size, start = map(int, sys.argv[1:])
memory = _opened(0, pid, descriptor, size)
cache = SharedTrialCache(memory, {1: Slot(start, (50, 4), np.dtype("<f4"))}, 3)
print(float(cache.get(1).sum()))
"""


def test_another_process_sees_what_this_one_keeps() -> None:
    manifest = manifest_of([50, 50, 50])
    slots, size = layout(manifest, plan_of(manifest), "stored", 10**6)
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, size)
    cache = SharedTrialCache(mmap.mmap(descriptor, size), slots, 3)
    cache.put(1, features(1, 50))
    done = subprocess.run(
        [sys.executable, "-c", READER]
        + [str(word) for word in (os.getpid(), descriptor, size, slots[1].start)],
        env={**os.environ, "PYTHONPATH": str(Path(shared_trial_cache.__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    os.close(descriptor)
    assert done.stdout.strip() == "200.0", done.stderr
