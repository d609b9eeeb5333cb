"""The files of a run's log, and copies of them on S3; what stands in a line: `log_lines`."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

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


class Follower(Protocol):
    """Something that wants every entry of metrics.jsonl: must never raise, and never wait long.

    At the end it hears how the run ended.
    """

    def record(self, entry: Mapping[str, Any]) -> None: ...
    def close(self, error: BaseException | None, finished: bool) -> None: ...


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


class _ScrubbingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        if record.levelno >= logging.WARNING:
            record = logging.makeLogRecord(
                {**record.__dict__, "msg": f"{record.levelname}: {record.msg}"}
            )
        return one_line(super().format(record))


class _LogFile(logging.FileHandler):
    """A log file that remembers why it was not written, where logging would print a traceback."""

    failure: BaseException | None = None

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 -- logging's name
        self.failure = sys.exc_info()[1]


class _Console(logging.StreamHandler[TextIO]):
    """Standard output: where it is full the run ends, where its reader left the run goes on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 -- logging's name
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, BrokenPipeError):
            raise error


class RunLog:
    """The run's log lines on stdout and in `training_log`, its numbers in `metrics.jsonl`.

    What an earlier job left in these files stays until `begin` says what this run is.

    Args:
        log_file: the `training_log` of the model folder; None (ranks other than 0) only warns.
        metrics_file: JSON lines, one object per log line or validation; None for none.

    Raises:
        CheckpointError: they cannot be written, or another live process writes them.
    """

    def __init__(self, log_file: Path | None, metrics_file: Path | None) -> None:
        self.log_file = log_file
        self.metrics_file = metrics_file
        self._uploader: LogUploader | None = None
        self._followers: list[Follower] = []
        self._held: dict[Path, TextIO] = {}
        for path, option in ((log_file, "--model-dir"), (metrics_file, "--output-data-dir")):
            if path is not None:
                self._held[path] = lock_file(path, option)
        self._left = {path: os.fstat(held.fileno()).st_size for path, held in self._held.items()}
        formatter = _ScrubbingFormatter("%(asctime)s: %(message)s", "%Y-%m-%d %H:%M:%S")
        self._handlers: list[logging.Handler] = [_Console(sys.stdout)]
        self._file: _LogFile | None = None
        if log_file is not None:
            with writing(log_file):
                self._file = _LogFile(log_file, encoding="utf-8")
            self._handlers.append(self._file)
        for handler in self._handlers:
            handler.setFormatter(formatter)
            LOGGER.addHandler(handler)
        LOGGER.setLevel(logging.INFO if log_file is not None else logging.WARNING)
        LOGGER.propagate = False

    def info(self, message: str) -> None:
        """One line, after a timestamp.

        Raises:
            CheckpointError: the log cannot be written.
        """
        LOGGER.info("%s", message)
        self._raise_failure()

    def warning(self, message: str) -> None:
        """One line that somebody should read, after a timestamp and WARNING."""
        LOGGER.warning("%s", message)
        self._raise_failure()

    def metrics(self, kind: str, **values: Any) -> None:
        """Append one JSON object to the metrics file, and show it to the followers.

        Raises:
            CheckpointError: the metrics file cannot be written.
        """
        if self.metrics_file is None:
            return
        entry = {"kind": kind, "time": round(time.time(), 3), **values}
        with writing(self.metrics_file), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        for follower in self._followers:
            follower.record(entry)

    def follow(self, follower: Follower) -> None:
        """Show a follower every entry so far, those of earlier jobs too, and all to come."""
        for line in _text(self.metrics_file).splitlines():
            follower.record(json.loads(line))
        self._followers.append(follower)

    def snapshot(self) -> dict[str, str]:
        """Everything logged so far, for the checkpoint."""
        return {"training_log": _text(self.log_file), "metrics": _text(self.metrics_file)}

    def begin(self, earlier: Mapping[str, str] | None = None) -> None:
        """Put what this run logged before, or nothing, instead of what was found in the files.

        Args:
            earlier: the `snapshot` of the job that this one continues.
        """
        for path, name in ((self.log_file, "training_log"), (self.metrics_file, "metrics")):
            if path is None:
                continue
            text = (earlier or {}).get(name, "").encode()
            with writing(path):
                path.write_bytes(text + path.read_bytes()[self._left[path] :])

    def upload_to(self, url: str, others: Mapping[str, Path] | None = None) -> None:
        """Keep `URL/training_log` up to date from now on, in a thread.

        Args:
            others: more files to keep up to date, by their key below `url`.
        """
        if self.log_file is not None:
            files = {self.log_file.name: self.log_file, **(others or {})}
            self._uploader = LogUploader(files, url)

    def close(self) -> None:
        """Upload the last lines and let go of the files."""
        if self._uploader is not None:
            self._uploader.close()
        for handler in self._handlers:
            LOGGER.removeHandler(handler)
        if self._file is not None:
            with suppress(OSError):  # what could not be written was named when it was logged
                self._file.close()
        for held in self._held.values():
            held.close()

    def _raise_failure(self) -> None:
        if self._file is not None and self._file.failure is not None and self.log_file is not None:
            failure, self._file.failure = self._file.failure, None
            raise CheckpointError(explain_write_error(self.log_file, failure)) from failure


class LogUploader:
    """Writes growing files to an object store whenever they have grown, once a minute at most.

    Losing the copies never stops a run: the first failure is a warning, later ones are silent.

    Args:
        files: by their key below `url`; those that do not exist yet are waited for.
    """

    def __init__(self, files: Mapping[str, Path], url: str, interval_seconds: float = 60.0) -> None:
        self._files = dict(files)
        self._url = url
        self._interval = interval_seconds
        self._uploaded_bytes = dict.fromkeys(files, 0)
        self._warned = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-uploader", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Upload what is new, then stop."""
        self._stop.set()
        self._thread.join(timeout=20.0)

    def _run(self) -> None:
        store: ObjectStore | None = None
        while True:
            stopping = self._stop.wait(self._interval)
            for key, path in self._files.items():
                content = path.read_bytes() if path.exists() else b""
                if len(content) == self._uploaded_bytes[key]:
                    continue
                try:
                    store = store or open_store(self._url)
                    store.write(key, content)
                    self._uploaded_bytes[key] = len(content)
                except StorageError as error:
                    if not self._warned:
                        LOGGER.warning("The log is not copied to %s: %s", self._url, error)
                    self._warned = True
            if stopping:
                return


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
        file = path.open("a")
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
