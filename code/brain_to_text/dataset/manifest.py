"""Where every trial of a dataset lies and what its labels are: one small object per dataset.

A training job reads this manifest with one request and each trial with one ranged GET, instead of
walking through HDF5 headers over the network.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError, Finding
from ..storage.locations import DATA_FILE, MANIFEST_NAME, ObjectInfo, shortened
from ..storage.store import ObjectStore, gunzipped
from .trial_record import TrialRecord
from .trial_table import N_CLASSES, SPLITS, TrialTable

VERSION = 2
_READS = 3  # of a manifest that arrives damaged


@dataclass(frozen=True, eq=False)
class TrialManifest:
    """The trials of a dataset, ordered by session, split (train, val, test) and trial number.

    trials: given as any records, held as a table that makes a record when asked for one.
    n_features: columns of `input_features`. n_classes: 1681, or 41 in a phoneme set, or 0 if no
    trial has labels. label_form: "self_loop", "transition", "phoneme" or "unlabelled".
    damaged: what was left out when the index was made, none if it was made strictly.
    """

    trials: Sequence[TrialRecord]
    files: Mapping[str, ObjectInfo]
    n_features: int
    n_classes: int
    label_form: str
    damaged: tuple[Finding, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.trials, TrialTable):
            table = TrialTable.of(self.trials, self.files, self.n_features, self.label_form)
            object.__setattr__(self, "trials", table)

    @property
    def table(self) -> TrialTable:
        """`trials`, for whoever wants a number of all of them at once."""
        assert isinstance(self.trials, TrialTable)
        return self.trials

    @property
    def sessions(self) -> list[str]:
        """Every session with at least one trial, sorted (which for t15.YYYY.MM.DD is by date)."""
        return sorted({file.session for file in self.table.files if file.rows})

    def select(self, split: str, sessions: Iterable[str] | None = None) -> list[int]:
        """Indices into `trials` of one split, of the given sessions (default: all), in order."""
        chosen = None if sessions is None else set(sessions)
        return [
            row
            for file in self.table.files
            if file.split == split and (chosen is None or file.session in chosen)
            for row in file.rows
        ]

    def summary(self, url: str) -> str:
        """One line about what is there."""
        counts = dict.fromkeys(SPLITS, 0)
        for file in self.table.files:
            counts[file.split] += len(file.rows)
        trials = ", ".join(f"{n:,} {split}" for split, n in counts.items() if n)
        size = sum(record.size for record in self.files.values())
        return (
            f"{url}: {len(self.sessions)} sessions, {len(self.trials):,} trials ({trials}), "
            f"{self.n_features} features, {self.n_classes} classes, {self.label_form} labels, "
            f"{size / 1e6:,.1f} MB, fingerprint {self.fingerprint()}"
        )

    def fingerprint(self) -> str:
        """32 hex digits over every trial's name, features and labels: equal data, equal digits.

        Independent of where the dataset lies and of when it was written.
        """
        return self.table.fingerprint()

    def check_fresh(self, listing: Mapping[str, ObjectInfo], url: str = "") -> None:
        """Compare with what lies there now.

        ETags of different kinds (a folder's and S3's, after an upload) cannot be compared; then
        the size decides, and the CRC-32 of each trial when it is read.

        Raises:
            DataError: files were changed, added or removed since; names them and the command.
        """
        present = {key: info for key, info in listing.items() if DATA_FILE.fullmatch(key)}
        changed = [
            key
            for key, record in self.files.items()
            if key in present and not _same_file(record, present[key])
        ]
        removed = sorted(self.files.keys() - present.keys())
        added = sorted(present.keys() - self.files.keys())
        parts = [
            f"{len(keys)} {word} ({shortened(keys)})"
            for word, keys in (("changed", changed), ("removed", removed), ("added", added))
            if keys
        ]
        if parts:
            where = url or "FOLDER-OR-S3-URL"
            raise DataError(
                f"The trial manifest{f' of {url}' if url else ''} no longer fits the data files: "
                f"{', '.join(parts)}; re-index with 'python code/prepare_dataset.py index {where}'."
            )

    def to_bytes(self) -> bytes:
        """The manifest as gzipped JSON; equal manifests give equal bytes."""
        document = {
            "version": VERSION,
            "n_features": self.n_features,
            "label_form": self.label_form,
            "files": [
                {
                    "key": file.key,
                    "size": self.files[file.key].size,
                    "etag": self.files[file.key].etag,
                    "trials": len(file.rows),
                }
                for file in self.table.files
            ],
            "trials": self.table.to_plain(),
            "damaged": [[f.key, f.trial, f.reason, f.kind] for f in self.damaged],
        }
        text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
        return gzip.compress(text.encode(), compresslevel=6, mtime=0)

    @staticmethod
    def from_bytes(data: bytes, url: str = "") -> TrialManifest:
        """The inverse of `to_bytes`.

        gzip's CRC-32 and length decide before anything is parsed.

        Args:
            url: of its dataset, for messages.

        Raises:
            DataError: the bytes are damaged, no manifest, or one of another version.
        """
        name = f"{url}/{MANIFEST_NAME}" if url else MANIFEST_NAME
        again = (
            f"make it again with 'python code/prepare_dataset.py index {url or 'FOLDER-OR-S3-URL'}'"
        )
        text = gunzipped(data, name, again)
        try:
            document = json.loads(text)
            version = document["version"]
            if version == VERSION:
                return _from_document(document)
        except (DataError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(f"{name} is no trial manifest ({error!r}): {again}.") from error
        raise DataError(f"{name} has version {version!r}, not {VERSION}: {again}.")


def _from_document(document: dict[str, Any]) -> TrialManifest:
    """Raises whatever a document of another structure leads to."""
    n_features, form, entries = document["n_features"], document["label_form"], document["files"]
    counts = {entry["key"]: entry["trials"] for entry in entries}
    return TrialManifest(
        TrialTable.from_plain(document["trials"], counts, n_features, form),
        {entry["key"]: ObjectInfo(entry["key"], entry["size"], entry["etag"]) for entry in entries},
        n_features,
        N_CLASSES[form],
        form,
        tuple(Finding(*finding) for finding in document["damaged"]),
    )


def load_manifest(
    store: ObjectStore, listing: Mapping[str, ObjectInfo] | None = None
) -> TrialManifest | None:
    """The manifest kept with a dataset, None if there is none. Read again where it comes damaged.

    Args:
        listing: the store's, if known already.

    Raises:
        StorageError: it cannot be read. DataError: it is damaged.
    """
    listing = store.list() if listing is None else listing
    if MANIFEST_NAME not in listing:
        return None
    size: int | None = listing[MANIFEST_NAME].size
    for attempts_left in reversed(range(_READS)):
        try:
            return TrialManifest.from_bytes(store.read(MANIFEST_NAME, size), store.url)
        except DataError:
            if not attempts_left:
                raise
        size = None  # it may have been replaced since it was listed
    raise AssertionError


def write_manifest(store: ObjectStore, manifest: TrialManifest) -> None:
    """Keep the manifest with its dataset.

    Raises:
        StorageError: writing there is not possible.
    """
    store.write(MANIFEST_NAME, manifest.to_bytes())


def _same_file(one: ObjectInfo, other: ObjectInfo) -> bool:
    if one.size != other.size:
        return False
    in_a_folder = [info.etag.startswith("crc32:") for info in (one, other)]
    return one.etag == other.etag or in_a_folder[0] != in_a_folder[1]
