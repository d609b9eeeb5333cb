"""The RAM cache keeps what fits, never more, and hands out the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from brain_to_text.streaming.trial_cache import (
    TrialCache,
    available_bytes,
    cache_budget_bytes,
)
from hypothesis import given
from hypothesis import strategies as st

GB = 10**9


@given(st.lists(st.integers(1, 400), max_size=60), st.integers(0, 20_000))
def test_memory_taken_never_exceeds_the_budget(lengths: list[int], budget: int) -> None:
    cache = TrialCache(budget)
    trials = [np.full((n, 4), n, np.float32) for n in lengths]
    kept = [cache.put(i, trial) for i, trial in enumerate(trials)]
    assert all(np.array_equal(a, b) for a, b in zip(kept, trials, strict=True))
    assert not any(a.flags.writeable for a in kept)
    assert sum(t.nbytes for i, t in enumerate(trials) if cache.get(i) is not None) <= budget
    for i, trial in enumerate(trials):
        held = cache.get(i)
        assert held is None or np.array_equal(held, trial)


def test_what_came_first_stays() -> None:
    cache = TrialCache(1000)
    first = cache.put(0, np.ones((50, 4), np.float32))
    cache.put(1, np.ones((50, 4), np.float32))
    assert cache.get(1) is None
    assert cache.get(0) is first


@given(
    st.permutations(range(12)),
    st.integers(0, 14),
)
def test_training_trials_find_their_room_whatever_was_read_before(
    order: list[int], room: int
) -> None:
    """Trials 0 to 7 are of training, 8 to 11 of validation."""
    trial = np.ones((16, 4), np.float32)
    size = trial.nbytes
    cache = TrialCache(room * size, range(8, 12), (room - 8) * size)
    for index in order:
        cache.put(index, trial)
    kept = {i for i in range(12) if cache.get(i) is not None}
    assert len(kept & set(range(8))) == min(room, 8)
    assert len(kept & set(range(8, 12))) == min(max(room - 8, 0), 4)


@pytest.mark.parametrize(
    ("setting", "available", "processes", "expected"),
    [
        ("auto", 32 * GB, 1, 14 * GB),  # everything fits
        ("auto", 16 * GB, 1, int(0.75 * (16 * GB - (2 << 30) - 2 * GB))),
        ("auto", 16 * GB, 2, int(0.75 * (16 * GB - (2 << 30) - 4 * GB) / 2)),
        ("auto", 3 * GB, 1, 0),
        (3.5, 0, 1, 3_500_000_000),
        (0, 32 * GB, 1, 0),
    ],
)
def test_the_budget_is_as_given_or_leaves_memory_to_the_rest(
    setting, available: int, processes: int, expected: int
) -> None:
    budget = cache_budget_bytes(setting, 14 * GB, 2 * GB, processes, lambda: available)
    assert budget == expected


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_memory_of_a_container_under_cgroup_v2(tmp_path: Path) -> None:
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    _write(proc / "meminfo", "MemTotal: 64000000 kB\nMemAvailable: 60000000 kB\n")
    _write(proc / "self/cgroup", "0::/job/step\n")
    _write(root / "job/memory.max", f"{8 * GB}\n")
    _write(root / "job/memory.current", f"{5 * GB}\n")
    _write(root / "job/memory.stat", f"anon 1\ninactive_file {2 * GB}\n")
    _write(root / "job/step/memory.max", "max\n")
    assert available_bytes(proc, root) == 5 * GB


def test_memory_of_a_container_under_cgroup_v1(tmp_path: Path) -> None:
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    _write(proc / "meminfo", "MemAvailable: 60000000 kB\n")
    _write(proc / "self/cgroup", "5:devices:/\n4:cpu,memory:/docker/abc\n")
    # the path is the host's; inside, the mount's root is the container's own group
    _write(root / "memory/memory.limit_in_bytes", f"{4 * GB}\n")
    _write(root / "memory/memory.usage_in_bytes", f"{1 * GB}\n")
    _write(root / "memory/memory.stat", "total_inactive_file 0\n")
    assert available_bytes(proc, root) == 3 * GB


def test_memory_without_limits_is_what_the_kernel_calls_available(tmp_path: Path) -> None:
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    _write(proc / "meminfo", "MemAvailable: 1000 kB\n")
    _write(root / "memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert available_bytes(proc, root) == 1_024_000
    assert available_bytes(tmp_path / "nothing", root) == 4 << 30
