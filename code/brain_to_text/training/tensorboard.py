"""A TensorBoard event file that follows a run's metrics.

tensorboardX writes the records; it is imported here only, and a run goes on without it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .run_log import scalars

LOGGER = logging.getLogger("brain_to_text")
# One name for all jobs of a run: TensorBoard's own names contain the time, so that a resumed job's
# file would stand beside that of the job before it, with the steps between them twice.
FILE_NAME = "events.out.tfevents.0000000000.brain-to-text"
FLUSH_SECONDS = 10.0


class EventFile:
    """Writes each entry's numbers as one event at its step and time.

    Trouble with the file (a full disk) is one warning and the end of the file, not of the run.

    Args:
        folder: where TensorBoard is pointed at; made with the first entry.

    Raises:
        ImportError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboardX import RecordWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        self.path = folder / FILE_NAME
        self._Event, self._Summary, self._RecordWriter = Event, Summary, RecordWriter
        self._writer: Any = None
        self._broken = False
        self._flushed_at = 0.0

    def record(self, entry: Mapping[str, Any]) -> None:
        """Append one entry of metrics.jsonl."""
        if self._broken:
            return
        try:
            self._append(entry)
        except OSError as error:
            self._broken = True
            LOGGER.warning("No more TensorBoard events are written to %s: %s", self.path, error)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is None:
            return
        try:
            self._writer.close()
        except OSError as error:
            LOGGER.warning("The end of %s is missing: %s", self.path, error)
        self._writer = None

    def _append(self, entry: Mapping[str, Any]) -> None:
        moment = float(entry.get("time", 0.0))
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = self._RecordWriter(str(self.path))
            version = self._Event(wall_time=moment, file_version="brain.Event:2")
            self._writer.write(version.SerializeToString())
        values = [self._Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(entry)]
        event = self._Event(
            wall_time=moment, step=int(entry["step"]), summary=self._Summary(value=values)
        )
        self._writer.write(event.SerializeToString())
        if time.monotonic() - self._flushed_at >= FLUSH_SECONDS:
            self._writer.flush()
            self._flushed_at = time.monotonic()


def open_event_file(folder: Path) -> EventFile | None:
    """The event file of a run, or None, with one log line, where tensorboardX is not installed."""
    try:
        return EventFile(folder)
    except ImportError as error:
        LOGGER.info("No TensorBoard events are written: no module %s", error.name)
        return None
