"""One request that may fail: when to ask again, when to stop (what S3 says: `s3_errors`)."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger("brain_to_text")

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
    """An answer that seldom changes by asking again: access denied, no such object."""


class MissingError(PersistentError):
    """There is no such object."""


class ObjectReplacedError(Exception):
    """The object under this key is not the one in the manifest."""


@dataclass(frozen=True)
class RetryPolicy:
    """Limits on what one request may cost in time.

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
    """The attempts at one request, counted against its budget.

    Attributes:
        what: the request, as the log names it.
        last_cause, advice: of the last failure.
    """

    policy: RetryPolicy
    what: str = ""
    count: int = 0
    started: float = field(default_factory=time.monotonic)
    last_cause: str = ""
    advice: str = ""
    _final: list[str] = field(default_factory=list)
    _said: float = field(default_factory=lambda: _SILENT_SECONDS)

    @property
    def elapsed_seconds(self) -> float:
        return time.monotonic() - self.started

    def remaining_seconds(self) -> float:
        return self.policy.budget_seconds - self.elapsed_seconds

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

    async def run(self, attempt: Callable[[], Awaitable[T]], n_bytes: int) -> T:
        """The result of one attempt, given up after the time that `n_bytes` may take.

        Raises:
            ReadError: it failed or took too long.
        """
        self.count += 1
        limit = self.timeout_seconds(n_bytes)
        try:
            async with asyncio.timeout(limit):
                return await attempt()
        except TimeoutError as error:
            if self.last_cause and limit < self.policy.attempt_seconds(n_bytes):
                # it was the budget's end that cut this attempt short: that is no cause
                raise ReadError(self.last_cause, self.advice) from error
            raise ReadError(f"no complete answer within {limit:.1f} s") from error

    async def wait_after(
        self,
        fault: ReadError,
        renew: Callable[[], Awaitable[bool]],
        final: bool = False,
    ) -> None:
        """Pause before the next attempt, with new credentials where the last ones were rejected.

        Args:
            renew: asks the credential provider; says whether others may come.
            final: the fault is one that asking again seldom changes, whatever its type.

        Raises:
            ReadError: the budget is spent, or such a fault has come too often.
        """
        if isinstance(fault, CredentialsRejectedError):
            try:
                async with asyncio.timeout(self.timeout_seconds(0)):
                    final = not await renew()
            except TimeoutError:  # the budget's end, which is no cause
                fault = ReadError(self.last_cause or str(fault), self.advice or fault.advice)
            except CredentialsRejectedError as none:
                fault = none
        self.last_cause, self.advice = str(fault), fault.advice
        if final or isinstance(fault, PersistentError):
            self._final.append(self.last_cause)
            if self._final.count(self.last_cause) >= PATIENCE:
                raise fault
        pause = self.pause_seconds()
        if pause is None:
            raise fault
        if self.what and self.elapsed_seconds > self._said:
            self._said = self.elapsed_seconds + _SILENT_SECONDS
            log.warning(
                "%s: %s; attempt %d, trying for another %.0f s",
                self.what,
                self.last_cause,
                self.count,
                self.remaining_seconds(),
            )
        await asyncio.sleep(pause)
