"""Where commands may write: never where data is read, never over what others wrote.

A command replaces only what it wrote itself, for the same purpose, and that nobody edited since.
`check_apart` is for whoever reads and writes datasets, `replace_own` for a file that a person
named, `claim_folder` for a run's folders. How a dataset's files say who made them is in
dataset/making.py.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ..errors import DataError, InUseError, StorageError
from .locations import is_s3, split_s3_url
from .store import open_store


def check_apart(source: str | Path, target: str | Path) -> None:
    """Check that writing to `target` touches nothing of `source`, however the two are spelt.

    Links are followed; on volumes that ignore case the file system says what is the same.

    Raises:
        DataError: they are the same place, or one lies in the other.
    """
    source, target = str(source), str(target)
    if is_s3(source) != is_s3(target):
        return
    if is_s3(source):
        one, other = [PurePosixPath(*split_s3_url(url)) for url in (source, target)]
        within, around = other.is_relative_to(one), one.is_relative_to(other)
    else:
        within, around = _within(target, source), _within(source, target)
    if within and around:
        also = f" (also spelt {target})" if target != source else ""
        raise DataError(f"Source and target are both {source}{also}: give another target.")
    if within or around:
        inner, outer = (target, source) if within else (source, target)
        raise DataError(f"{inner} lies in {outer}: give a target beside the source.")


def check_own(path: Path, mark: bytes) -> None:
    """Check that a file that a person named may be written.

    Args:
        mark: stands in every file that this command writes there.

    Raises:
        DataError: a file without the mark is there, or a folder, or the name is that of data.
    """
    if path.suffix in (".hdf5", ".gz"):
        raise DataError(f"{path} has the name of data: give another name.")
    if path.is_dir():
        raise DataError(f"{path} is a folder: give the name of a file.")
    with contextlib.suppress(OSError):
        if mark not in path.read_bytes():
            raise DataError(
                f"{path} is there and is something else: remove it, or give another name."
            )


def replace_own(path: Path, data: bytes, mark: bytes) -> None:
    """Write a file that a person named, unless that would replace something else.

    Raises:
        DataError: as `check_own`. StorageError: writing is not possible.
    """
    check_own(path, mark)
    open_store(path.parent).write(path.name, data)


def claim_folder(record: Path, folder: Path, patterns: Iterable[str], option: str) -> None:
    """Let a run write into `folder`: the first time, only where nothing of another run lies.

    Args:
        record: a file that keeps which folders this run has claimed.
        patterns: what the run will write there, or replace.
        option: that gives the run another folder.

    Raises:
        InUseError: a file of such a name is there, and the run has not claimed the folder before.
        StorageError: the record cannot be read or written.
    """
    path = os.path.realpath(folder)
    try:
        claimed = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
        if path in claimed:
            return
        found = (file for pattern in patterns for file in sorted(Path(path).glob(pattern)))
        if (file := next((file for file in found if file.stat().st_size), None)) is not None:
            raise InUseError(
                f"{folder} holds {file.relative_to(path)} of another run, which this run would "
                f"replace: give this run its own {option}, or move that away. (If this run's "
                "folders were moved, moving that away lets it resume and write them anew.)"
            )
        draft = record.with_name(f"{record.name}.tmp")
        draft.write_text("\n".join([*claimed, path]), encoding="utf-8")
        draft.replace(record)
    except OSError as error:
        raise StorageError(
            f"{record} cannot be written ({error.strerror}): give a writable folder."
        ) from error


def _within(inner: str, outer: str) -> bool:
    """Whether folder `inner`, which need not exist yet, is `outer` or lies in it."""
    real, place = Path(os.path.realpath(outer)), Path(os.path.realpath(inner))
    return any(_same(folder, real) for folder in (place, *place.parents))


def _same(one: Path, other: Path) -> bool:
    try:
        return one == other or one.samefile(other)
    except OSError:
        return False
