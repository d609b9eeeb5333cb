"""Pauses grow, differ, and end with the budget; a pause of the whole process is no end."""

from __future__ import annotations

import pytest
from brain_to_text.storage import retry
from brain_to_text.storage.retry import Announcer, Attempts, FinalError, ReadError, RetryPolicy


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(retry.time, "monotonic", fake.monotonic)
    return fake


def attempts(policy: RetryPolicy, clock: Clock) -> Attempts:
    return Attempts(policy, "read x", Announcer(), started=clock.now)


def test_pauses_double_up_to_the_longest(clock: Clock) -> None:
    tried = attempts(RetryPolicy(1e9, first_delay_seconds=0.1, longest_delay_seconds=1.0), clock)
    ceilings = [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    for count, ceiling in enumerate(ceilings, start=1):
        tried.count = count
        pauses = [tried.pause_seconds() for _ in range(200)]
        assert all(p is not None and ceiling / 2 <= p <= ceiling for p in pauses)
        assert len(set(pauses)) > 100


@pytest.mark.parametrize(("attempt_takes", "expected"), [(10.0, 6), (1000.0, 3)])
def test_no_attempt_starts_beyond_the_budget_except_two_after_a_pause_of_the_process(
    attempt_takes: float, expected: int, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        clock.wait(attempt_takes)
        raise ReadError("HTTP 503 SlowDown")

    tried = attempts(RetryPolicy(budget_seconds=60), clock)
    with pytest.raises(ReadError, match="SlowDown"):
        tried.run(fails, lambda: False, clock.wait)
    assert tried.count == expected
    assert caplog.messages[0].startswith("Still trying to read x: HTTP 503 SlowDown; attempt 1")
    assert len(caplog.messages) <= expected - 1, "the last failure is an error, no warning"


def test_a_final_answer_is_asked_for_once(clock: Clock) -> None:
    def fails() -> None:
        raise FinalError("HTTP 403 InvalidObjectState")

    tried = attempts(RetryPolicy(), clock)
    with pytest.raises(FinalError):
        tried.run(fails, lambda: False, clock.wait)
    assert tried.count == 1
