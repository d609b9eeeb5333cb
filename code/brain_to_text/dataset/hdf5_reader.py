"""Look into one HDF5 data file held in memory: its trials' records and everything wrong with it."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np

from ..errors import DataError, Finding
from ..labels.diphones import LABEL_FORMS, N_DIPHONES, decode_diphones, detect_label_form
from ..labels.phonemes import N_PHONEMES
from ..labels.pronunciation import normalise_text
from ..labels.recording_blocks import corpus_of
from ..storage.locations import session_and_split
from .file_content import FileContent, content_of
from .hdf5_values import (
    HDF5_ERRORS,
    MOST_LABELS,
    cause_of,
    check_stored,
    filters_of,
    printable,
    read_dataset,
    read_number,
    read_text,
    refuse_external_link,
    text_of,
)
from .lost_data import LostData
from .trial_record import HDF5_FILTERS, ChunkLayout, TrialRecord

TRIAL_NAME = re.compile(r"trial_[0-9]{1,9}")
_ALPHABET = f"only the alphabet of {N_PHONEMES} phoneme classes is read here"
_REWRITE = "rewrite the file with 'python code/prepare_dataset.py encode'"


@dataclass
class FileInspection:
    """What one data file holds.

    label_forms: per record "self_loop", "transition", "phoneme", or None without labels.
    looks: per record what `look` of `inspect_file` said.
    content: tells whether the file is still this one.
    """

    key: str
    size: int = 0
    records: list[TrialRecord] = field(default_factory=list)
    label_forms: list[str | None] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    looks: list[Any] = field(default_factory=list)
    content: FileContent = field(default_factory=FileContent)


def inspect_file(
    key: str, data: bytes, look: Callable[[np.ndarray], Any] | None = None
) -> FileInspection:
    """Records of every sound trial in the file's bytes, findings for everything else.

    Args:
        key: SESSION/data_SPLIT.hdf5, the file's key in its dataset.
        data: the whole file.
        look: is shown the features [T, C] of every sound trial.
    """
    result = FileInspection(key, len(data))

    def found(trial: str | None, reason: str, severity: str = "error") -> None:
        kind = "damaged" if severity == "error" else "odd"
        kind += " trial" if trial else " file"
        result.findings.append(Finding(key, trial, printable(reason), kind, severity))

    try:
        file = h5py.File(io.BytesIO(data), "r")
        names = [printable(name) for name in file]
    except HDF5_ERRORS as error:
        if data.startswith(b"\x89HDF\r\n\x1a\n"):
            found(None, f"cannot be read as HDF5 ({cause_of(error)})")
        else:
            found(None, f"not an HDF5 file ({len(data):,} bytes, wrong signature)")
        return result
    with file:
        for name in names:
            if not TRIAL_NAME.fullmatch(name):
                found(name, "is not named trial_NNNN and is not used", "warning")
        lost = LostData(key)
        trials = sorted(filter(TRIAL_NAME.fullmatch, names), key=lambda name: (int(name[6:]), name))
        if not trials:
            found(None, "holds no trials")
        for trial in trials:
            odd: list[str] = []
            try:
                record, form, features = _inspect_trial(file, key, trial, data, odd.append)
                looked = None if look is None else look(features)
            except DataError as damage:
                found(trial, str(damage).removeprefix(f"{key}:{trial}: ").rstrip("."))
            except HDF5_ERRORS as error:
                found(trial, f"cannot be read ({cause_of(error)})")
            else:
                result.records.append(record)
                result.label_forms.append(form)
                result.looks.append(looked)
                result.findings += lost.in_trial(trial, features)
            for reason in odd:
                found(trial, reason, "warning")
        result.findings += lost.in_file()
        for linked, other in _overlapping(result.records):
            row = result.records.index(linked)
            for column in (result.records, result.label_forms, result.looks):
                column.pop(row)
            reason = f"its features are the bytes of {other.trial}: a link to them, not a recording"
            result.findings.append(Finding(key, linked.trial, reason, "shared bytes"))
    result.content = content_of(data, result.records)
    return result


def _inspect_trial(
    file: h5py.File, key: str, trial: str, data: bytes, warn: Callable[[str], object]
) -> tuple[TrialRecord, str | None, np.ndarray]:
    """Record, label form and features of a sound trial."""
    session, split = session_and_split(key)
    refuse_external_link(file, trial)
    group = file[trial]
    if not isinstance(group, h5py.Group):
        raise DataError("is not a group")
    dataset = read_dataset(group, "input_features")
    if dataset.ndim != 2:
        raise DataError(f"input_features has shape {dataset.shape}, not [T, C]")
    n_time_steps, n_features = dataset.shape
    if not n_time_steps or not n_features:
        raise DataError(f"input_features is empty (shape {dataset.shape})")
    dtype = dataset.dtype.str
    if dtype not in ("<f4", "<f2"):
        convertible = dataset.dtype.kind in "fiu"
        if convertible:
            check_stored(dataset, "input_features")
        raise DataError(
            f"input_features is {dataset.dtype}, not float32 or float16"
            + (": 'python code/prepare_dataset.py encode' converts it" if convertible else "")
        )
    stated = _number(group, "n_time_steps")
    if stated != n_time_steps:
        raise DataError(
            f"attribute n_time_steps is {stated} but input_features has {n_time_steps} bins"
        )
    named = read_text(group, "session")
    if named is None:
        raise DataError("attribute session is missing")
    if named != session:
        raise DataError(
            f"attribute session says {named} but the file lies in {session}: a session copied "
            "under another name"
        )
    block_num = _number(group, "block_num")
    labels, phonemes, form = read_labels(group) if is_labelled(group, split) else (None,) * 3
    sentence = read_sentence(group, warn if labels is not None else lambda *_: None)
    offset, length, chunks = _layout(dataset, len(data))
    span = memoryview(data)[offset : offset + length]
    record = TrialRecord(
        session=session,
        split=split,
        key=key,
        trial=trial,
        n_time_steps=n_time_steps,
        n_features=n_features,
        dtype=dtype,
        offset=offset,
        length=length,
        chunks=chunks,
        crc32=zlib.crc32(span),
        class_ids=labels,
        phoneme_ids=phonemes,
        sentence_label=sentence,
        block_num=block_num,
        trial_num=_number(group, "trial_num"),
        corpus=read_text(group, "corpus") or corpus_of(session, block_num),
    )
    features = record.decode(span)
    if not np.array_equal(features.view(np.uint8), dataset[()].view(np.uint8)):
        raise DataError(
            f"the bytes of input_features are not where h5py {h5py.__version__} says: install the "
            "version that docker/requirements_sagemaker.txt names, and repeat the command"
        )
    finite = np.isfinite(features)
    if not finite.all():
        row, column = (int(i) for i in np.argwhere(~finite)[0])
        raise DataError(
            f"input_features holds {int((~finite).sum()):,} NaN or infinite values, the first at "
            f"bin {row}, feature {column}"
        )
    return record, form, features


# --- labels ---------------------------------------------------------------------------------------


def is_labelled(group: h5py.Group, split: str) -> bool:
    """Whether a trial must have labels, or has some though its split (test) need not."""
    if split != "test":
        return True
    refuse_external_link(group, "seq_class_ids")
    return "seq_class_ids" in group and read_number(group, "seq_len") not in (None, 0)


def read_labels(group: h5py.Group) -> tuple[np.ndarray, np.ndarray, str]:
    """Class ids, phoneme ids and the form that connects them.

    Phonemes that are not stored follow from the diphones.

    Raises:
        DataError: missing, impossible, or contradicting each other.
    """
    labels = _sequence(group, "seq_class_ids", "seq_len", N_DIPHONES)
    refuse_external_link(group, "seq_class_ids_phoneme")
    if "seq_class_ids_phoneme" not in group:
        if labels.max() < N_PHONEMES:
            return labels, labels, "phoneme"
        for form in LABEL_FORMS:
            try:
                return labels, decode_diphones(labels, form), form
            except DataError:
                continue
        raise DataError(
            f"label {labels.max()} is no phoneme (1 … {N_PHONEMES - 1}), and the labels are no "
            f"diphones of them in either form: {_ALPHABET}"
        )
    phonemes = _sequence(group, "seq_class_ids_phoneme", "seq_len_phoneme", N_PHONEMES)
    known = detect_label_form(labels, phonemes)
    if known is None:
        raise DataError(
            f"the {len(labels)} diphone labels do not match the {len(phonemes)} phoneme labels in "
            "either label form"
        )
    return labels, phonemes, known


def _sequence(group: h5py.Group, name: str, length_name: str, n_classes: int) -> np.ndarray:
    """The first `length_name` labels of dataset `name`, checked."""
    dataset = read_dataset(group, name)
    if dataset.ndim != 1 or dataset.dtype.kind not in "iu":
        raise DataError(f"{name} is {dataset.dtype} of shape {dataset.shape}, not a list of int32")
    if dataset.size > MOST_LABELS:
        raise DataError(f"{name} claims {dataset.size:,} labels")
    length = _number(group, length_name)
    if length < 1:
        raise DataError(f"attribute {length_name} is {length}: no labels")
    if length > len(dataset):
        raise DataError(f"attribute {length_name} is {length} but {name} holds {len(dataset)}")
    everything = np.asarray(dataset[:])
    labels = everything[:length].astype(np.int32)
    outside = np.flatnonzero((everything[:length] < 1) | (everything[:length] >= n_classes))
    if outside.size:
        position = int(outside[0])
        raise DataError(
            f"{name}[{position}] is {everything[position]}, outside 1 … {n_classes - 1}: "
            f"{_ALPHABET}"
        )
    if np.any(everything[length:]):
        raise DataError(f"{name} goes on after the {length} labels that {length_name} states")
    return labels


def read_sentence(group: h5py.Group, warn: Callable[[str], object]) -> str | None:
    """What was said: the attribute sentence_label, or else the dataset transcription.

    Args:
        warn: is told when one is missing or they say different things.
    """
    label, transcription = read_text(group, "sentence_label"), None
    refuse_external_link(group, "transcription")
    if "transcription" in group:
        dataset = read_dataset(group, "transcription")
        if dataset.size > MOST_LABELS:
            raise DataError(f"transcription claims {dataset.size:,} characters")
        try:
            transcription = text_of(dataset[()], "dataset transcription")
        except DataError as damage:
            warn(str(damage))
    else:
        warn("dataset transcription is missing")
    if label is None:
        warn("attribute sentence_label is missing")
    elif transcription and normalise_text(transcription) != normalise_text(label):
        warn(f"transcription says {transcription!r}, sentence_label {label!r}")
    return label or transcription or label


def _number(group: h5py.Group, name: str) -> int:
    value = read_number(group, name)
    if value is None:
        raise DataError(f"attribute {name} is missing")
    return value


# --- how features lie in the file -----------------------------------------------------------------


def _layout(dataset: h5py.Dataset, file_size: int) -> tuple[int, int, ChunkLayout | None]:
    """Offset and length of the byte span that holds the features, and how to read it."""
    stored = check_stored(dataset, "input_features")
    chunks: ChunkLayout | None = None
    if dataset.chunks is None:
        start = dataset.id.get_offset()
        if start is None:
            raise DataError(
                "input_features is not stored as one run of bytes in this file (compact layout): "
                f"{_REWRITE}"
            )
        offset, length = int(start), int(dataset.nbytes)
    else:
        table = np.array(
            [[*c.chunk_offset, c.byte_offset, c.size, c.filter_mask] for c in stored], np.int64
        )
        table = table[np.lexsort((table[:, 1], table[:, 0]))]
        offset = int(table[:, 2].min())
        length = int((table[:, 2] + table[:, 3]).max()) - offset
        table[:, 2] -= offset
        if table[:, 3].sum() > length:
            raise DataError("chunks of input_features lie over each other")
        chunks = ChunkLayout(dataset.chunks, _filters(dataset), table)
    if offset + length > file_size:
        raise DataError(
            f"input_features ends at byte {offset + length:,} of a file of {file_size:,}: "
            "the file is cut off"
        )
    return offset, length, chunks


def _overlapping(records: Sequence[TrialRecord]) -> list[tuple[TrialRecord, TrialRecord]]:
    """Each trial of one file that has bytes of another before it in the file, with that one."""
    found: dict[str, tuple[TrialRecord, TrialRecord]] = {}
    runs = [(*run, row) for row, record in enumerate(records) for run in record.pieces()]
    reach, holder = 0, -1
    for start, end, row in sorted(runs):
        if start < reach:
            found.setdefault(records[row].trial, (records[row], records[holder]))
        if end > reach:
            reach, holder = end, row
    return list(found.values())


def _filters(dataset: h5py.Dataset) -> tuple[str, ...]:
    for number, label in filters_of(dataset):
        if number not in HDF5_FILTERS:
            raise DataError(
                f"input_features uses HDF5 filter {number} ({label}), which cannot be undone here: "
                f"{_REWRITE} where it can be read"
            )
    return tuple(HDF5_FILTERS[number] for number, _ in filters_of(dataset))
