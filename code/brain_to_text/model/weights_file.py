"""A folder of resume states that survives any crash: atomic, checksummed, last few kept.

Files are written to a temporary name, synced, then renamed, so a name without `.tmp` is always
whole. `torch.save` writes a zip whose records carry CRC-32s; those are the checksum, and a state
that fails them is reported and passed over for the one before it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pickle
import re
import shutil
import threading
import time
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ..errors import CheckpointError

_STATE_NAME = re.compile(r"^state-(\d{9})\.pt$")
_TEMPORARY_SUFFIX = ".tmp"

# The public baseline's checkpoints hold their error rate as a NumPy scalar: data, not code.
_NUMPY_SCALARS: list[Any] = [
    np._core.multiarray.scalar,  # type: ignore[attr-defined]
    np.dtype,
    *(type(np.dtype(name)) for name in ("float32", "float64", "int64")),
]


def state_to_cpu(tree: Any) -> Any:
    """A deep copy of nested dicts, lists and tuples with every tensor cloned to CPU memory."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {name: state_to_cpu(value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(state_to_cpu(value) for value in tree)
    return tree


def save_atomically(content: Any, path: Path) -> int:
    """`torch.save` to `path` so that a crash at any instant leaves the old file or the new one.

    Returns:
        Bytes written.

    Raises:
        CheckpointError: the volume is full, read-only or gone; the previous file is untouched.
    """
    temporary = path.with_name(path.name + _TEMPORARY_SUFFIX)
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        _remove_quietly(temporary)
        raise CheckpointError(_explain_write_error(path, error)) from error
    return size


def load_verified(path: Path | IO[bytes], name: str | None = None) -> Any:
    """Read what `save_atomically` wrote: checks every record's CRC, executes no pickled code.

    Raises:
        CheckpointError: not a zip, truncated, a flipped byte, or more than tensors and values.
    """
    label = name or str(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"Checkpoint {label} is damaged: record {damaged} fails its CRC.")
        if not isinstance(path, Path):
            path.seek(0)
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, KeyError) as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise CheckpointError(f"Checkpoint {label} cannot be read: {reason}.") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"Checkpoint {label} holds more than tensors and plain values and was not loaded: "
            "save it again with torch.save of a state_dict."
        ) from error


class CheckpointFolder:
    """The resume states of one run, newest last.

    Args:
        path: folder, created when absent; on SageMaker `/opt/ml/checkpoints`.
        keep: states kept; older ones are removed after each save.

    Raises:
        CheckpointError: the folder cannot be written, or another live process holds it.
    """

    def __init__(self, path: Path, keep: int = 2) -> None:
        self.path = path
        self.keep = keep
        self.last_save_seconds = 0.0
        self.last_save_bytes = 0
        self._writer: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("a+")
        except OSError as error:
            raise CheckpointError(_explain_write_error(path, error)) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise CheckpointError(
                f"Checkpoint folder {path} is in use by another run: "
                "give this run its own with --checkpoint-dir."
            ) from error
        for leftover in path.glob(f"*{_TEMPORARY_SUFFIX}"):
            _remove_quietly(leftover)

    def steps(self) -> list[int]:
        """Steps of the states present, ascending."""
        matches = (_STATE_NAME.match(entry.name) for entry in self.path.iterdir())
        return sorted(int(match.group(1)) for match in matches if match)

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
        if wait:
            self._write(snapshot, step)
            self._raise_failure()
        else:
            self._writer = threading.Thread(
                target=self._write, args=(snapshot, step), name="checkpoint-writer"
            )
            self._writer.start()

    def wait(self) -> None:
        """Return when no write is under way.

        Raises:
            CheckpointError: the write behind failed.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        self._raise_failure()

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

    def close(self) -> None:
        """Finish the write under way and let go of the folder."""
        try:
            self.wait()
        finally:
            self._lock.close()

    def _write(self, state: dict[str, Any], step: int) -> None:
        started = time.perf_counter()
        try:
            self.last_save_bytes = save_atomically(state, self.state_path(step))
        except CheckpointError as error:
            self._failure = error
            return
        self.last_save_seconds = time.perf_counter() - started
        for old in self.steps()[: -self.keep]:
            _remove_quietly(self.state_path(old))

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure


def copy_atomically(source: Path, target: Path) -> None:
    """Copy a file so that `target` is never seen half-written.

    Raises:
        CheckpointError: the source is unreadable or the target volume refuses the write.
    """
    temporary = target.with_name(target.name + _TEMPORARY_SUFFIX)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        _remove_quietly(temporary)
        raise CheckpointError(_explain_write_error(target, error)) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_quietly(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # a leftover temporary file is removed at the next start


def _explain_write_error(path: Path, error: BaseException) -> str:
    code = getattr(error, "errno", None)
    folder = path if path.is_dir() else path.parent
    if code == errno.ENOSPC or _free_bytes(folder) == 0:
        return (
            f"The volume of {folder} is full, so {path.name} was not written; the last good "
            "checkpoint is untouched: free space there, then start again."
        )
    if code in (errno.EROFS, errno.EACCES, errno.EPERM):
        return (
            f"{folder} is read-only, so {path.name} was not written: "
            "give a writable folder with --checkpoint-dir and --model-dir."
        )
    reason = " ".join(str(error).split())
    return f"{path} could not be written ({reason}); the last good checkpoint is untouched."


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return -1
