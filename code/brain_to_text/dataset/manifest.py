"""Where every trial of a dataset lies and what its labels are: one small object per dataset.

A training job reads this manifest with one request and each trial with one ranged GET, instead of
walking through HDF5 headers over the network. It is gzipped text: a line of JSON about the dataset
and its files, then one per trial.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import DataError, Finding
from ..storage.locations import (
    DATA_FILE,
    MANIFEST_NAME,
    ObjectInfo,
    dataset_command,
    shortened,
)
from ..storage.store import ObjectStore, gunzipped
from .file_content import FileContent, labels_crc32
from .trial_table import SPLITS, TrialTable

VERSION = 3
_READS = 3  # of a manifest that arrives damaged
_READS_AT_ONCE = 32


@dataclass(frozen=True)
class IndexedFile(ObjectInfo):
    """A data file as it was listed when it was indexed, or when its labels were last compared.

    content: what tells it from others of its size.
    """

    content: FileContent = field(default_factory=FileContent)


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
        return _gzipped({"version": VERSION, "unfinished": asdict(self)})


class UnfinishedError(DataError):
    """A dataset that is not whole yet."""

    def __init__(self, url: str, unfinished: Unfinished) -> None:
        super().__init__(url, unfinished)
        self.unfinished = unfinished

    def __str__(self) -> str:
        url, made = self.args
        return (
            f"{url} is unfinished: '{made.command}' has not ended, which was to write "
            f"{len(made.files)} files ({shortened(made.files)}). Repeat '{made.typed}', which "
            "skips what is done; if this is a copy, copy it again then."
        )


@dataclass(frozen=True, eq=False)
class TrialManifest:
    """The trials of a dataset, ordered by session, split (train, val, test) and trial number.

    files: by key.
    damaged: what was left out when the index was made, none if it was made strictly.
    lost: warnings about trials and channels that look as no sound recording does.
    """

    trials: TrialTable
    files: Mapping[str, IndexedFile]
    damaged: tuple[Finding, ...] = ()
    lost: tuple[Finding, ...] = ()

    @property
    def n_features(self) -> int:
        """Columns of `input_features`."""
        return self.trials.n_features

    @property
    def label_form(self) -> str:
        """ "self_loop", "transition", "phoneme" or "unlabelled"."""
        return self.trials.label_form

    @property
    def n_classes(self) -> int:
        """1681, or 41 in a phoneme set, or 0 if no trial has labels."""
        return self.trials.n_classes

    @property
    def sessions(self) -> list[str]:
        """Every session with at least one trial, sorted (which for t15.YYYY.MM.DD is by date)."""
        return sorted({file.session for file in self.trials.files if file.rows})

    def select(self, split: str, sessions: Iterable[str] | None = None) -> list[int]:
        """Indices into `trials` of one split, of the given sessions (default: all), in order."""
        chosen = None if sessions is None else set(sessions)
        return [
            row
            for file in self.trials.files
            if file.split == split and (chosen is None or file.session in chosen)
            for row in file.rows
        ]

    def summary(self, url: str) -> str:
        """One line about what is there."""
        counts = {split: len(self.select(split)) for split in SPLITS}
        trials = ", ".join(f"{n:,} {split}" for split, n in counts.items() if n)
        size = sum(info.size for info in self.files.values())
        return (
            f"{url}: {len(self.sessions)} sessions, {len(self.trials):,} trials ({trials}), "
            f"{self.n_features} features, {self.n_classes} classes, {self.label_form} labels, "
            f"{size / 1e6:,.1f} MB, fingerprint {self.fingerprint()}"
        )

    def fingerprint(self) -> str:
        """32 hex digits over every trial's name, features and labels: equal data, equal digits.

        Independent of where the dataset lies and of when it was written.
        """
        return self.trials.fingerprint

    def check_fresh(self, listing: Mapping[str, ObjectInfo], url: str) -> list[str]:
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
        known = {key: (self.files[key].etag, self.files[key].content.s3_etag) for key in both}
        return [k for k in both if not present[k].etag or present[k].etag not in known[k]]

    def check_labels(self, store: ObjectStore, keys: Iterable[str]) -> None:
        """Read everything but the features of these files and compare it with what was indexed.

        Raises:
            DataError: a file has other labels, or it cannot be known.
            StorageError: it cannot be read.
        """
        changed = []
        rows = {file.key: file.rows for file in self.trials.files}
        with ThreadPoolExecutor(_READS_AT_ONCE) as threads:
            for key in keys:
                records = (self.trials[row] for row in rows[key])
                size, expected = self.files[key].size, self.files[key].content.labels_crc32
                if expected is None or expected != labels_crc32(store, key, size, records, threads):
                    changed.append(key)
        if changed:
            raise _stale(store.url, changed=changed)

    def to_bytes(self) -> bytes:
        """The manifest as gzipped lines of JSON; equal manifests give equal bytes."""
        document = {
            "version": VERSION,
            "n_features": self.n_features,
            "label_form": self.label_form,
            "files": [
                asdict(self.files[file.key]) | {"trials": len(file.rows)}
                for file in self.trials.files
            ],
            "damaged": [asdict(finding) for finding in self.damaged],
            "lost": [asdict(finding) for finding in self.lost],
        }
        return _gzipped(document, self.trials.lines)

    @staticmethod
    def from_bytes(data: bytes, url: str) -> TrialManifest:
        """The inverse of `to_bytes`; gzip's CRC-32 and length decide before anything is parsed.

        Args:
            url: of its dataset, for messages.

        Raises:
            UnfinishedError: the bytes are those of `Unfinished`.
            DataError: they are damaged, no manifest, or one of another version.
        """
        name, again = (
            f"{url}/{MANIFEST_NAME}",
            f"make it again with {dataset_command('index', url)}",
        )
        first, _, lines = gunzipped(data, name, again).partition(b"\n")
        try:
            document = json.loads(first)
            if "unfinished" in document:
                raise UnfinishedError(url, Unfinished(**document["unfinished"]))
            return _from_document(document, lines)
        except UnfinishedError:
            raise
        except (DataError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(
                f"{name} is no manifest of version {VERSION} ({error!r}): {again}."
            ) from error


def load_manifest(
    store: ObjectStore, listing: Mapping[str, ObjectInfo] | None = None
) -> TrialManifest | None:
    """The manifest stored with a dataset, None if there is none. Read again where it comes damaged.

    Args:
        listing: the store's, if known already.

    Raises:
        StorageError: it cannot be read. DataError: see `TrialManifest.from_bytes`.
    """
    listing = store.list() if listing is None else listing
    if MANIFEST_NAME not in listing:
        return None
    size: int | None = listing[MANIFEST_NAME].size
    for _ in range(_READS - 1):
        try:
            return TrialManifest.from_bytes(store.read(MANIFEST_NAME, 0, size), store.url)
        except DataError:
            size = None  # it may have been replaced since it was listed
    return TrialManifest.from_bytes(store.read(MANIFEST_NAME), store.url)


def earlier_manifest(store: ObjectStore, listing: Mapping[str, ObjectInfo]) -> TrialManifest | None:
    """As `load_manifest`, for who reads the whole dataset anew: None too if it is damaged.

    Raises:
        StorageError: it cannot be read. UnfinishedError: the dataset is unfinished.
    """
    try:
        return load_manifest(store, listing)
    except UnfinishedError:
        raise
    except DataError:
        return None


def write_manifest(store: ObjectStore, manifest: TrialManifest) -> None:
    """Store the manifest with its dataset.

    Raises:
        StorageError: writing there is not possible.
    """
    store.write(MANIFEST_NAME, manifest.to_bytes())


def _gzipped(document: Mapping[str, Any], lines: bytes = b"") -> bytes:
    first = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    return gzip.compress(b"%b\n%b" % (first, lines), compresslevel=6, mtime=0)


def _from_document(document: dict[str, Any], lines: bytes) -> TrialManifest:
    """Raises whatever a document of another version or structure leads to."""
    if document["version"] != VERSION:
        raise ValueError(f"its version is {document['version']}")
    counts = {entry["key"]: entry.pop("trials") for entry in document["files"]}
    files = [
        IndexedFile(**entry | {"content": FileContent(**entry["content"])})
        for entry in document["files"]
    ]
    return TrialManifest(
        TrialTable(document["n_features"], document["label_form"], counts, lines),
        {file.key: file for file in files},
        tuple(Finding(**finding) for finding in document["damaged"]),
        tuple(Finding(**finding) for finding in document["lost"]),
    )


def _stale(url: str, **files: Sequence[str]) -> DataError:
    """An error that names files as changed, removed or added."""
    parts = ", ".join(f"{len(k)} {word} ({shortened(k)})" for word, k in files.items() if k)
    restore = "copy the removed files again, or " if files.get("removed") else ""
    return DataError(
        f"The trial manifest of {url} no longer fits the data files: {parts}; "
        f"{restore}re-index with {dataset_command('index', url)}."
    )
