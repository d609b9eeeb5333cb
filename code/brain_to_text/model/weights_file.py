"""Files of weights: written whole or not at all, and checked before they are read.

A file is what `torch.save` writes: a zip with a CRC-32 of each member, which torch does not look at
when it reads.
"""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ..errors import CheckpointError

_TEMPORARY_SUFFIX = ".tmp"
_FOLDER = 0x10  # an attribute of a zip's member

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


def save_atomically(content: Any, path: Path) -> None:
    """`torch.save` to `path`; a crash leaves the old file or the new one.

    Raises:
        CheckpointError: the volume is full, read-only or gone; the previous file is untouched.
    """
    with _replacing(path) as file:
        torch.save(content, file)


def copy_atomically(source: Path, target: Path) -> None:
    """Copy a file so that `target` is never seen half-written.

    Raises:
        CheckpointError: the source is unreadable or the target volume refuses the write.
    """
    with _replacing(target) as file, source.open("rb") as original:
        shutil.copyfileobj(original, file)


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    temporary = path.with_name(path.name + _TEMPORARY_SUFFIX)
    try:
        with writing(path), temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
    finally:  # the reason was looked for while the half file still filled the volume
        remove_quietly(temporary)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around writes to `path`; its folder is made.

    Raises:
        CheckpointError: the volume is full, read-only or gone.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise CheckpointError(explain_write_error(path, error)) from error


def load_verified(file: Path | IO[bytes], name: str | None = None) -> Any:
    """Read a file of weights; its bytes are checked first, and no pickled code is executed.

    Args:
        name: of the file, for messages; default: its path.

    Raises:
        CheckpointError: damaged, truncated, not a zip, or more than tensors and values.
    """
    label = name or str(file)
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                # torch would leave what the zip calls a folder uninitialised
                if member.compress_type or member.external_attr & _FOLDER:
                    raise zipfile.BadZipFile(f"{member.filename} is compressed, or damaged")
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{damaged} fails its checksum")
        if not isinstance(file, Path):
            file.seek(0)
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"Checkpoint {label} holds more than tensors and plain values and was not loaded: "
            "save it again with torch.save of a state_dict."
        ) from error
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise CheckpointError(
            f"Checkpoint {label} is damaged or none ({reason}): copy it again, or give another."
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_quietly(path: Path) -> None:
    """Remove a file that may be absent, on a volume that may refuse."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # a leftover temporary file is removed at the next start


def explain_write_error(path: Path, error: BaseException) -> str:
    """Why `path` could not be written, and what to do; ask before anything is cleaned up."""
    code = getattr(error, "errno", None)
    folder = path.parent
    if code in (errno.ENOSPC, errno.EDQUOT) or _free_bytes(folder) == 0:
        return (
            f"The volume of {folder} is full, so {path.name} was not written; the last good "
            "checkpoint is untouched: free space there, or launch with a larger --volume-gb, then "
            "start again."
        )
    if code in (errno.EROFS, errno.EACCES, errno.EPERM):
        return (
            f"{folder} is read-only, so {path.name} was not written: "
            "give a writable folder with --checkpoint-dir, --model-dir or --output-data-dir."
        )
    reason = " ".join(str(error).split())
    return f"{path} could not be written ({reason}); the last good checkpoint is untouched."


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return -1
