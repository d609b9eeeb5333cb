"""The document that a manifest is stored as: one file's trials as columns.

What is read is believed only where it fits together: a manifest made by hand, or by a program that
was wrong, is refused with what cannot be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import Finding
from ..labels.diphones import N_DIPHONES, encode_diphones
from ..labels.phonemes import N_PHONEMES
from ..storage.locations import DATA_FILE, ObjectInfo, session_and_split
from .hdf5_reader import TRIAL_NAME
from .trial_record import HDF5_FILTERS, MOST_INFLATED, ChunkLayout, TrialRecord

SPLITS = ("train", "val", "test")
N_CLASSES = {
    "self_loop": N_DIPHONES,
    "transition": N_DIPHONES,
    "phoneme": N_PHONEMES,
    "unlabelled": 0,
}
_PHONEMES = re.compile(f"[1-{chr(47 + N_PHONEMES)}]+")  # chr(48 + id)


def trial_order(trial: TrialRecord) -> tuple[Any, ...]:
    """Sorts trials by session, split and number."""
    return trial.session, SPLITS.index(trial.split), int(trial.trial[6:]), trial.trial


def parsed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `manifest.TrialManifest` that a document describes.

    Raises:
        ValueError: it says what cannot be. Other errors: it has another shape.
    """
    form, n_features = document["label_form"], document["n_features"]
    if document["n_classes"] != N_CLASSES[form]:
        raise ValueError(f"{document['n_classes']!r} classes of {form} labels")
    trials: list[TrialRecord] = []
    files: dict[str, ObjectInfo] = {}
    for entry in document["files"]:
        key = entry["key"]
        if key in files or not DATA_FILE.fullmatch(key):
            raise ValueError(f"{key!r} is listed twice, or no data file")
        if not isinstance(entry["etag"], str):
            raise ValueError(f"the ETag of {key} is {entry['etag']!r}")
        files[key] = ObjectInfo(key, _whole(entry["size"], f"size of {key}"), entry["etag"])
        records = _records(entry, _whole(n_features, "n_features"), form)
        _check_places(records, files[key].size)
        trials += records
    damaged = tuple(Finding(*finding) for finding in document["damaged"])
    for finding in damaged:
        texts = (finding.key, finding.trial or "", finding.reason, finding.kind)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"a finding is {finding!r}")
    trials.sort(key=trial_order)
    return {
        "trials": tuple(trials),
        "files": files,
        "n_features": n_features,
        "n_classes": N_CLASSES[form],
        "label_form": form,
        "damaged": damaged,
    }


def _whole(value: Any, what: str, least: int = 0, most: int = 2**62) -> int:
    """`value`, a whole number between `least` and `most`.

    Raises:
        ValueError: it is not.
    """
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} is {value!r}")
    return value


def _check_places(records: Sequence[TrialRecord], file_size: int) -> None:
    """Every trial has bytes of its own inside its file, as many as its features need.

    Raises:
        ValueError: one has not.
    """
    names = {record.trial for record in records}
    if len(names) < len(records):
        raise ValueError(f"{records[0].key} has trials of the same name")
    for record in records:
        if record.chunks is None and record.length != record.feature_bytes:
            raise ValueError(
                f"{record.name} has {record.length:,} bytes and needs {record.feature_bytes:,}"
            )
        if record.offset + record.length > file_size:
            raise ValueError(
                f"{record.name} ends at byte {record.offset + record.length:,} of a file of "
                f"{file_size:,}"
            )
    for record, other in overlapping(records):
        raise ValueError(f"{record.name} lies on bytes of {other.name}")


def overlapping(records: Sequence[TrialRecord]) -> Iterator[tuple[TrialRecord, TrialRecord]]:
    """Each trial of one file that has bytes of another before it in the file, with that one."""
    if not records:
        return
    pieces = [record.pieces() for record in records]
    owner = np.repeat(np.arange(len(records)), [len(own) for own in pieces])
    bounds = np.concatenate(pieces)
    order = np.argsort(bounds[:, 0], kind="stable")
    owner, (starts, ends) = owner[order], bounds[order].T
    reach = np.maximum.accumulate(ends)
    holder = np.maximum.accumulate(np.where(ends == reach, np.arange(len(ends)), 0))
    named = set()
    for place in np.flatnonzero(starts[1:] < reach[:-1]).tolist():
        if owner[place + 1] not in named:
            named.add(owner[place + 1])
            yield records[owner[place + 1]], records[owner[holder[place]]]


# --- one file's trials as columns -----------------------------------------------------------------
# Diphone labels are not stored: they follow from the phonemes, the form and the closing label.
# Phoneme labels are text, one character per phoneme: chr(48 + id), which needs no escape in JSON.


_NUMBERS = {  # least and greatest
    "n_time_steps": (1, 2**62),
    "offset": (0, 2**62),
    "length": (1, 2**62),
    "crc32": (0, 2**32 - 1),
    "block_num": (-(2**62), 2**62),
    "trial_num": (-(2**62), 2**62),
}
_TEXTS = ("corpus", "sentence_label")
_COLUMNS = ("trials", "dtype", *_NUMBERS, *_TEXTS, "phonemes", "closed", "chunks")


def columns_of(trials: Sequence[TrialRecord]) -> dict[str, Any]:
    columns: dict[str, Any] = {"trials": [t.trial for t in trials]}
    columns |= {name: [getattr(t, name) for t in trials] for name in ("dtype", *_NUMBERS, *_TEXTS)}
    columns["phonemes"] = [
        None if t.phoneme_ids is None else (t.phoneme_ids + 48).astype(np.uint8).tobytes().decode()
        for t in trials
    ]
    columns["closed"] = [
        t.class_ids is not None and bool(t.class_ids[-1] % N_PHONEMES == 0) for t in trials
    ]
    columns["chunks"] = [None if t.chunks is None else _pack_chunks(t.chunks) for t in trials]
    return columns


def _records(entry: Mapping[str, Any], n_features: int, form: str) -> list[TrialRecord]:
    key = entry["key"]
    session, split = session_and_split(key)
    records = []
    for values in zip(*(entry[name] for name in _COLUMNS), strict=True):
        row = dict(zip(_COLUMNS, values, strict=True))
        trial, dtype = row["trials"], row["dtype"]
        where = f"{key}:{trial}"
        if not TRIAL_NAME.fullmatch(trial) or dtype not in ("<f4", "<f2"):
            raise ValueError(f"{where} is no trial, or of type {dtype!r}")
        texts = {name: row[name] for name in _TEXTS}
        if not all(
            text is None or isinstance(text, str) for text in (*texts.values(), row["phonemes"])
        ):
            raise ValueError(f"{where}: one of its texts is none")
        numbers: dict[str, Any] = {
            n: _whole(row[n], f"{n} of {where}", *both) for n, both in _NUMBERS.items()
        }
        phonemes, labels = _labels(row["phonemes"], form, row["closed"], where)
        record = TrialRecord(
            session=session,
            split=split,
            key=key,
            trial=trial,
            n_features=n_features,
            dtype=dtype,
            class_ids=labels,
            phoneme_ids=phonemes,
            **numbers,
            **texts,
        )
        if row["chunks"] is not None:
            record = replace(record, chunks=_unpack_chunks(row["chunks"], record))
        records.append(record)
    return records


def _labels(
    symbols: str | None, form: str, closed: Any, where: str
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(phoneme ids, class ids) of a trial, both None without labels."""
    if symbols is None:
        return None, None
    if form == "unlabelled" or type(closed) is not bool:
        raise ValueError(f"{where} has labels in a set without any, or no closing pair")
    if not _PHONEMES.fullmatch(symbols):
        raise ValueError(f"{where} has labels that are no phonemes")
    phonemes = np.frombuffer(symbols.encode(), np.uint8).astype(np.int32) - 48
    if form == "phoneme":
        return phonemes, phonemes
    return phonemes, encode_diphones(phonemes, form, closed)  # type: ignore[arg-type]


def _pack_chunks(chunks: ChunkLayout) -> list[Any]:
    """Shape, filters, sizes, and what does not follow from them: gaps between chunks, masks.

    Chunks are in row-major order of their place in the array, so their first row and column need
    not be stored.
    """
    _, _, offsets, sizes, masks = chunks.table.T
    gaps = offsets - np.concatenate([[0], (offsets + sizes)[:-1]])
    return [chunks.chunk_shape, chunks.filters, sizes.tolist(), gaps.tolist(), masks.tolist()]


def _unpack_chunks(packed: list[Any], trial: TrialRecord) -> ChunkLayout:
    (rows, columns), filters, sizes, gaps, masks = packed
    rows, columns = _whole(rows, "rows of a chunk", 1), _whole(columns, "columns of a chunk", 1)
    unknown = set(filters) - set(HDF5_FILTERS.values())
    if unknown or len(filters) > len(HDF5_FILTERS):
        raise ValueError(f"filters are {filters!r}")
    n_chunks = -(-trial.n_time_steps // rows) * -(-trial.n_features // columns)
    decoded = n_chunks * rows * columns * np.dtype(trial.dtype).itemsize
    if n_chunks > trial.length or decoded > MOST_INFLATED * trial.length:
        raise ValueError(f"{trial.length:,} bytes cannot hold {decoded:,} in {n_chunks:,} chunks")
    table = np.zeros((n_chunks, 5), np.int64)
    table[:, :2] = [
        (row, column)
        for row in range(0, trial.n_time_steps, rows)
        for column in range(0, trial.n_features, columns)
    ]
    table[:, 3] = sizes
    ends = np.cumsum(table[:, 3] + np.asarray(gaps, np.int64))
    table[:, 2] = ends - table[:, 3]
    table[:, 4] = masks
    if (
        table[:, 3].min() < 1
        or table[:, 2].min() != 0
        or ends.max() != trial.length
        or not ((table[:, 4] >= 0) & (table[:, 4] < 2 ** len(filters))).all()
    ):
        raise ValueError(f"chunks do not make up the {trial.length:,} bytes they are in")
    return ChunkLayout((rows, columns), tuple(filters), table)
