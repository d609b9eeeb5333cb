"""Files of weights: written whole or not at all, with a checksum that decides before they are read.

A file is what `torch.save` writes (a zip that any torch reads) with the SHA-256 of all its bytes as
the zip's comment.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ..errors import CheckpointError

_TEMPORARY_SUFFIX = ".tmp"
_CHUNK = 2**20
# The last record of a zip: a signature, twelve bytes of counts and places, the comment's length.
_END = struct.Struct("<4s16sH")
_COMMENT = re.compile(rb"sha256:([0-9a-f]{64})")
_COMMENT_BYTES = len(b"sha256:") + 64

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
    """`torch.save` to `path`, with its checksum; a crash leaves the old file or the new one.

    Raises:
        CheckpointError: the volume is full, read-only or gone; the previous file is untouched.
    """
    with _replacing(path) as file:
        torch.save(content, file)
        _add_checksum(file)


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
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        reason = explain_write_error(path, error)  # while the half file still fills the volume
        remove_quietly(temporary)
        raise CheckpointError(reason) from error


def _add_checksum(file: IO[bytes]) -> None:
    """Write the zip's comment, with the checksum of all that comes before it."""
    size = file.seek(-2, io.SEEK_END)  # the last two bytes: the comment's length
    if file.read() != b"\0\0":
        raise RuntimeError("torch.save wrote a zip that ends in another way than expected")
    comment = b"sha256:" + _checksum(file, size)
    file.seek(size)
    file.write(struct.pack("<H", len(comment)) + comment)


def _checksum(file: IO[bytes], size: int) -> bytes:
    """SHA-256 of the first `size` bytes, in hexadecimal digits."""
    file.seek(0)
    digest = hashlib.sha256()
    while size > 0 and (part := file.read(min(_CHUNK, size))):
        digest.update(part)
        size -= len(part)
    return digest.hexdigest().encode()


def load_verified(path: Path | IO[bytes], name: str | None = None) -> Any:
    """Read a file of weights; whole bytes are checked first, and no pickled code is executed.

    A file with our checksum is read only if that fits. Others (the public baseline's) are read if
    every record's CRC fits.

    Raises:
        CheckpointError: damaged, truncated, not a zip, or more than tensors and values.
    """
    label = name or str(path)
    try:
        if isinstance(path, Path):
            with path.open("rb") as file:
                _check_bytes(file, label)
        else:
            _check_bytes(path, label)
            path.seek(0)
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"Checkpoint {label} holds more than tensors and plain values and was not loaded: "
            "save it again with torch.save of a state_dict."
        ) from error
    except CheckpointError:
        raise
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise CheckpointError(f"Checkpoint {label} cannot be read: {reason}.") from error


def _check_bytes(file: IO[bytes], label: str) -> None:
    size = file.seek(0, io.SEEK_END)
    file.seek(max(size - _COMMENT_BYTES, 0))
    tail = file.read()
    comment = _COMMENT.fullmatch(tail)
    if comment is None:
        file.seek(max(size - _END.size, 0))
        end = file.read()
        if len(end) < _END.size or end[:4] != b"PK\5\6" or end[-2:] != b"\0\0":
            raise CheckpointError(f"Checkpoint {label} is damaged: its last bytes are not a zip's.")
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"Checkpoint {label} is damaged: record {damaged} fails its CRC.")
        return
    found = _checksum(file, size - _COMMENT_BYTES - 2)
    if found != comment[1] or file.read(2) != struct.pack("<H", _COMMENT_BYTES):
        raise CheckpointError(f"Checkpoint {label} is damaged: it fails its checksum.")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around writes to `path`; its folder is made.

    Raises:
        CheckpointError: the volume is full, read-only or gone.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise CheckpointError(explain_write_error(path, error)) from error


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
