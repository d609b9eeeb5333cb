"""Where every trial of a dataset lies and what its labels are: one small object per dataset.

A training job reads this manifest with one request and each trial with one ranged GET, instead of
walking through HDF5 headers over the network.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import DataError, StorageError
from ..labels.diphones import N_DIPHONES, encode_diphones
from ..labels.phonemes import N_PHONEMES
from .hdf5_reader import DATA_FILE, FileInspection, inspect_file
from .locations import S3_ETAG
from .store import ObjectInfo, ObjectStore, open_store
from .trial_record import ChunkLayout, Finding, TrialRecord
from .workers import Lost, in_workers, limited

__all__ = [
    "MANIFEST_NAME",
    "ChunkLayout",
    "FileRecord",
    "Finding",
    "TrialManifest",
    "TrialRecord",
    "data_files",
    "index_dataset",
    "load_manifest",
    "load_or_build_manifest",
    "manifest_from_inspections",
    "write_manifest",
]

MANIFEST_NAME = "trial_manifest.json.gz"
VERSION = 1
SPLITS = ("train", "val", "test")
_SMALL_DATASET = 256 * 2**20  # below this, starting worker processes costs more than it saves
_MANIFEST_READS = 3
_PROGRESS_SECONDS = 10.0
_INDEXING_MEMORY = 6 * 2**30  # bytes of data files held at once, over all worker processes


@dataclass(frozen=True)
class FileRecord:
    """A data file as it was when indexed."""

    size: int
    etag: str


@dataclass(frozen=True, eq=False)
class TrialManifest:
    """The trials of a dataset, ordered by session, split (train, val, test) and trial number.

    n_features: columns of `input_features`. n_classes: 1681, or 41 in a phoneme set, or 0 if no
    trial has labels. label_form: "self_loop", "transition", "phoneme" or "unlabelled".
    damaged: what was left out when the index was made, none if it was made strictly.
    """

    trials: tuple[TrialRecord, ...]
    files: Mapping[str, FileRecord]
    n_features: int
    n_classes: int
    label_form: str
    damaged: tuple[Finding, ...] = ()

    @property
    def sessions(self) -> list[str]:
        """Every session with at least one trial, sorted (which for t15.YYYY.MM.DD is by date)."""
        return sorted({trial.session for trial in self.trials})

    def select(self, split: str, sessions: Iterable[str] | None = None) -> list[int]:
        """Indices into `trials` of one split, of the given sessions (default: all), in order.

        Raises:
            DataError: a session is not in the dataset; names the nearest ones.
        """
        if sessions is None:
            return [i for i, trial in enumerate(self.trials) if trial.split == split]
        wanted = list(sessions)
        known = set(self.sessions)
        for session in wanted:
            if session not in known:
                raise DataError(
                    f"Session {session} is not in the dataset, which has {len(known)} sessions "
                    f"({_shortened(sorted(known))}): correct dataset.sessions."
                )
        chosen = set(wanted)
        return [
            i
            for i, trial in enumerate(self.trials)
            if trial.split == split and trial.session in chosen
        ]

    def fingerprint(self) -> str:
        """32 hex digits over every trial's place, features and labels: equal data, equal digits.

        Independent of where the dataset lies and of when it was written.
        """
        digest = hashlib.sha256(f"{self.n_classes} {self.label_form}".encode())
        for t in self.trials:
            content = t.crc32 if t.crc32 is not None else (t.offset, t.length)
            digest.update(f"{t.name} {t.n_time_steps} {t.n_features} {t.dtype} {content}".encode())
            if t.class_ids is not None:
                digest.update(t.class_ids.astype("<i4").tobytes())
        return digest.hexdigest()[:32]

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
            f"{len(keys)} {word} ({_shortened(keys)})"
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
        by_file: dict[str, list[TrialRecord]] = {key: [] for key in sorted(self.files)}
        for trial in self.trials:
            by_file[trial.key].append(trial)
        document = {
            "version": VERSION,
            "n_features": self.n_features,
            "n_classes": self.n_classes,
            "label_form": self.label_form,
            "files": [
                {
                    "key": key,
                    "size": self.files[key].size,
                    "etag": self.files[key].etag,
                    **_columns(trials),
                }
                for key, trials in by_file.items()
            ],
            "damaged": [[f.key, f.trial, f.reason, f.kind] for f in self.damaged],
        }
        text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
        return gzip.compress(text.encode(), compresslevel=9, mtime=0)

    @staticmethod
    def from_bytes(data: bytes) -> TrialManifest:
        """The inverse of `to_bytes`.

        Raises:
            DataError: the bytes are not a manifest, or one of another version.
        """
        again = "make it again with 'python code/prepare_dataset.py index FOLDER-OR-S3-URL'"
        try:
            document = json.loads(gzip.decompress(data))
            version = document["version"]
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{MANIFEST_NAME} is damaged ({' '.join(str(error).split())}): {again}."
            ) from error
        if version != VERSION:
            raise DataError(f"{MANIFEST_NAME} has version {version}, not {VERSION}: {again}.")
        try:
            trials: list[TrialRecord] = []
            files = {}
            for entry in document["files"]:
                files[entry["key"]] = FileRecord(int(entry["size"]), str(entry["etag"]))
                trials += _records(entry, document["n_features"], document["label_form"])
            return TrialManifest(
                tuple(sorted(trials, key=_order)),
                files,
                int(document["n_features"]),
                int(document["n_classes"]),
                str(document["label_form"]),
                tuple(Finding(*finding) for finding in document["damaged"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise DataError(f"{MANIFEST_NAME} is damaged ({error!r}): {again}.") from error


def load_manifest(store: ObjectStore) -> TrialManifest | None:
    """The manifest kept with a dataset, None if there is none.

    Raises:
        StorageError: it cannot be read. DataError: it is damaged.
    """
    if not store.exists(MANIFEST_NAME):
        return None
    return TrialManifest.from_bytes(store.read(MANIFEST_NAME))


def write_manifest(store: ObjectStore, manifest: TrialManifest) -> None:
    """Keep the manifest with its dataset.

    Raises:
        StorageError: writing there is not possible.
    """
    store.write(MANIFEST_NAME, manifest.to_bytes())


def load_or_build_manifest(
    store: ObjectStore,
    log: Callable[[str], None],
    *,
    on_damage: Literal["stop", "exclude"] = "stop",
    processes: int | None = None,
) -> TrialManifest:
    """The dataset's manifest, checked against one listing; built and kept if there is none.

    Args:
        log: receives one line when the index is built, and one per trial left out.
        on_damage: "stop" refuses a dataset with damaged trials, "exclude" goes on without them.

    Raises:
        StorageError: the place cannot be listed or read.
        DataError: no data there, a stale manifest, or damage.
    """
    listing = store.list()
    if MANIFEST_NAME in listing:
        manifest = _read_manifest(store, listing[MANIFEST_NAME].size)
        manifest.check_fresh(listing, store.url)
    else:
        started = time.monotonic()
        files = data_files(listing, store.url)
        size = sum(info.size for info in files.values())
        log(f"No {MANIFEST_NAME} in {store.url}: indexing {len(files)} files, {size / 1e9:.2f} GB")
        manifest = index_dataset(
            store,
            processes=processes,
            progress=_now_and_then(log),
            on_damage="collect",
            listing=listing,
        )
        log(f"Indexed {len(manifest.trials):,} trials in {time.monotonic() - started:.1f} s")
        if not manifest.damaged or on_damage == "exclude":
            try:
                write_manifest(store, manifest)
                log(f"Kept the index as {store.url}/{MANIFEST_NAME} for the next run")
            except StorageError as error:
                log(f"The index serves this run only: {error}")
    if manifest.damaged and on_damage == "stop":
        raise _damage_error(store.url, manifest.damaged)
    for finding in manifest.damaged:
        log(f"Excluded as damaged: {finding}")
    if manifest.damaged:
        log(f"Excluded {len(manifest.damaged)} damaged trials or files in all")
    if not manifest.trials:
        raise DataError(
            f"{store.url} has no sound trial: see why with "
            f"'python code/prepare_dataset.py validate {store.url}'."
        )
    return manifest


def _read_manifest(store: ObjectStore, size: int) -> TrialManifest:
    """The manifest that is there; gzip's CRC finds a damaged transfer, which is tried again."""
    for attempts_left in reversed(range(_MANIFEST_READS)):
        try:
            return TrialManifest.from_bytes(store.read(MANIFEST_NAME, size))
        except DataError:
            if not attempts_left:
                raise
    raise AssertionError


def _now_and_then(log: Callable[[str], None]) -> Callable[[int, int], None]:
    """Progress of indexing as log lines, at most one in `_PROGRESS_SECONDS`."""
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _PROGRESS_SECONDS:
            last = time.monotonic()
            log(f"Indexed {done} of {total} files")

    return progress


def data_files(listing: Mapping[str, ObjectInfo], url: str) -> dict[str, ObjectInfo]:
    """The listing's SESSION/data_{train,val,test}.hdf5, sorted.

    Raises:
        DataError: there are none; says where they are if they lie deeper.
    """
    found = {key: listing[key] for key in sorted(listing) if DATA_FILE.fullmatch(key)}
    if found:
        return found
    deeper = sorted(
        {key.rsplit("/", 2)[0] for key in listing if DATA_FILE.search(key) and key.count("/") > 1}
    )
    if deeper:
        hint = f"give {url.rstrip('/')}/{deeper[0]} instead"
    elif listing:
        hint = f"it holds other things ({_shortened(sorted(listing))}); check the prefix"
    else:
        hint = "there is nothing at all; check bucket and prefix, or upload the dataset first"
    raise DataError(f"No SESSION/data_train.hdf5 (or val, test) in {url}: {hint}.")


def index_dataset(
    store: ObjectStore,
    *,
    processes: int | None = None,
    checksums: bool = True,
    progress: Callable[[int, int], None] | None = None,
    on_damage: Literal["raise", "collect"] = "raise",
    listing: Mapping[str, ObjectInfo] | None = None,
) -> TrialManifest:
    """Read every data file once, whole, into memory, and record where its trials lie.

    Files are read by spawned worker processes (one per CPU, fewer if their files would not fit into
    6 GB); small datasets are read in this process. Nothing is written to disk.

    Args:
        processes: worker processes; None decides by size.
        checksums: record the CRC-32 of every trial's features.
        progress: called with (files done, files in all).
        on_damage: "raise" on damage, or "collect" it in `manifest.damaged`.
        listing: the store's listing, if known already.

    Raises:
        StorageError: a file cannot be read. DataError: no data files, or damage.
    """
    files = data_files(store.list() if listing is None else listing, store.url)
    inspections = inspect_dataset(store, files, processes, checksums, progress=progress)
    manifest = manifest_from_inspections(files, inspections)
    if manifest.damaged and on_damage == "raise":
        raise _damage_error(store.url, manifest.damaged)
    return manifest


def inspect_dataset(
    store: ObjectStore,
    files: Mapping[str, ObjectInfo],
    processes: int | None = None,
    checksums: bool = True,
    look: Callable[[np.ndarray], Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[FileInspection]:
    """What every file holds, in the order of `files`; see `index_dataset`."""
    total = sum(info.size for info in files.values())
    if processes is None:
        largest = max(info.size for info in files.values())
        fit = max(1, _INDEXING_MEMORY // max(largest * 2, 1))
        processes = 1 if total < _SMALL_DATASET else min(os.cpu_count() or 1, len(files), fit)
    jobs = {key: (store.url, key, info.size, checksums, look) for key, info in files.items()}
    results: dict[str, FileInspection] = {}
    for key, result in in_workers(_inspect_job, jobs, processes):
        if isinstance(result, Lost):
            finding = Finding(key, None, result.damage, "crashing file")
            result = FileInspection(key, files[key].size, findings=[finding])
        results[key] = result
        if progress is not None:
            progress(len(results), len(jobs))
    return [results[key] for key in files]


def manifest_from_inspections(
    files: Mapping[str, ObjectInfo], inspections: Sequence[FileInspection]
) -> TrialManifest:
    """One manifest of many files; trials that do not fit the majority are damaged."""
    forms = Counter(form for i in inspections for form in i.label_forms if form is not None)
    widths = Counter(record.n_features for i in inspections for record in i.records)
    form = forms.most_common(1)[0][0] if forms else "unlabelled"
    width = widths.most_common(1)[0][0] if widths else 0
    damaged = [f for i in inspections for f in i.findings if f.severity == "error"]
    trials = []
    for inspection in inspections:
        for record, own in zip(inspection.records, inspection.label_forms, strict=True):
            if record.n_features != width:
                reason = f"has {record.n_features} features where most trials have {width}"
                damaged.append(Finding(record.key, record.trial, reason, "wrong shape"))
            elif own not in (form, None):
                reason = f"its labels are in the {own} form where most are in the {form} form"
                damaged.append(Finding(record.key, record.trial, reason, "label form"))
            else:
                trials.append(record)
    return TrialManifest(
        tuple(sorted(trials, key=_order)),
        {key: FileRecord(info.size, info.etag) for key, info in files.items()},
        width,
        {"phoneme": N_PHONEMES, "unlabelled": 0}.get(form, N_DIPHONES),
        form,
        tuple(sorted(damaged, key=lambda f: (f.key, f.trial or ""))),
    )


def _damage_error(url: str, damaged: Sequence[Finding]) -> DataError:
    more = f" (and {len(damaged) - 1} more findings)" if len(damaged) > 1 else ""
    return DataError(
        f"{url}/{damaged[0]}{more}; see all with 'python code/prepare_dataset.py validate {url}', "
        "repair them, or train without them by --dataset.on_damaged_trial exclude."
    )


def _inspect_job(
    url: str, key: str, size: int, checksums: bool, look: Callable[[np.ndarray], Any] | None
) -> FileInspection:
    data = open_store(url).read(key, size)
    with limited(len(data)):
        return inspect_file(key, data, checksums=checksums, look=look)


def _same_file(record: FileRecord, info: ObjectInfo) -> bool:
    if record.size != info.size:
        return False
    return record.etag == info.etag or _kind(record.etag) != _kind(info.etag)


def _kind(etag: str) -> str:
    """What an ETag is made of: S3's, a folder's, or something else, as a folder's once was."""
    return "S3" if S3_ETAG.fullmatch(etag) else etag.partition(":")[0] if ":" in etag else ""


def _order(trial: TrialRecord) -> tuple[Any, ...]:
    return trial.session, SPLITS.index(trial.split), int(trial.trial[6:]), trial.trial


def _shortened(names: Sequence[str], limit: int = 4) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# --- one file's trials as columns -----------------------------------------------------------------
# Diphone labels are not stored: they follow from the phonemes, the form and the closing label.
# Phoneme labels are text, one character per phoneme: chr(48 + id), which needs no escape in JSON.


_COLUMNS = (
    *("trials", "n_time_steps", "dtype", "offset", "length", "crc32"),
    *("block_num", "trial_num", "corpus", "sentence_label", "phonemes", "closed"),
)


def _columns(trials: Sequence[TrialRecord]) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "trials": [t.trial for t in trials],
        "n_time_steps": [t.n_time_steps for t in trials],
        "dtype": _constant([t.dtype for t in trials]),
        "offset": [t.offset for t in trials],
        "length": [t.length for t in trials],
        "crc32": [t.crc32 for t in trials],
        "block_num": [t.block_num for t in trials],
        "trial_num": [t.trial_num for t in trials],
        "corpus": _constant([t.corpus for t in trials]),
        "sentence_label": [t.sentence_label for t in trials],
        "phonemes": [
            None
            if t.phoneme_ids is None
            else (t.phoneme_ids + 48).astype(np.uint8).tobytes().decode()
            for t in trials
        ],
        "closed": _constant(
            [t.class_ids is not None and bool(t.class_ids[-1] % N_PHONEMES == 0) for t in trials]
        ),
    }
    if any(t.chunks is not None for t in trials):
        columns["chunks"] = [None if t.chunks is None else _pack_chunks(t.chunks) for t in trials]
    return columns


def _constant(values: list[Any]) -> Any:
    """One value if all are equal, else the list."""
    return values[0] if values and all(value == values[0] for value in values) else values


def _column(entry: Mapping[str, Any], name: str, count: int) -> list[Any]:
    values = entry[name]
    values = values if isinstance(values, list) else [values] * count
    if len(values) != count:
        raise ValueError(f"{entry['key']}: {len(values)} values of {name} for {count} trials")
    return values


def _records(entry: Mapping[str, Any], n_features: int, form: str) -> list[TrialRecord]:
    key, count = entry["key"], len(entry["trials"])
    match = DATA_FILE.fullmatch(key)
    if match is None:
        raise ValueError(f"{key} is not a data file")
    columns = [_column(entry, name, count) for name in _COLUMNS]
    chunks = _column(entry, "chunks", count) if "chunks" in entry else [None] * count
    records = []
    for row, packed in zip(zip(*columns, strict=True), chunks, strict=True):
        trial, steps, dtype, offset, length, crc32, block, number, corpus, text, symbols, closed = (
            row
        )
        phonemes = labels = None
        if symbols is not None:
            phonemes = np.frombuffer(symbols.encode(), np.uint8).astype(np.int32) - 48
            if form == "phoneme":
                labels = phonemes
            else:
                labels = encode_diphones(phonemes, form, closed)  # type: ignore[arg-type]
        records.append(
            TrialRecord(
                session=match["session"],
                split=match["split"],
                key=key,
                trial=trial,
                n_time_steps=steps,
                n_features=n_features,
                dtype=dtype,
                offset=offset,
                length=length,
                chunks=None if packed is None else _unpack_chunks(packed, steps, n_features),
                crc32=crc32,
                class_ids=labels,
                phoneme_ids=phonemes,
                sentence_label=text,
                block_num=block,
                trial_num=number,
                corpus=corpus,
            )
        )
    return records


def _pack_chunks(chunks: ChunkLayout) -> list[Any]:
    """Shape, filters, sizes, and what does not follow from them: gaps between chunks, masks.

    Chunks are in row-major order of their place in the array, so their first row and column need
    not be stored.
    """
    _, _, offsets, sizes, masks = chunks.table.T
    gaps = offsets - np.concatenate([[0], (offsets + sizes)[:-1]])
    return [
        list(chunks.chunk_shape),
        list(chunks.filters),
        _constant(sizes.tolist()),
        gaps.tolist() if gaps.any() else 0,
        masks.tolist() if masks.any() else 0,
    ]


def _unpack_chunks(packed: list[Any], n_time_steps: int, n_features: int) -> ChunkLayout:
    (rows, columns), filters, sizes, gaps, masks = packed
    starts = [(r, c) for r in range(0, n_time_steps, rows) for c in range(0, n_features, columns)]
    table = np.zeros((len(starts), 5), np.int64)
    table[:, :2] = starts
    table[:, 3] = sizes
    ends = np.cumsum(table[:, 3] + np.asarray(gaps))
    table[:, 2] = ends - table[:, 3]
    table[:, 4] = masks
    return ChunkLayout((rows, columns), tuple(filters), table)
