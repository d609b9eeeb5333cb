"""The container contract: where SageMaker puts things, and how it tells a job to stop.

Paths are read from SM_* variables, with SageMaker's defaults; elsewhere they are given on the
command line. SIGTERM (a stop, a maximum run time, a spot reclaim) and SIGINT are requests: a run
stops at the next safe point, or at once where nothing is held. SageMaker kills 120 s after SIGTERM.
"""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import BrainToTextError
from ..redaction import one_line


@dataclass(frozen=True)
class SageMakerEnvironment:
    """Paths and names of one training job on one host.

    Attributes:
        model_dir: becomes model.tar.gz.
        output_data_dir: becomes output.tar.gz.
        checkpoint_dir: synchronised with the job's checkpoint location while it runs.
        failure_file: its first 1024 characters become the job's failure reason.
        data_dir: the `training` channel where the job has one, else None.
        job_name: None outside SageMaker.
        old_failure: clock of a failure file that an earlier run left; None without one.
    """

    model_dir: Path
    output_data_dir: Path
    checkpoint_dir: Path
    failure_file: Path
    data_dir: Path | None
    job_name: str | None
    old_failure: int | None = None

    @classmethod
    def from_variables(cls, variables: Mapping[str, str] | None = None) -> SageMakerEnvironment:
        """Read the contract from `variables` (default: this process's environment)."""
        env = os.environ if variables is None else variables
        base = Path(env.get("SAGEMAKER_BASE_DIR", "/opt/ml"))
        channel = env.get("SM_CHANNEL_TRAINING")
        failure = Path(env.get("SM_OUTPUT_DIR", base / "output")) / "failure"
        return cls(
            model_dir=Path(env.get("SM_MODEL_DIR", base / "model")),
            output_data_dir=Path(env.get("SM_OUTPUT_DATA_DIR", base / "output" / "data")),
            checkpoint_dir=Path(env.get("SM_CHECKPOINT_DIR", base / "checkpoints")),
            failure_file=failure,
            data_dir=Path(channel) if channel else None,
            job_name=env.get("TRAINING_JOB_NAME"),
            old_failure=_clock(failure),
        )

    def forget_failure(self) -> None:
        """Remove the failure file of an earlier run, if it is still there."""
        if self.old_failure is not None and _clock(self.failure_file) == self.old_failure:
            with contextlib.suppress(OSError):
                self.failure_file.unlink(missing_ok=True)

    def write_failure(self, error: BaseException) -> str:
        """Say why the job failed, in one sentence plus the cause, where SageMaker looks for it.

        What a process of this run wrote stays: the first to fail knows the reason. On a full
        volume the blocks that the toolkit's hook has reserved are given up for it.

        Returns:
            The text written (and to be printed as the last line).
        """
        text = failure_text(error)
        self.forget_failure()
        for _ in range(2):
            try:
                with self.failure_file.open("x") as file:
                    file.write(text + "\n")
            except (FileExistsError, FileNotFoundError):
                break  # another process was first; or there is no such folder here
            except OSError:
                with contextlib.suppress(OSError):
                    self.failure_file.unlink(missing_ok=True)
                    self.failure_file.with_name("failure-reserve").unlink(missing_ok=True)
            else:
                break
        return text


def failure_text(error: BaseException) -> str:
    """One sentence for a user, and the cause behind it; never more than 1024 characters."""
    if isinstance(error, BrainToTextError):
        text = str(error)
    else:
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "start"
        reason = " ".join(str(error).split())
        text = (
            f"The trainer stopped at {where} on an error it does not know: "
            f"{type(error).__name__}: {reason}. The log holds the traceback."
        )
    cause = error.__cause__
    if cause is not None:
        reason = " ".join(str(cause).split())
        known = getattr(cause, "strerror", None) or reason
        if reason and known not in text:
            text += f" Cause: {type(cause).__name__}: {reason}"
    text = one_line(text)
    return text if len(text) <= 1024 else text[:1021] + "..."


def _clock(path: Path) -> int | None:
    """When a file was written, in ns; None where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


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

    @contextlib.contextmanager
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
