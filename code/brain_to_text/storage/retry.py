"""One request that may fail: when to ask again, when to stop, and the sentence that ends it."""

from __future__ import annotations

import collections
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ..errors import BrainToTextError, StorageError

T = TypeVar("T")
log = logging.getLogger("brain_to_text")

# So many attempts are made whatever the clock says: a pause of the whole process is one failure.
# An answer like "access denied", or the same wrong bytes, is final when it comes this often.
PATIENCE = 3
_SILENT_SECONDS = 10.0  # of vain attempts before the log says so, and again after as long


class RequestError(Exception):
    """An attempt that failed; the message is the cause.

    Attributes:
        advice: what to do or type about it; "" where only time may help.
        final_after: the same cause so many times ends the attempts; None where only time does.
        kind: of the error that a user sees in the end.
    """

    def __init__(
        self,
        cause: str,
        advice: str = "",
        final_after: int | None = None,
        kind: type[BrainToTextError] = StorageError,
    ) -> None:
        super().__init__(cause)
        self.advice = advice
        self.final_after = final_after
        self.kind = kind

    def sentence(self, what: str, tried: str = "", advice: str = "") -> BrainToTextError:
        """The error that a user sees.

        Args:
            what: could not be done: "list s3://bucket".
            tried: how long, as the end of the cause.
            advice: where the cause has none of its own.
        """
        return self.kind(f"Cannot {what}: {self}{tried}; {self.advice or advice}.")


class CredentialsRejectedError(RequestError):
    """The server no longer accepts the credentials in use, or the provider has no new ones."""


class MissingObjectError(StorageError):
    """There is no such object."""


@dataclass(frozen=True)
class RetryPolicy:
    """Limits on what one request may cost in time.

    Attributes:
        budget_seconds: from the first attempt to the start of the last, unless the first few took
            longer.
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

    def pause_seconds(self, attempts: int) -> float:
        """Time to wait after so many attempts, drawn anew at each call."""
        doubled = self.first_delay_seconds * 2 ** min(attempts - 1, 30)
        longest = min(self.longest_delay_seconds, doubled)
        return random.uniform(longest / 2, longest)


class Retries:
    """Repeats the requests of one store, for all threads, and logs what is still being tried.

    Args:
        policy: what one request may cost.
        renew: asks the provider of credentials where the last ones were rejected; says whether
            others may come.
    """

    def __init__(self, policy: RetryPolicy, renew: Callable[[], bool] = lambda: False) -> None:
        self.policy = policy
        self._renew = renew
        self._lock = threading.Lock()
        self._announced = 0.0

    def run(
        self,
        what: str,
        attempt: Callable[[], T],
        advice: str,
        wait: Callable[[float], None] = time.sleep,
    ) -> T:
        """The result of the first attempt that succeeds.

        Args:
            what: the request, as messages name it: "list s3://bucket".
            advice: for causes that have none of their own.
            wait: for so many seconds, before the next attempt.

        Raises:
            BrainToTextError: the time is over, or the cause is final; of the kind that this says.
        """
        started = time.monotonic()
        causes = collections.Counter[str]()
        while True:
            try:
                return attempt()
            except RequestError as failed:
                fault = self._after_renewal(failed)
            cause = str(fault)
            causes[cause] += 1
            count, elapsed = causes.total(), time.monotonic() - started
            pause = self.policy.pause_seconds(count)
            over = count >= PATIENCE and elapsed + pause >= self.policy.budget_seconds
            if over or (fault.final_after and causes[cause] >= fault.final_after):
                tried = f", after {count} attempts in {elapsed:.1f} s" if count > 1 else ""
                raise fault.sentence(what, tried, advice) from fault
            self._announce(what, cause, count, elapsed)
            wait(pause)

    def _after_renewal(self, fault: RequestError) -> RequestError:
        """What went wrong, once the provider was asked for other credentials."""
        if isinstance(fault, CredentialsRejectedError):
            try:
                fault.final_after = None if self._renew() else PATIENCE
            except CredentialsRejectedError as none:
                return none
        return fault

    def _announce(self, what: str, cause: str, count: int, elapsed: float) -> None:
        with self._lock:
            now = time.monotonic()
            if min(now - self._announced, elapsed) < _SILENT_SECONDS:
                return
            self._announced = now
        left = max(0.0, self.policy.budget_seconds - elapsed)
        log.warning(
            "Still trying to %s: %s; attempt %d, trying for another %.0f s",
            what,
            cause,
            count,
            left,
        )
