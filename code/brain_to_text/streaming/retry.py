"""When to try a read again, how long to wait, and when to stop."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RetryPolicy:
    """Limits on what one read may cost in time.

    Attributes:
        budget_seconds: from the first attempt to giving up.
        read_timeout_seconds: silence of the server after which an attempt is given up.
        first_delay_seconds, longest_delay_seconds: range of the pause before an attempt; it
            doubles from one to the other, and each pause is drawn uniformly from the upper half
            ("equal jitter"), so that many readers neither march in step nor hammer a throttled
            prefix.
        slowest_bytes_per_second: an attempt slower than this on average is given up, so that a
            trickle cannot spend the whole budget on one connection.
    """

    budget_seconds: float = 120.0
    read_timeout_seconds: float = 10.0
    first_delay_seconds: float = 0.05
    longest_delay_seconds: float = 2.0
    slowest_bytes_per_second: float = 250_000.0

    def attempt_seconds(self, n_bytes: int) -> float:
        """Longest time one attempt at `n_bytes` may take."""
        return self.read_timeout_seconds + n_bytes / self.slowest_bytes_per_second


@dataclass
class Attempts:
    """The attempts at one read, counted against its budget."""

    policy: RetryPolicy
    count: int = 0
    started: float = field(default_factory=time.monotonic)
    last_cause: str = ""

    def remaining_seconds(self) -> float:
        return self.policy.budget_seconds - (time.monotonic() - self.started)

    def timeout_seconds(self, n_bytes: int) -> float:
        """Time for the attempt that starts now: never beyond the budget."""
        return max(0.0, min(self.policy.attempt_seconds(n_bytes), self.remaining_seconds()))

    def pause_seconds(self) -> float | None:
        """Time to wait before the next attempt, or None when the budget does not allow one."""
        ceiling = min(
            self.policy.longest_delay_seconds,
            self.policy.first_delay_seconds * 2 ** min(self.count - 1, 30),
        )
        pause = random.uniform(ceiling / 2, ceiling)
        return pause if pause < self.remaining_seconds() else None
