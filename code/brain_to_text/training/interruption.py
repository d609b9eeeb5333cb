"""SIGTERM and SIGINT as a request: stop at the next safe point, or at once where nothing is held.

SageMaker sends SIGTERM for a stop, a maximum run time or a spot reclaim, and kills 120 s later.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class RunInterrupted(BaseException):
    """Raised inside `Interruption.immediate()`; a BaseException so that no retry swallows it."""


class Interruption:
    """Remembers a stop signal; use as a context manager around a run, in the main thread.

    `requested` is checked between steps. Inside `immediate()` (waiting for data, indexing) the
    signal raises `RunInterrupted` instead, because there is no half-done update to protect.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._immediate = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """A region that a signal may leave at any instruction.

        Raises:
            RunInterrupted: a signal came before or inside the region.
        """
        self._immediate = True
        try:
            if self.requested:
                raise RunInterrupted(self.requested)
            yield
        finally:
            self._immediate = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first = self.requested is None
        self.requested = signal.Signals(number).name
        if first and self._immediate:
            raise RunInterrupted(self.requested)
