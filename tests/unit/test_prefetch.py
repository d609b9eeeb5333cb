"""Prefetching: in order, never too much at once, and gone at once when it is left."""

from __future__ import annotations

import collections
import concurrent.futures
import threading
import time

import pytest
from brain_to_text.streaming.prefetch import Prefetcher, PrefetchLimits
from brain_to_text.streaming.stream_stats import StreamStats


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

    def ahead(self, start: int, stop: int, **limits: int) -> Prefetcher:
        """Its batches, of ten bytes each."""
        return Prefetcher(
            self.begin, lambda _: 10, start, stop, PrefetchLimits(**limits), StreamStats()
        )

    @property
    def cancelled(self) -> list[int]:
        return [step for step in self.begun if self.reads[step].cancelled()]


def test_batches_come_in_order_whatever_finishes_first() -> None:
    work = Work()
    with work.ahead(0, 4) as ahead:
        work.allow(3, 2, 1)
        assert not ahead.ready()
        work.allow(0)
        assert list(ahead) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"batches": 3, "n_bytes": 1000}, [0, 1, 2]),
        ({"batches": 9, "n_bytes": 25}, [0, 1]),
        ({"batches": 9, "n_bytes": 1}, [0]),
    ],
)
def test_no_more_is_begun_than_the_limits_allow(
    limits: dict[str, int], expected: list[int]
) -> None:
    work = Work()
    with work.ahead(0, 100, **limits) as ahead:
        assert work.begun == expected
        work.allow(*range(100))
        assert next(ahead) == 0
        assert work.begun == [*expected, len(expected)]


def test_an_error_is_raised_when_its_turn_comes() -> None:
    work = Work()
    work.allow(*range(20))
    ahead = work.ahead(10, 20)
    assert [next(ahead) for _ in range(3)] == [10, 11, 12]
    with pytest.raises(ValueError, match="thirteen"):
        next(ahead)
    with pytest.raises(StopIteration):
        next(ahead)


def test_a_failed_batch_is_not_ready() -> None:
    """Who looks ahead only at what is ready keeps the batch in hand."""
    work = Work()
    work.allow(12, 13)
    with work.ahead(12, 20) as ahead:
        assert next(ahead) == 12
        concurrent.futures.wait([ahead._queue[0][2]], timeout=30)
        assert not ahead.ready()
        with pytest.raises(ValueError, match="thirteen"):
            next(ahead)


def test_closing_gives_up_everything_under_way() -> None:
    before = threading.active_count()
    work = Work()
    ahead = work.ahead(0, 10, batches=4)
    ahead.close()
    assert work.cancelled == [0, 1, 2, 3]
    assert list(ahead) == []
    while threading.active_count() > before:
        time.sleep(0.01)


def test_an_iterator_that_is_dropped_closes_itself() -> None:
    work = Work()
    ahead = work.ahead(0, 10, batches=2)
    del ahead
    assert work.cancelled == [0, 1]
