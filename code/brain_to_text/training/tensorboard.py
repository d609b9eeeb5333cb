"""A TensorBoard event file that follows a run's metrics.

tensorboardX writes the records; it is imported here only, and a run goes on without it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .run_log import scalars

LOGGER = logging.getLogger("brain_to_text")
FLUSH_SECONDS = 10.0


class EventFile:
    """Writes each entry's numbers as one event at its step and time.

    Trouble with the file (a full disk) is one warning and the end of the file, not of the run.

    Args:
        path: made with the first entry.

    Raises:
        ImportError: tensorboardX is not installed.
    """

    def __init__(self, path: Path) -> None:
        from tensorboardX import RecordWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        self.path = path
        self._Event, self._Summary, self._RecordWriter = Event, Summary, RecordWriter
        self._writer: Any = None
        self._broken = False
        self._flushed_at = 0.0

    def record(self, entry: Mapping[str, Any]) -> None:
        """Append one entry of metrics.jsonl."""
        if self._broken:
            return
        try:
            if self._writer is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._writer = self._RecordWriter(str(self.path))
                self._write(wall_time=entry["time"], file_version="brain.Event:2")
            values = [self._Summary.Value(tag=tag, simple_value=v) for tag, v in scalars(entry)]
            summary = self._Summary(value=values)
            self._write(wall_time=entry["time"], step=entry["step"], summary=summary)
            if time.monotonic() - self._flushed_at >= FLUSH_SECONDS:
                self._writer.flush()
                self._flushed_at = time.monotonic()
        except OSError as error:
            self._broken = True
            LOGGER.warning("No more TensorBoard events are written to %s: %s", self.path, error)

    def close(self, error: BaseException | None, finished: bool, hurry: Callable[[], bool]) -> None:
        """Write what is left, however the run ended."""
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as trouble:
            LOGGER.warning("The end of %s is missing: %s", self.path, trouble)

    def _write(self, **event: Any) -> None:
        self._writer.write(self._Event(**event).SerializeToString())


def open_event_file(path: Path) -> EventFile | None:
    """The event file of a run, or None, with one log line, where tensorboardX is not installed."""
    try:
        return EventFile(path)
    except ImportError as error:
        LOGGER.info("No TensorBoard events are written: no module %s", error.name)
        return None
