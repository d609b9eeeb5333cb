"""The folder of resume states: two files replaced in turn, checked before use, one run at a time.

SageMaker copies the folder to S3 while a job runs, with a role that may delete nothing there: names
stay the same, and every file is whole at every instant. Beside the states lie the outputs that a
later job could not make again.
"""

from __future__ import annotations

import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..model.weights_file import (
    copy_atomically,
    load_verified,
    remove_quietly,
    save_atomically,
    state_to_cpu,
)
from .log_files import lock_file

BEGUN = ".run.pt"
STATE_NAMES = ("state-a.pt", "state-b.pt")
_TEMPORARY = re.compile(r"(state-\w\.pt|best_checkpoint|step_\d+|val_logits\.pt|\.run\.pt)\.tmp")


class CheckpointFolder:
    """The resume states of one run.

    Args:
        path: folder, created when absent; on SageMaker `/opt/ml/checkpoints`.

    Attributes:
        saved_step: of the last state that was saved, or loaded; -1 before the first.

    Raises:
        CheckpointError: the folder cannot be written.
        InUseError: another live process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.saved_step = -1
        self._newest: Path | None = None
        self._newest_step = -1
        self._lock = lock_file(path / ".lock", "--checkpoint-dir")
        self._writer = ThreadPoolExecutor(1, "checkpoint-writer")
        self._write_under_way: Future[None] | None = None
        for entry in path.iterdir():
            if _TEMPORARY.fullmatch(entry.name):
                remove_quietly(entry)

    def begun_as(self) -> dict[str, Any] | None:
        """The identity of the run that began here; None where none did."""
        path = self.path / BEGUN
        return load_verified(path) if path.exists() else None

    def begin_as(self, identity: dict[str, Any]) -> None:
        """Write down which run begins here, before its first state.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        save_atomically(identity, self.path / BEGUN)

    def newest(self) -> Path | None:
        """The state saved or loaded last, once the write under way is done; None before the first.

        Raises:
            CheckpointError: the write failed.
        """
        self.wait()
        return self._newest

    def save(self, state: dict[str, Any], step: int, *, wait: bool = False) -> None:
        """Write a state; by default the copy is taken now and the writing goes on behind.

        Args:
            step: completed steps, by which the newest state is found.

        Raises:
            CheckpointError: this write (with `wait`) or the one before it failed.
        """
        self.wait()
        content = {"step": step, **(state if wait else state_to_cpu(state))}
        self._write_under_way = self._writer.submit(self._write, content)
        self.saved_step = step
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

    def load_newest(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The valid state with most steps, and one sentence for each damaged one passed over.

        Raises:
            CheckpointError: states exist but none is valid; starting over silently would lose them.
        """
        newest: dict[str, Any] | None = None
        passed_over: list[str] = []
        for path in sorted(self.path.glob("state-*.pt")):
            try:
                state = load_verified(path)
                if not isinstance(state, dict) or not isinstance(state.get("step"), int):
                    raise CheckpointError(f"Checkpoint {path} is no state of this program.")
            except CheckpointError as error:
                passed_over.append(str(error))
                continue
            if newest is None or state["step"] > newest["step"]:
                newest, self._newest = state, path
                self._newest_step = self.saved_step = state["step"]
        if passed_over and newest is None:
            raise CheckpointError(
                f"No checkpoint in {self.path} can be read ({passed_over[0]}): "
                "remove the folder to start over, or restore it from a backup."
            )
        return newest, passed_over

    def keep(self, output: Path) -> None:
        """Keep a copy of an output beside the states.

        Raises:
            CheckpointError: the volume refuses it.
        """
        self._check_folder()
        copy_atomically(output, self.path / output.name)

    def bring_back(self, output: Path) -> None:
        """Put an output back where a new job, which has an empty folder there, would miss it.

        Raises:
            CheckpointError: it was not kept, is damaged, or cannot be written there.
        """
        copy = self.path / output.name
        load_verified(copy)
        copy_atomically(copy, output)

    def close(self) -> None:
        """Finish the write under way and let go of the folder."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self._lock.close()

    def _write(self, content: dict[str, Any]) -> None:
        self._check_folder()
        path = self._newest
        if path is None or content["step"] != self._newest_step:  # else the step's state is renewed
            first, second = (self.path / name for name in STATE_NAMES)
            path = second if path == first else first
        save_atomically(content, path)
        self._newest, self._newest_step = path, content["step"]

    def _check_folder(self) -> None:
        """Raise CheckpointError where the folder has vanished: a new one would hold one state."""
        if not self.path.is_dir():
            raise CheckpointError(
                f"The checkpoint folder {self.path} has vanished while the run went on: mount or "
                "restore it, then start again to resume from what it holds."
            )
