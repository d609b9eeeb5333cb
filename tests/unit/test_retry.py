"""Pauses grow, differ, and end with the budget; a pause of the whole process is no end."""

from __future__ import annotations

import pytest
from brain_to_text.errors import DataError, StorageError
from brain_to_text.storage import retry
from brain_to_text.storage.retry import RequestError, Retries, RetryPolicy


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


def test_pauses_double_up_to_the_longest() -> None:
    policy = RetryPolicy(first_delay_seconds=0.1, longest_delay_seconds=1.0)
    for count, longest in enumerate([0.1, 0.2, 0.4, 0.8, 1.0, 1.0], start=1):
        pauses = [policy.pause_seconds(count) for _ in range(200)]
        assert all(longest / 2 <= pause <= longest for pause in pauses)
        assert len(set(pauses)) > 100


@pytest.mark.parametrize(("attempt_takes", "expected"), [(10.0, 6), (1000.0, 3)])
def test_no_attempt_starts_beyond_the_budget_except_two_after_a_pause_of_the_process(
    attempt_takes: float, expected: int, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        clock.wait(attempt_takes)
        raise RequestError("HTTP 503 SlowDown")

    with pytest.raises(StorageError, match=rf"SlowDown, after {expected} attempts in .*; look\."):
        Retries(RetryPolicy(budget_seconds=60)).run("read x", fails, "look", clock.wait)
    assert caplog.messages[0].startswith("Still trying to read x: HTTP 503 SlowDown; attempt 1")
    assert len(caplog.messages) <= expected - 1, "the last failure is an error, no warning"


@pytest.mark.parametrize("final_after", [1, 3])
def test_an_answer_is_final_when_it_came_often_enough(final_after: int, clock: Clock) -> None:
    answers = ["another", *["this"] * 9]

    def fails() -> None:
        raise RequestError(answers.pop(0), "restore it", final_after, DataError)

    if final_after == 1:
        answers.pop(0)
    with pytest.raises(DataError, match=r"^Cannot read x: this.*; restore it\.$"):
        Retries(RetryPolicy()).run("read x", fails, "look", clock.wait)
    assert len(answers) == 9 - final_after
