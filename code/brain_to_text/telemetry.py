"""What a run says while it runs: log lines, a metrics file, a copy of the log on S3.

CloudWatch metric patterns match the log lines; their wording is a contract (README_SAGEMAKER.md,
Monitoring).
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

from .errors import StorageError
from .object_store import ObjectStore, open_store

LOGGER = logging.getLogger("brain_to_text")
_SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
_SECRET_PATTERN = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")


def scrub(text: str) -> str:
    """`text` with this process's AWS credentials, and anything shaped like a key id, masked."""
    for name in _SECRET_VARIABLES:
        secret = os.environ.get(name)
        if secret and len(secret) > 7:
            text = text.replace(secret, "***")
    return _SECRET_PATTERN.sub("***", text)


class _ScrubbingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        if record.levelno >= logging.WARNING:
            record = logging.makeLogRecord(
                {**record.__dict__, "msg": f"{record.levelname}: {record.msg}"}
            )
        return scrub(super().format(record))


class RunLog:
    """The run's log lines on stdout and in `training_log`, its numbers in `metrics.jsonl`.

    Args:
        log_file: the `training_log` of the model folder; None (ranks other than 0) only warns.
        metrics_file: JSON lines, one object per log line or validation; None for none.
    """

    def __init__(self, log_file: Path | None, metrics_file: Path | None) -> None:
        self.log_file = log_file
        self.metrics_file = metrics_file
        self._uploader: LogUploader | None = None
        formatter = _ScrubbingFormatter("%(asctime)s: %(message)s", "%Y-%m-%d %H:%M:%S")
        self._handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
        if log_file is not None:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            self._handlers.append(logging.FileHandler(log_file, mode="w", encoding="utf-8"))
        for handler in self._handlers:
            handler.setFormatter(formatter)
            LOGGER.addHandler(handler)
        LOGGER.setLevel(logging.INFO if log_file is not None else logging.WARNING)
        LOGGER.propagate = False

    def info(self, message: str) -> None:
        """One line, after a timestamp."""
        LOGGER.info("%s", message)

    def warning(self, message: str) -> None:
        """One line that somebody should read, after a timestamp and WARNING."""
        LOGGER.warning("%s", message)

    def metrics(self, kind: str, **values: Any) -> None:
        """Append one JSON object to the metrics file."""
        if self.metrics_file is None:
            return
        self.metrics_file.parent.mkdir(parents=True, exist_ok=True)
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")

    def snapshot(self) -> dict[str, str]:
        """Everything said so far, for the checkpoint."""
        return {"training_log": _text(self.log_file), "metrics": _text(self.metrics_file)}

    def restore(self, snapshot: dict[str, str]) -> None:
        """Put what an earlier job said before what this one has said so far."""
        for path, earlier in (
            (self.log_file, snapshot["training_log"]),
            (self.metrics_file, snapshot["metrics"]),
        ):
            if path is None or not earlier:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            so_far = _text(path)
            with path.open("r+" if path.exists() else "w", encoding="utf-8") as file:
                file.write(earlier + so_far)
        for handler in self._handlers:
            if isinstance(handler, logging.FileHandler):
                handler.stream.seek(0, os.SEEK_END)  # type: ignore[union-attr]

    def upload_to(self, url: str) -> None:
        """Keep `URL/training_log` up to date from now on, in a thread of its own."""
        if self.log_file is not None:
            self._uploader = LogUploader(self.log_file, url)

    def close(self) -> None:
        """Upload the last lines and let go of the files."""
        if self._uploader is not None:
            self._uploader.close()
        for handler in self._handlers:
            LOGGER.removeHandler(handler)
            if isinstance(handler, logging.FileHandler):
                handler.close()


class LogUploader:
    """Writes a growing file to an object store whenever it has changed, once a minute at most.

    Losing the copy never stops a run: the first failure is a warning, later ones are silent.
    """

    def __init__(self, log_file: Path, url: str, interval_seconds: float = 60.0) -> None:
        self._log_file = log_file
        self._url = url
        self._interval = interval_seconds
        self._uploaded_bytes = 0
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
            content = self._log_file.read_bytes()
            if len(content) != self._uploaded_bytes:
                try:
                    store = store or open_store(self._url)
                    store.write(self._log_file.name, content)
                    self._uploaded_bytes = len(content)
                except StorageError as error:
                    if not self._warned:
                        LOGGER.warning("The log is not copied to %s: %s", self._url, error)
                    self._warned = True
            if stopping:
                return


def _text(path: Path | None) -> str:
    return path.read_text(encoding="utf-8") if path is not None and path.exists() else ""
