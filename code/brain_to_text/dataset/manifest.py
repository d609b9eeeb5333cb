"""Where every trial of a dataset lies and what its labels are: one small object per dataset.

A training job reads this manifest with one request and each trial with one ranged GET, instead of
walking through HDF5 headers over the network.
"""

from __future__ import annotations

import gzip
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import DataError, Finding
from ..storage.locations import DATA_FILE, MANIFEST_NAME, ObjectInfo, shortened
from ..storage.store import ObjectStore, gunzipped
from .file_content import FileContent, labels_crc32
from .trial_record import TrialRecord
from .trial_table import N_CLASSES, SPLITS, TrialTable

VERSION = 2
_READS = 3  # of a manifest that arrives damaged
_READS_AT_ONCE = 32
_UNKNOWN = FileContent()


@dataclass(frozen=True, eq=False)
class TrialManifest:
    """The trials of a dataset, ordered by session, split (train, val, test) and trial number.

    trials: given as any records, held as a table that makes a record when asked for one.
    n_features: columns of `input_features`. n_classes: 1681, or 41 in a phoneme set, or 0 if no
    trial has labels. label_form: "self_loop", "transition", "phoneme" or "unlabelled".
    files: as they were listed when they were indexed, or when their labels were last compared.
    damaged: what was left out when the index was made, none if it was made strictly.
    contents: what tells each file from others of its size.
    lost: warnings about trials and channels that look as no sound recording does.
    """

    trials: Sequence[TrialRecord]
    files: Mapping[str, ObjectInfo]
    n_features: int
    n_classes: int
    label_form: str
    damaged: tuple[Finding, ...] = ()
    contents: Mapping[str, FileContent] = field(default_factory=dict)
    lost: tuple[Finding, ...] = ()

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

    def check_fresh(self, listing: Mapping[str, ObjectInfo], url: str = "") -> list[str]:
        """Compare with what lies there now.

        Returns:
            Files of the right size whose ETag cannot be compared, as they were copied, uploaded or
            written since: whether they have the same labels is for `check_labels` to say.

        Raises:
            DataError: files have another size, or were added or removed since.
        """
        present = {key: info for key, info in listing.items() if DATA_FILE.fullmatch(key)}
        both = [key for key in self.files if key in present]
        changed = [key for key in both if self.files[key].size != present[key].size]
        removed = sorted(self.files.keys() - present.keys())
        added = sorted(present.keys() - self.files.keys())
        if changed or removed or added:
            raise _stale(url, changed=changed, removed=removed, added=added)
        known = {k: (self.files[k].etag, self.contents.get(k, _UNKNOWN).s3_etag) for k in both}
        return [k for k in both if not present[k].etag or present[k].etag not in known[k]]

    def check_labels(self, store: ObjectStore, keys: Iterable[str]) -> None:
        """Read everything but the features of these files and compare it with what was indexed.

        Raises:
            DataError: a file has other labels, or it cannot be known.
            StorageError: it cannot be read.
        """
        table, changed = self.table, []
        rows = {file.key: file.rows for file in table.files}
        with ThreadPoolExecutor(_READS_AT_ONCE) as threads:
            for key in keys:
                records = (table[row] for row in rows[key])
                content, size = self.contents.get(key, _UNKNOWN), self.files[key].size
                expected = content.labels_crc32
                if expected is None or expected != labels_crc32(store, key, size, records, threads):
                    changed.append(key)
        if changed:
            raise _stale(store.url, changed=changed)

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
                    **asdict(self.contents.get(file.key, _UNKNOWN)),
                    "trials": len(file.rows),
                }
                for file in self.table.files
            ],
            "trials": self.table.to_plain(),
            "damaged": [asdict(finding) for finding in self.damaged],
            "lost": [asdict(finding) for finding in self.lost],
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
            DataError: the bytes are damaged, no manifest, one of another version, or say that the
                dataset is unfinished.
        """
        name = f"{url}/{MANIFEST_NAME}" if url else MANIFEST_NAME
        again = (
            f"make it again with 'python code/prepare_dataset.py index {url or 'FOLDER-OR-S3-URL'}'"
        )
        text = gunzipped(data, name, again)
        try:
            document = json.loads(text)
            version = document["version"]
            if version == VERSION and "unfinished" not in document:
                return _from_document(document)
        except (DataError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(f"{name} is no trial manifest ({error!r}): {again}.") from error
        refuse_unfinished(data, url)
        raise DataError(f"{name} has version {version!r}, not {VERSION}: {again}.")


@dataclass(frozen=True)
class Unfinished:
    """What stands in a manifest's stead while a command makes the dataset.

    command: e.g. "prepare_dataset.py encode". typed: all of it, to be repeated.
    options: what decides the files' content. files: keys of all that the dataset is to have.
    run: tells one run of the command from another.
    """

    command: str
    typed: str
    options: Mapping[str, Any]
    files: list[str]
    run: str

    def to_bytes(self) -> bytes:
        document = {"version": VERSION, "unfinished": asdict(self)}
        return gzip.compress(json.dumps(document).encode(), mtime=0)

    @staticmethod
    def of(data: bytes) -> Unfinished | None:
        """The inverse of `to_bytes`; None for anything else, like a manifest."""
        try:
            document = json.loads(gunzipped(data, MANIFEST_NAME, "make it again"))
            return Unfinished(**document["unfinished"])
        except (DataError, ValueError, LookupError, TypeError):
            return None


def refuse_unfinished(data: bytes, url: str) -> None:
    """Raise a DataError if these bytes of a manifest say that its dataset is unfinished."""
    unfinished = Unfinished.of(data)
    if unfinished is not None:
        raise DataError(
            f"{url or 'The dataset'} is unfinished: '{unfinished.command}' has not ended, which was"
            f" to write {len(unfinished.files)} files ({shortened(unfinished.files)}). Repeat "
            f"'{unfinished.typed}', which skips what is done; if this is a copy, copy it again "
            "then."
        )


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
        tuple(Finding(**finding) for finding in document["damaged"]),
        {e["key"]: FileContent(e["labels_crc32"], e["s3_etag"]) for e in entries},
        tuple(Finding(**finding) for finding in document["lost"]),
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
            return TrialManifest.from_bytes(store.read(MANIFEST_NAME, 0, size), store.url)
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


def _stale(url: str, **files: Sequence[str]) -> DataError:
    """An error that names files as changed, removed or added."""
    parts = ", ".join(f"{len(k)} {word} ({shortened(k)})" for word, k in files.items() if k)
    restore = "copy the removed files again, or " if files.get("removed") else ""
    place = shlex.quote(url) if url else "FOLDER-OR-S3-URL"
    return DataError(
        f"The trial manifest{f' of {url}' if url else ''} no longer fits the data files: {parts}; "
        f"{restore}re-index with 'python code/prepare_dataset.py index {place}'."
    )
