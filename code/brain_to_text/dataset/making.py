"""A dataset while a command makes it: unfinished until its last file, each signed by its maker.

From the first moment until the manifest is written, another document stands in its stead: it says
that the dataset is unfinished, which files are to come and which command makes them. A whole
dataset, of which the same command may skip everything, keeps its manifest. Every file says in its
attribute `made_by` what made it from what, and in `file_crc32` whether it is still as it was
written. So a repeated command knows what is done, and leaves alone what others wrote.
"""

from __future__ import annotations

import io
import json
import re
import uuid
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import h5py

from ..errors import DataError
from ..storage.locations import DATA_FILE, MANIFEST_NAME, data_files, is_s3
from ..storage.ownership import check_apart
from ..storage.store import ObjectStore
from .hdf5_reader import FileInspection, inspect_file
from .indexing import manifest_from_inspections
from .manifest import TrialManifest, Unfinished, UnfinishedError, write_manifest

_NO_SUM = b"crc32:00000000"  # in place of the checksum while it is computed
_SUM = re.compile(rb"crc32:[0-9a-f]{8}")
_OTHERWISE = "give an empty target, or say --overwrite"


@dataclass(frozen=True)
class Origin:
    """What made a file, as its attribute `made_by` says.

    command: e.g. "prepare_dataset.py encode". options: what decides the content, as plain types.
    source_crc32: of the whole source file, None if there is none.
    not_copied, damaged: a line for each thing of the source that is not in the file.
    """

    command: str
    options: Mapping[str, Any]
    source_crc32: int | None = None
    not_copied: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


def signed(data: bytes, origin: Origin) -> bytes:
    """The bytes of an HDF5 file with its origin and a checksum over all of it as attributes."""
    buffer = io.BytesIO(data)
    with h5py.File(buffer, "r+") as file:
        file.attrs["made_by"] = json.dumps(asdict(origin), sort_keys=True)
        file.attrs["file_crc32"] = _NO_SUM.decode()
    blank = buffer.getvalue()
    return blank.replace(_NO_SUM, b"crc32:%08x" % zlib.crc32(blank))


def origin_of(data: bytes) -> Origin | None:
    """What made a file; None if no command of ours did, or if a byte of it changed since."""
    for found in _SUM.finditer(data):
        blank = data.replace(found[0], _NO_SUM)
        if found[0] == b"crc32:%08x" % zlib.crc32(blank):
            with h5py.File(io.BytesIO(data), "r") as file:
                return Origin(**json.loads(file.attrs["made_by"]))
    return None


class DatasetInMaking:
    """A target that one command writes: `check` before each file, and end with `finish`.

    done: files that an earlier run of the same command wrote, by key.

    Args:
        command: as in `Origin`. typed: the whole command, to be repeated.
        options: what decides the content of the files, as plain types.
        keys: every data file that will be written.
        reads: folders or URLs that the command reads.
        overwrite: replace files of these names, whoever wrote them.

    Raises:
        DataError: the target is read, too; files of these names were written by others or changed
            since; there are other data files.
        StorageError: it cannot be read or written.
    """

    def __init__(
        self,
        store: ObjectStore,
        command: str,
        typed: str,
        options: Mapping[str, Any],
        keys: Iterable[str],
        *,
        reads: Iterable[str | Path] = (),
        overwrite: bool = False,
    ) -> None:
        self.store = store
        self.done: dict[str, tuple[Origin, FileInspection]] = {}
        self._mark = Unfinished(
            command, typed, json.loads(json.dumps(options)), sorted(keys), uuid.uuid4().hex
        )
        for source in reads:
            check_apart(source, store.url)
            if not is_s3(store.url):
                for folder in {str(Path(store.url, key).parent) for key in self._mark.files}:
                    check_apart(source, folder)
        self._manifest = self._look(overwrite)
        if overwrite or self._manifest is None or len(self.done) < len(self._mark.files):
            self._manifest = self._mark.to_bytes()
            store.write(MANIFEST_NAME, self._manifest)

    def check(self) -> None:
        """Check that no other run has begun to write here since.

        Raises:
            DataError: one has. StorageError: the target cannot be read.
        """
        if self.store.read(MANIFEST_NAME) != self._manifest:
            raise DataError(
                f"Another command has begun to write to {self.store.url}: let it end, then "
                "repeat this one."
            )

    def finish(self, inspections: Iterable[FileInspection]) -> TrialManifest:
        """Write the manifest: the dataset is whole.

        Raises:
            DataError, StorageError: as `check`.
        """
        self.check()
        files = data_files(self.store.list(), self.store.url)
        in_order = sorted(inspections, key=lambda inspection: inspection.key)
        manifest = manifest_from_inspections(files, in_order)
        write_manifest(self.store, manifest)
        return manifest

    def _look(self, overwrite: bool) -> bytes | None:
        """Refuse what others made; find what is done. Returns the manifest of a whole dataset."""
        url, mark, listing = self.store.url, self._mark, self.store.list()
        for key in listing:
            if DATA_FILE.fullmatch(key) and key not in mark.files:
                raise DataError(
                    f"{url} already holds {key}, which '{mark.command}' would not write now: give "
                    "an empty target, or remove what is there."
                )
        manifest = self.store.read(MANIFEST_NAME) if MANIFEST_NAME in listing else None
        try:
            if manifest is not None:
                TrialManifest.from_bytes(manifest, url)
        except UnfinishedError as earlier:
            manifest = None
            if not overwrite:
                self._refuse_another(earlier.unfinished.command, earlier.unfinished.options)
        except DataError:
            manifest = None
        for key in (key for key in mark.files if key in listing):
            data = self.store.read(key, 0, listing[key].size)
            origin = origin_of(data)
            if not overwrite:
                if origin is None:
                    raise DataError(
                        f"{url} already holds {key}, which '{mark.command}' did not write, or which"
                        f" was changed since: {_OTHERWISE}."
                    )
                self._refuse_another(origin.command, origin.options)
            if origin and (origin.command, origin.options) == (mark.command, mark.options):
                self.done[key] = origin, inspect_file(key, data)
        return manifest

    def _refuse_another(self, command: str, options: Mapping[str, Any]) -> None:
        if command != self._mark.command:
            raise DataError(f"{self.store.url} was written by '{command}': {_OTHERWISE}.")
        changed = [
            f"{name} was {options.get(name)}"
            for name, value in self._mark.options.items()
            if options.get(name) != value
        ]
        if changed:
            raise DataError(
                f"{self.store.url} was begun with other options ({', '.join(changed)}): repeat "
                f"them, {_OTHERWISE}."
            )
