"""One request that may fail: when to ask again, when to stop (what S3 says: `s3_errors`)."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger("brain_to_text")

# So many attempts are made whatever the clock says: a pause of the whole process is one failure.
# An answer like "access denied", or the same wrong bytes, is final when it comes this often.
PATIENCE = 3
_SILENT_SECONDS = 10.0  # of vain attempts before the log says so, and again after as long


class ReadError(Exception):
    """An attempt that failed and may work when repeated; the message is the cause.

    Attributes:
        advice: what to do or type about it, or "" where only time may help.
    """

    def __init__(self, cause: str, advice: str = "") -> None:
        super().__init__(cause)
        self.advice = advice


class CredentialsRejectedError(ReadError):
    """The server no longer accepts the credentials in use, or the provider has no new ones."""


class PersistentError(ReadError):
    """An answer that seldom changes by asking again: access denied, wrong bytes."""


class FinalError(ReadError):
    """An answer that does not change by asking again."""


class MissingError(FinalError):
    """There is no such object."""


class ArchivedError(FinalError):
    """The object must be restored before it can be read."""


class ObjectReplacedError(FinalError):
    """The object under this key is not the one in the manifest."""


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


class Announcer:
    """Says in the log what is still being tried, not more often than every few seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0.0

    def __call__(self, attempts: Attempts) -> None:
        with self._lock:
            now = time.monotonic()
            if min(now - self._last, attempts.elapsed_seconds) < _SILENT_SECONDS:
                return
            self._last = now
        log.warning(
            "Still trying to %s: %s; attempt %d, trying for another %.0f s",
            attempts.what,
            attempts.last_cause,
            attempts.count,
            max(0.0, attempts.remaining_seconds()),
        )


@dataclass
class Attempts:
    """The attempts at one request, counted against its budget.

    Attributes:
        what: the request, as the log names it: "list s3://bucket".
        last_cause: of the last failure.
    """

    policy: RetryPolicy
    what: str
    announce: Callable[[Attempts], None]
    count: int = 0
    started: float = field(default_factory=time.monotonic)
    last_cause: str = ""
    _final: list[str] = field(default_factory=list)

    @property
    def elapsed_seconds(self) -> float:
        return time.monotonic() - self.started

    def remaining_seconds(self) -> float:
        return self.policy.budget_seconds - self.elapsed_seconds

    def pause_seconds(self) -> float | None:
        """Time to wait before the next attempt, or None when the budget does not allow one."""
        ceiling = min(
            self.policy.longest_delay_seconds,
            self.policy.first_delay_seconds * 2 ** min(self.count - 1, 30),
        )
        pause = random.uniform(ceiling / 2, ceiling)
        return pause if self.count < PATIENCE or pause < self.remaining_seconds() else None

    def run(
        self,
        attempt: Callable[[], T],
        renew: Callable[[], bool],
        wait: Callable[[float], None] = time.sleep,
    ) -> T:
        """The result of the first attempt that succeeds.

        Args:
            renew: asks the credential provider where the last ones were rejected; says whether
                others may come.
            wait: for so many seconds, before the next attempt.

        Raises:
            ReadError: of the last attempt: the budget is spent, or the answer is final.
        """
        while True:
            self.count += 1
            try:
                return attempt()
            except ReadError as fault:
                wait(self._pause_after(fault, renew))

    def _pause_after(self, fault: ReadError, renew: Callable[[], bool]) -> float:
        final = isinstance(fault, PersistentError)
        if isinstance(fault, CredentialsRejectedError):
            try:
                final = not renew()
            except CredentialsRejectedError as none:
                fault = none
        self.last_cause = str(fault)
        if final:
            self._final.append(self.last_cause)
        pause = self.pause_seconds()
        if (
            pause is None
            or isinstance(fault, FinalError)
            or self._final.count(self.last_cause) >= PATIENCE
        ):
            raise fault
        self.announce(self)
        return pause
