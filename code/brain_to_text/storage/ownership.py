"""The rule for writing: a command replaces only what it wrote itself, for the same purpose, and
that nobody edited since; and it never writes where it reads.

`refuse_others` holds the rule. How a command knows its files differs: a single file carries a mark,
a run keeps a list of the folders that it claimed, an evaluation has a checksum of each file. A
dataset's files carry their origin inside, on S3 as in a folder: dataset/making.py reads it there.
"""

from __future__ import annotations

import fcntl
import glob
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from ..errors import DataError, InUseError, StorageError
from .locations import is_s3, split_s3_url
from .store import open_store


def refuse_others(
    folder: Path,
    patterns: Iterable[str],
    is_ours: Callable[[Path], bool],
    whose: str,
    advice: str,
) -> None:
    """Check that a command may replace the files of these names in `folder`; empty ones it may.

    Args:
        patterns: glob patterns of what the command will write or remove.
        is_ours: whether the command wrote this file, for the same purpose, as it is now.
        whose: what to say of a file that is not ours.
        advice: what to do then.

    Raises:
        InUseError: a file is not ours. StorageError: a file cannot be read.
    """
    try:
        for file in (file for pattern in patterns for file in sorted(folder.glob(pattern))):
            if file.stat().st_size and not is_ours(file):
                raise InUseError(f"{folder} holds {file.relative_to(folder)}{whose}: {advice}.")
    except OSError as error:
        raise StorageError(
            f"{error.filename or folder} cannot be read ({error.strerror or error}): {advice}."
        ) from error


def check_file(path: Path, mark: bytes) -> None:
    """Check that a file that a person named may be written.

    Args:
        mark: stands in every file that this command writes there.

    Raises:
        DataError: the name is that of data, or of a folder. InUseError: a file without the mark.
    """
    if path.suffix in (".hdf5", ".gz"):
        raise DataError(f"{path} has the name of data: give another name.")
    if path.is_dir():
        raise DataError(f"{path} is a folder: give the name of a file.")
    refuse_others(
        path.parent,
        [glob.escape(path.name)],
        lambda file: mark in file.read_bytes(),
        ", which this command did not write",
        "move it away, or give another name",
    )


def replace_file(path: Path, data: bytes, mark: bytes) -> None:
    """Write a file that a person named, unless that would replace something else.

    Raises:
        DataError, InUseError: as `check_file`. StorageError: writing is not possible.
    """
    check_file(path, mark)
    open_store(path.parent).write(path.name, data)


def claim_folder(record: Path, folder: Path, patterns: Iterable[str], option: str) -> bool:
    """Let a run write into `folder`: the first time, only where nothing of another run lies.

    Args:
        record: a file that lists the folders that this run has claimed.
        patterns: what the run will write there, or replace.
        option: that gives the run another folder.

    Returns:
        Whether this is the first time.

    Raises:
        InUseError: a file of such a name is there, and the run has not claimed the folder before.
        StorageError: the record cannot be read or written.
    """
    claimed = _claimed(record)
    real = os.path.realpath(folder)
    if real in claimed:
        return False
    refuse_others(
        folder,
        patterns,
        lambda file: False,
        " of another run, which this run would replace",
        f"give this run its own {option}, or move that away (if this run's folders were "
        "moved, that lets it resume and write them anew)",
    )
    _write_claims(record, [*claimed, real])
    return True


def give_back_folder(record: Path, folder: Path) -> None:
    """Let another run have a folder that this one left as it was; on a full volume, not."""
    real = os.path.realpath(folder)
    with suppress(StorageError):
        _write_claims(record, [other for other in _claimed(record) if other != real])


def _claimed(record: Path) -> list[str]:
    try:
        return record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    except OSError as error:
        raise _unusable(record, error) from error


def _write_claims(record: Path, folders: Iterable[str]) -> None:
    draft = record.with_name(f"{record.name}.tmp")
    try:
        draft.write_text("\n".join(folders), encoding="utf-8")
        draft.replace(record)
    except OSError as error:
        raise _unusable(record, error) from error


def _unusable(record: Path, error: OSError) -> StorageError:
    return StorageError(f"{record} cannot be written ({error.strerror}): give a writable folder.")


def lock(opened: int, refusal: str) -> str:
    """Hold an open file or folder for this process, until it is closed or the process ends.

    Args:
        opened: its descriptor.
        refusal: the sentence for whoever comes second.

    Returns:
        "", or why the file system has no locks: nothing then keeps two commands apart.

    Raises:
        InUseError: another live process holds it.
    """
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InUseError(refusal) from None
    except OSError as error:
        return str(error.strerror or error)
    return ""


def check_apart(source: str | Path, target: str | Path) -> None:
    """Check that writing to `target` touches nothing of `source`, however the two are spelt.

    Raises:
        DataError: they are the same folder or prefix, or one lies in the other.
    """
    source, target = str(source), str(target)
    within, around = lies_in(target, source), lies_in(source, target)
    if within and around:
        also = f" (also spelt {target})" if target != source else ""
        raise DataError(f"Source and target are both {source}{also}: give another target.")
    if within or around:
        inner, outer = (target, source) if within else (source, target)
        raise DataError(f"{inner} lies in {outer}: give a target beside the source.")


def lies_in(inner: str, outer: str) -> bool:
    """Whether a folder or prefix, which need not exist yet, is `outer` or lies in it.

    Links are followed; on volumes that ignore case the file system says what is the same.
    """
    if is_s3(inner) != is_s3(outer):
        return False
    if is_s3(inner):
        one, other = (PurePosixPath(*split_s3_url(url)) for url in (inner, outer))
        return one.is_relative_to(other)
    real, path = Path(os.path.realpath(outer)), Path(os.path.realpath(inner))
    return any(_same(folder, real) for folder in (path, *path.parents))


def _same(one: Path, other: Path) -> bool:
    try:
        return one == other or one.samefile(other)
    except OSError:
        return False
