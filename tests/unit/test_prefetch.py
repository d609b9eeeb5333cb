"""Prefetching: in order, never too much at once, and gone at once when it is left."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import threading
import time

import pytest
from brain_to_text.streaming.prefetch import Prefetcher, PrefetchLimits


class Work:
    """Batches whose reads wait for permission, and what all of them have done."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.reads = collections.defaultdict[int, concurrent.futures.Future[None]](
            concurrent.futures.Future
        )

    def begin(self, step: int):
        self.begun.append(step)
        return self.reads[step], lambda: self.finish(step)

    def finish(self, step: int) -> int:
        self.reads[step].result()
        if step == 13:
            raise ValueError("thirteen")
        return step

    def allow(self, *steps: int) -> None:
        for step in steps:
            self.reads[step].set_result(None)

    @property
    def cancelled(self) -> list[int]:
        return [step for step in self.begun if self.reads[step].cancelled()]


def test_batches_come_in_order_whatever_finishes_first() -> None:
    work = Work()
    with contextlib.closing(
        Prefetcher(work.begin, lambda _: 1, 0, 4, PrefetchLimits(batches=4, threads=4))
    ) as ahead:
        work.allow(3, 2, 1)
        assert not ahead.ready()
        work.allow(0)
        assert list(ahead) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (PrefetchLimits(batches=3, n_bytes=1000), [0, 1, 2]),
        (PrefetchLimits(batches=9, n_bytes=25), [0, 1]),
        (PrefetchLimits(batches=9, n_bytes=1), [0]),
    ],
)
def test_no_more_is_begun_than_the_limits_allow(
    limits: PrefetchLimits, expected: list[int]
) -> None:
    work = Work()
    with contextlib.closing(Prefetcher(work.begin, lambda _: 10, 0, 100, limits)) as ahead:
        assert work.begun == expected
        work.allow(*range(100))
        assert next(ahead) == 0
        assert work.begun == [*expected, len(expected)]


def test_an_error_is_raised_when_its_turn_comes() -> None:
    work = Work()
    work.allow(*range(20))
    ahead = Prefetcher(work.begin, lambda _: 1, 10, 20, PrefetchLimits())
    assert [next(ahead) for _ in range(3)] == [10, 11, 12]
    with pytest.raises(ValueError, match="thirteen"):
        next(ahead)
    with pytest.raises(StopIteration):
        next(ahead)


def test_a_failed_batch_is_not_ready() -> None:
    """Who looks ahead only at what is ready keeps the batch in hand."""
    work = Work()
    work.allow(12, 13)
    with contextlib.closing(Prefetcher(work.begin, lambda _: 1, 12, 20, PrefetchLimits())) as ahead:
        assert next(ahead) == 12
        concurrent.futures.wait([ahead._queue[0][2]], timeout=30)
        assert not ahead.ready()
        with pytest.raises(ValueError, match="thirteen"):
            next(ahead)


def test_closing_gives_up_everything_under_way() -> None:
    before = threading.active_count()
    work = Work()
    ahead = Prefetcher(work.begin, lambda _: 1, 0, 10, PrefetchLimits(batches=4, threads=2))
    ahead.close()
    assert work.cancelled == [0, 1, 2, 3]
    assert list(ahead) == []
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_an_iterator_that_is_dropped_closes_itself() -> None:
    work = Work()
    ahead = Prefetcher(work.begin, lambda _: 1, 0, 10, PrefetchLimits(batches=2))
    del ahead
    assert work.cancelled == [0, 1]
