"""The files of a run's log, and copies of them on S3; what stands in a line: `log_lines`."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from ..errors import CheckpointError, InUseError, StorageError
from ..model.weights_file import explain_write_error, writing
from ..redaction import one_line
from ..storage.ownership import lock
from ..storage.store import ObjectStore, open_store

LOGGER = logging.getLogger("brain_to_text")


def process_seconds() -> float:
    """Age of this process; 0 where procfs does not tell."""
    try:
        # the name, in brackets, may hold spaces; the start is the 20th field after it
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


def scalars(entry: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, value) of every number in an entry of metrics.jsonl: "train/loss", "validation/per".

    Rates of one session are named "sessions/SESSION/per".
    """
    for name, value in entry.items():
        if name == "per_session":
            for session, rates in value.items():
                for rate, number in rates.items():
                    yield f"sessions/{session}/{rate}", float(number)
        elif name not in ("kind", "time", "step") and type(value) in (int, float):
            yield f"{entry['kind']}/{name}", float(value)


class RunLog(logging.Handler):
    """The run's log lines on stdout and in `training_log`, its numbers in `metrics.jsonl`.

    What an earlier job left in these files stays until `begin` says what this run is. A run that is
    refused before leaves them as they were, so that another run can have the folders.

    Args:
        log_file: the `training_log` of the model folder; None (ranks other than 0) only warns.
        metrics_file: JSON lines, one object per log line or validation; None for none.

    Raises:
        CheckpointError: they cannot be written.
        InUseError: another live process writes them.
    """

    def __init__(self, log_file: Path | None = None, metrics_file: Path | None = None) -> None:
        super().__init__()
        self.log_file, self.metrics_file = log_file, metrics_file
        self._lines = None if log_file is None else lock_file(log_file, "--model-dir")
        self._entries = None
        if metrics_file is not None:
            self._entries = lock_file(metrics_file, "--output-data-dir")
        self._left = {path: path.stat().st_size for path in (log_file, metrics_file) if path}
        self._begun = False
        self._failure: OSError | None = None
        self._uploader: LogUploader | None = None
        self._followers: list[Callable[[Mapping[str, Any]], None]] = []
        LOGGER.addHandler(self)
        LOGGER.setLevel(logging.WARNING if log_file is None else logging.INFO)
        LOGGER.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record of this library's logger; where stdout's reader left, the run goes on.

        Raises:
            OutputError: standard output is full.
        """
        level = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        clock = time.strftime("%Y-%m-%d %H:%M:%S")
        line = one_line(f"{clock}: {level}{record.getMessage()}")
        try:
            if self._lines is not None:
                print(line, file=self._lines, flush=True)
        except OSError as error:
            self._failure = error  # raised where the run can be ended: see `info`
        with suppress(BrokenPipeError):
            print(line, flush=True)

    def info(self, message: str) -> None:
        """One line, after a timestamp.

        Raises:
            CheckpointError: the log cannot be written.
        """
        self._log(logging.INFO, message)

    def warning(self, message: str) -> None:
        """One line that somebody should read, after a timestamp and WARNING."""
        self._log(logging.WARNING, message)

    def metrics(self, kind: str, **values: Any) -> None:
        """Append one JSON object to the metrics file, and show it to the followers.

        Raises:
            CheckpointError: the metrics file cannot be written.
        """
        if self.metrics_file is None:
            return
        entry = {"kind": kind, "time": round(time.time(), 3), **values}
        with writing(self.metrics_file):
            print(json.dumps(entry), file=self._entries, flush=True)
        for record in self._followers:
            record(entry)

    def follow(self, record: Callable[[Mapping[str, Any]], None]) -> None:
        """Call `record` with every entry of metrics.jsonl, those of earlier jobs too.

        It must never raise, and never wait long.
        """
        for line in _text(self.metrics_file).splitlines():
            record(json.loads(line))
        self._followers.append(record)

    def snapshot(self) -> dict[str, str]:
        """Everything logged so far, for the checkpoint."""
        return {"training_log": _text(self.log_file), "metrics": _text(self.metrics_file)}

    def begin(self, earlier: Mapping[str, str] | None = None) -> None:
        """Put what this run logged before, or nothing, instead of what was found in the files.

        Args:
            earlier: the `snapshot` of the job that this one continues.
        """
        for path, name in ((self.log_file, "training_log"), (self.metrics_file, "metrics")):
            if path is not None:
                text = (earlier or {}).get(name, "").encode()
                with writing(path):
                    path.write_bytes(text + path.read_bytes()[self._left[path] :])
        self._begun = True

    def upload_to(self, url: str, others: Mapping[str, Path]) -> None:
        """Keep `URL/training_log` up to date from now on, in a thread.

        Args:
            others: more files to keep up to date, by their key below `url`.
        """
        if self.log_file is not None:
            self._uploader = LogUploader({self.log_file.name: self.log_file, **others}, url)

    def close(self) -> None:
        """Upload the last lines and let go of the files."""
        if self._uploader is not None:
            self._uploader.close()
        LOGGER.removeHandler(self)
        if not self._begun:
            self._restore()
        for file in (self._lines, self._entries):
            if file is not None:
                with suppress(OSError):  # what could not be written was named when it was logged
                    file.close()
        super().close()

    def _restore(self) -> None:
        for path, size in self._left.items():
            with suppress(OSError):
                os.truncate(path, size) if size else path.unlink()

    def _log(self, level: int, message: str) -> None:
        LOGGER.log(level, "%s", message)
        failure, self._failure = self._failure, None
        if failure is not None and self.log_file is not None:
            raise CheckpointError(explain_write_error(self.log_file, failure)) from failure


class LogUploader:
    """Writes growing files to an object store whenever they have grown, once a minute at most.

    Losing the copies never stops a run: the first failure is a warning, later ones are silent.

    Args:
        files: by their key below `url`; those that do not exist yet are waited for.
    """

    def __init__(self, files: Mapping[str, Path], url: str, interval_seconds: float = 60.0) -> None:
        self._files, self._url, self._interval = files, url, interval_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-uploader", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Upload what is new, then stop."""
        self._stop.set()
        self._thread.join(timeout=20.0)

    def _run(self) -> None:
        store: ObjectStore | None = None
        uploaded_bytes: dict[str, int] = {}
        warned = stopping = False
        while not stopping:
            stopping = self._stop.wait(self._interval)
            try:
                store = store or open_store(self._url)
                for key, path in self._files.items():
                    content = path.read_bytes() if path.exists() else b""
                    if len(content) != uploaded_bytes.get(key, 0):
                        store.write(key, content)
                        uploaded_bytes[key] = len(content)
            except StorageError as error:
                if not warned:
                    LOGGER.warning("The log is not copied to %s: %s", self._url, error)
                warned = True


def lock_file(path: Path, option: str) -> TextIO:
    """Take a file for this process, before anything in it changes; until what comes back is closed.

    On a file system without locks, a warning says that nothing keeps two runs apart there.

    Args:
        option: that gives a run another folder.

    Raises:
        CheckpointError: it cannot be written.
        InUseError: another live process has it.
    """
    with writing(path):
        file = path.open("a", encoding="utf-8")
    refusal = f"{path.parent} is in use by another run: give this run its own with {option}."
    try:
        no_locks = lock(file.fileno(), refusal)
    except InUseError:
        file.close()
        raise
    if no_locks:
        LOGGER.warning(
            "The file system of %s has no locks (%s): start no second run there, which nothing "
            "would stop",
            path.parent,
            no_locks,
        )
    return file


def _text(path: Path | None) -> str:
    return path.read_text(encoding="utf-8") if path is not None and path.exists() else ""
