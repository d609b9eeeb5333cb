"""Places that commands write: never where data is read, never over what others wrote.

What a command wrote is kept beside it in one small object (`RECORD_NAME`): the command, what it was
asked for, the names. The same command may go on there; anything else is refused by name.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DataError, InUseError, StorageError
from .locations import DATA_FILE, is_s3, split_s3_url
from .store import ObjectStore, gunzipped, open_store

RECORD_NAME = "written_by.json.gz"


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
                f"replace: give this run its own {option}, or move that away."
            )
        draft = record.with_name(f"{record.name}.tmp")
        draft.write_text("\n".join([*claimed, path]), encoding="utf-8")
        draft.replace(record)
    except OSError as error:
        raise StorageError(
            f"{record} cannot be written ({error.strerror}): give a writable folder."
        ) from error


class Target:
    """A place being written by one command for one purpose; close it, or use it in a `with`.

    notes: whatever the command wants to find there when it is repeated.

    Args:
        command: as typed, e.g. "prepare_dataset.py encode".
        purpose: what decides the content of the files, as plain types.
        keys: every object that will be written, beside the record and the manifest.
        reads: folders or URLs that the command reads.
        overwrite: replace objects of these names, whoever wrote them.

    Raises:
        DataError: it is read, too; another command, purpose or run has it; objects of these names
            are there and were written by others, or other data files.
        StorageError: it cannot be read.
    """

    def __init__(
        self,
        store: ObjectStore,
        command: str,
        purpose: Mapping[str, Any],
        keys: Iterable[str],
        *,
        reads: Iterable[str | Path] = (),
        overwrite: bool = False,
    ) -> None:
        self.store = store
        self.notes: dict[str, Any] = {}
        self._command, self._purpose = command, json.loads(json.dumps(purpose))
        self._run = uuid.uuid4().hex
        self._folder: int | None = None
        wanted = set(keys)
        for place in reads:
            check_apart(place, store.url)
            if not is_s3(store.url):
                for folder in {str(Path(store.url, key).parent) for key in wanted}:
                    check_apart(place, folder)
        self._lock()
        try:
            self._take(wanted, overwrite)
        except BaseException:
            self.close()
            raise

    def _take(self, wanted: set[str], overwrite: bool) -> None:
        url = self.store.url
        listing = self.store.list()
        strangers = [k for k in listing if DATA_FILE.fullmatch(k) and k not in wanted]
        if strangers:
            raise DataError(
                f"{url} already holds {strangers[0]}, which '{self._command}' would not write now: "
                "give an empty target, or remove what is there."
            )
        aloud = "give an empty target, or say --overwrite."
        record = self._read() if RECORD_NAME in listing else {}
        earlier = record.get("purpose", {})
        changed = [
            f"{name} was {earlier.get(name)}"
            for name in self._purpose
            if record and earlier.get(name) != self._purpose.get(name)
        ]
        own = set(record.get("keys", ()))
        foreign = sorted((wanted - own) & listing.keys())
        another = record.get("command", self._command) != self._command
        if not overwrite:
            if another:
                raise DataError(f"{url} was written by '{record['command']}': {aloud}")
            if changed:
                raise DataError(
                    f"{url} was begun with other options ({', '.join(changed)}): repeat them, "
                    f"{aloud}"
                )
            if foreign:
                more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
                raise DataError(
                    f"{url} already holds {foreign[0]}{more}, which '{self._command}' did not "
                    f"write: {aloud}"
                )
        if record and not overwrite:
            self.notes = record["notes"]
        self._keys = wanted | own & listing.keys()
        self._write()

    def save(self) -> None:
        """Keep `notes`, after checking that no other run has taken this place since.

        Raises:
            DataError: one has. StorageError: it cannot be read or written.
        """
        if self._folder is None and self._read()["run"] != self._run:
            raise DataError(
                f"Another '{self._command}' has begun to write to {self.store.url}: let it end, "
                "then repeat this one."
            )
        self._write()

    def close(self) -> None:
        """Let others write there."""
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        """In a folder the system keeps the lock, and lets go when the process ends."""
        if is_s3(self.store.url):
            return
        try:
            Path(self.store.url).mkdir(parents=True, exist_ok=True)
            self._folder = os.open(self.store.url, os.O_RDONLY)
        except OSError as error:
            raise StorageError(
                f"Cannot write to {self.store.url} ({error.strerror}): give a folder that you may "
                "write to."
            ) from error
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise DataError(
                f"Another command is writing to {self.store.url}: let it end, then repeat this one."
            ) from error
        except OSError:  # a file system without locks: the record tells, as on S3
            self.close()

    def _read(self) -> dict[str, Any]:
        name = f"{self.store.url}/{RECORD_NAME}"
        again = "remove it, then repeat this command with --overwrite"
        try:
            record = json.loads(gunzipped(self.store.read(RECORD_NAME), name, again))
            record["command"], record["purpose"], record["keys"], record["run"], record["notes"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{name} is damaged: {again}.") from error
        return record

    def _write(self) -> None:
        record = {
            "command": self._command,
            "purpose": self._purpose,
            "run": self._run,
            "keys": sorted(self._keys),
            "notes": self.notes,
        }
        self.store.write(RECORD_NAME, gzip.compress(json.dumps(record).encode(), mtime=0))


def _within(inner: str, outer: str) -> bool:
    """Whether folder `inner`, which need not exist yet, is `outer` or lies in it."""
    real, place = Path(os.path.realpath(outer)), Path(os.path.realpath(inner))
    return any(_same(folder, real) for folder in (place, *place.parents))


def _same(one: Path, other: Path) -> bool:
    try:
        return one == other or one.samefile(other)
    except OSError:
        return False
