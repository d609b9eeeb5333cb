"""The batch plan: pure, even, and the same whatever the number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from brain_to_text.streaming.batch_plan import BatchPlan, evaluation_batches, shard
from hypothesis import given
from hypothesis import strategies as st


def sessions(*sizes: int) -> list[np.ndarray]:
    ends = np.cumsum(sizes)
    return [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def test_batches_never_change_between_versions() -> None:
    plan = BatchPlan(sessions(10, 20, 30, 40), batch_size=8, sessions_per_batch=2, seed=1)
    assert plan.trials(0).tolist() == [57, 31, 52, 37, 76, 66, 70, 92]
    assert plan.trials(150_000).tolist() == [5, 7, 8, 9, 11, 18, 11, 23]


def test_a_batch_does_not_depend_on_the_batches_before_it() -> None:
    plan = BatchPlan(sessions(50, 60, 70), 12, 2, seed=3)
    forwards = [plan.trials(k) for k in range(20)]
    backwards = [
        BatchPlan(sessions(50, 60, 70), 12, 2, seed=3).trials(k) for k in reversed(range(20))
    ]
    assert all(np.array_equal(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))


def test_seeds_and_steps_give_different_batches() -> None:
    drawn = {
        tuple(BatchPlan(sessions(500, 500), 16, 2, seed).trials(step))
        for seed in range(10)
        for step in range(10)
    }
    assert len(drawn) == 100


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.integers(1, 40),
    st.integers(1, 8),
    st.integers(0, 2**63),
    st.integers(0, 10**6),
)
def test_each_batch_is_full_even_and_contiguous_by_session(
    sizes: list[int], batch_size: int, per_batch: int, seed: int, step: int
) -> None:
    plan = BatchPlan(sessions(*sizes), batch_size, per_batch, seed)
    batch = plan.trials(step)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    days, counts = np.unique(owner[batch], return_counts=True)
    assert len(batch) == batch_size
    assert len(days) == min(per_batch, len(sizes), batch_size)
    assert counts.max() - counts.min() <= 1
    assert (np.diff(owner[batch]) >= 0).all()


def test_sessions_and_trials_are_drawn_uniformly() -> None:
    plan = BatchPlan(sessions(*[20] * 10), batch_size=8, sessions_per_batch=4, seed=0)
    batches = np.stack([plan.trials(step) for step in range(5000)])
    by_session = np.bincount(batches.ravel() // 20, minlength=10)
    by_trial = np.bincount(batches.ravel(), minlength=200)
    # sessions are drawn 2 trials at a time (variance x 2), trials all but independently
    assert _chi_square(by_session) / 2 < 27.9  # 99.9 % point for 9 degrees of freedom
    assert _chi_square(by_trial) < 267 * 1.1  # 99.9 % point for 199, and the pairs


def test_must_include_sessions_are_in_every_batch() -> None:
    plan = BatchPlan(sessions(5, 5, 5, 5, 5), 6, 3, seed=9, must_include=[3])
    for step in range(50):
        batch = plan.trials(step)
        assert 3 in batch // 5
        assert len(set(batch // 5)) == 3


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 2500)), min_size=1, max_size=64),
    st.integers(1, 16),
)
def test_shards_are_disjoint_complete_and_even(
    drawn: list[tuple[int, int]], world_size: int
) -> None:
    lengths_of = dict(drawn)
    trials = np.array([index for index, _ in drawn])
    lengths = np.array([lengths_of[i] for i in trials])
    shards = [shard(trials, lengths, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(shards).tolist()) == sorted(trials.tolist())
    sizes = [len(s) for s in shards]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_no_trial_is_read_by_two_ranks_and_none_waits_long(world_size: int) -> None:
    rng = np.random.default_rng(0)
    lengths_of = rng.integers(300, 1900, size=400)
    plan = BatchPlan(sessions(*[40] * 10), batch_size=48, sessions_per_batch=4, seed=2)
    worst = 0.0
    for step in range(200):
        trials = plan.trials(step)
        shards = [shard(trials, lengths_of[trials], r, world_size) for r in range(world_size)]
        owners = [r for r, part in enumerate(shards) for _ in np.unique(part)]
        assert len(owners) == len(np.unique(trials)), "a trial drawn twice is on two ranks"
        bins = [int(lengths_of[part].sum()) for part in shards]
        worst = max(worst, max(bins) / np.mean(bins))
        days = [part // 40 for part in shards]
        assert all((np.diff(d) >= 0).all() for d in days), "sessions are no longer contiguous"
    assert worst < 1.15


@given(st.lists(st.integers(1, 2000), min_size=0, max_size=100), st.integers(1, 20))
def test_evaluation_batches_hold_every_trial_once(lengths: list[int], batch_size: int) -> None:
    indices = np.arange(len(lengths)) * 3
    batches = evaluation_batches(indices, np.array(lengths, dtype=np.int64), batch_size)
    together = np.concatenate(batches) if batches else np.array([], int)
    assert sorted(together.tolist()) == indices.tolist()
    assert all(1 <= len(b) <= batch_size for b in batches)
    ordered = np.array(lengths)[together // 3] if lengths else np.array([])
    assert (np.diff(ordered) <= 0).all()


def _chi_square(counts: np.ndarray) -> float:
    mean = counts.mean()
    return float(((counts - mean) ** 2 / mean).sum())


def test_length_groups_draw_trials_of_similar_length_and_each_as_often_as_without() -> None:
    n_time_steps = np.random.default_rng(0).permutation(np.arange(100, 166))
    trials = sessions(31, 33, 2)
    plan = BatchPlan(
        trials, batch_size=30, sessions_per_batch=3, seed=4, n_time_steps=n_time_steps,
        length_groups=4,
    )  # fmt: skip
    drawn = [plan.trials(step) for step in range(4000)]
    for session in trials[:2]:
        spread = [np.ptp(n_time_steps[np.intersect1d(batch, session)]) for batch in drawn]
        assert max(spread) < 30 < np.ptp(n_time_steps[session])
        counts = np.bincount(np.concatenate(drawn), minlength=66)[session]
        assert counts.min() > 0.8 * counts.mean() and counts.max() < 1.2 * counts.mean()
    shares = [plan.bins_over_mean(step) for step in range(4000)]
    assert np.mean(shares) == pytest.approx(1, abs=0.01) and np.ptp(shares) > 0.2
    plain = BatchPlan(trials, 30, 3, seed=4, n_time_steps=n_time_steps)
    assert plain.bins_over_mean(0) == 1 and len(np.unique(plain.trials(0))) > 15
