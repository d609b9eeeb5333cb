"""The folder of resume states: the last few kept, checked before use, one run at a time.

Beside the states lie the outputs that a later job could not make again: kept until the run is done,
whichever way it goes.
"""

from __future__ import annotations

import fcntl
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..model.weights_file import (
    copy_atomically,
    explain_write_error,
    load_verified,
    remove_quietly,
    save_atomically,
    state_to_cpu,
)

KEPT_STATES = 2
_STATE_NAME = re.compile(r"state-(\d{9})\.pt")
_OWN_TEMPORARY = re.compile(r"(state-\d{9}\.pt|best_checkpoint|step_\d+|val_logits\.pt)\.tmp")


class CheckpointFolder:
    """The resume states of one run, newest last.

    Args:
        path: folder, created when absent; on SageMaker `/opt/ml/checkpoints`.

    Raises:
        CheckpointError: the folder cannot be written, or another live process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer = ThreadPoolExecutor(1, "checkpoint-writer")
        self._write_under_way: Future[None] | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("a+")
        except OSError as error:
            raise CheckpointError(explain_write_error(path / ".lock", error)) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise CheckpointError(
                f"Checkpoint folder {path} is in use by another run: "
                "give this run its own with --checkpoint-dir."
            ) from None
        for entry in path.iterdir():
            if _OWN_TEMPORARY.fullmatch(entry.name):
                remove_quietly(entry)

    def steps(self) -> list[int]:
        """Steps of the states present, ascending."""
        matches = (_STATE_NAME.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(match.group(1)) for match in matches if match)

    def last_good(self) -> Path | None:
        """The newest state, once the write under way is done; None before the first."""
        self.wait()
        steps = self.steps()
        return self.state_path(steps[-1]) if steps else None

    def state_path(self, step: int) -> Path:
        """Where the state after `step` completed steps lies."""
        return self.path / f"state-{step:09d}.pt"

    def save(self, state: dict[str, Any], step: int, *, wait: bool = False) -> None:
        """Write a state; by default the copy is taken now and the writing goes on behind.

        Raises:
            CheckpointError: this write (with `wait`) or the one before it failed.
        """
        self.wait()
        snapshot = state if wait else state_to_cpu(state)
        self._write_under_way = self._writer.submit(self._write, snapshot, step)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return when no write is under way.

        Raises:
            CheckpointError: the write behind failed.
        """
        write, self._write_under_way = self._write_under_way, None
        if write is not None:
            write.result()

    def load_latest(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest valid state, and one sentence for each damaged one passed over.

        Raises:
            CheckpointError: states exist but none is valid; starting over silently would lose them.
        """
        passed_over: list[str] = []
        for step in reversed(self.steps()):
            try:
                return load_verified(self.state_path(step)), passed_over
            except CheckpointError as error:
                passed_over.append(str(error))
        if passed_over:
            raise CheckpointError(
                f"No checkpoint in {self.path} can be read ({passed_over[0]}): "
                "remove the folder to start over, or restore it from a backup."
            )
        return None, []

    def keep(self, output: Path) -> None:
        """Keep a copy of an output beside the states.

        Raises:
            CheckpointError: the volume refuses it.
        """
        copy_atomically(output, self.path / output.name)

    def bring_back(self, output: Path) -> None:
        """Put an output back where a new job, which has an empty folder there, would miss it.

        Raises:
            CheckpointError: it was not kept, is damaged, or cannot be written there.
        """
        kept = self.path / output.name
        load_verified(kept)
        copy_atomically(kept, output)

    def close(self) -> None:
        """Finish the write under way and let go of the folder."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self._lock.close()

    def _write(self, state: dict[str, Any], step: int) -> None:
        save_atomically(state, self.state_path(step))
        for old in self.steps()[:-KEPT_STATES]:
            remove_quietly(self.state_path(old))
