"""Pauses grow, differ, and end with the budget."""

from __future__ import annotations

import pytest
from brain_to_text.storage import retry as retry
from brain_to_text.storage.retry import Attempts, RetryPolicy


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(retry.time, "monotonic", fake.monotonic)
    return fake


def attempts(policy: RetryPolicy, clock: Clock) -> Attempts:
    return Attempts(policy, started=clock.now)


def test_pauses_double_up_to_the_longest(clock: Clock) -> None:
    tried = attempts(RetryPolicy(1e9, first_delay_seconds=0.1, longest_delay_seconds=1.0), clock)
    ceilings = [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    for count, ceiling in enumerate(ceilings, start=1):
        tried.count = count
        pauses = [tried.pause_seconds() for _ in range(200)]
        assert all(p is not None and ceiling / 2 <= p <= ceiling for p in pauses)
        assert len(set(pauses)) > 100


def test_no_attempt_starts_or_lasts_beyond_the_budget(clock: Clock) -> None:
    tried = attempts(RetryPolicy(budget_seconds=60, read_timeout_seconds=10), clock)
    tried.count = 20
    assert tried.timeout_seconds(0) == 10
    clock.now = 55
    assert tried.timeout_seconds(10**9) == 5
    clock.now = 59.99
    assert tried.pause_seconds() is None
    clock.now = 61
    assert tried.timeout_seconds(0) == 0


def test_a_throttle_of_30_percent_costs_a_read_less_than_a_second() -> None:
    """Mean pause of a read whose attempts fail with probability 0.3, at the default policy."""
    policy = RetryPolicy()
    mean = sum(
        0.3**n * 0.75 * min(policy.first_delay_seconds * 2 ** (n - 1), policy.longest_delay_seconds)
        for n in range(1, 30)
    )
    assert mean < 0.1
