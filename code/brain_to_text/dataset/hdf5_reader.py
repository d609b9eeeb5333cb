"""Look into one HDF5 data file held in memory: its trials and everything wrong with them."""

from __future__ import annotations

import io
import re
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np

from ..errors import DataError, Finding
from ..labels.diphones import LABEL_FORMS, N_DIPHONES, decode_diphones
from ..labels.phonemes import N_PHONEMES
from ..labels.pronunciation import normalise_text
from ..labels.recording_blocks import corpus_of
from ..storage.locations import session_and_split
from .file_content import FileContent, content_of
from .hdf5_values import (
    filters_of,
    has_member,
    open_member,
    printable,
    read_dataset,
    read_number,
    read_text,
    refusing_damage,
    stored_chunks,
    text_of,
)
from .hdf5_writer import TrialContents
from .lost_data import LostData
from .trial_record import HDF5_FILTERS, ChunkLayout, TrialRecord

_TRIAL_NAME = re.compile(r"trial_[0-9]{1,9}")
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
    result = FileInspection(key)

    def found(trial: str | None, reason: str, severity: str = "error") -> None:
        kind = "damaged" if severity == "error" else "odd"
        kind += " trial" if trial else " file"
        result.findings.append(Finding(key, trial, printable(reason), kind, severity))

    try:
        file = DataFile(key, data)
    except DataError as damage:
        found(None, str(damage))
        return result
    lost = LostData(key)
    with file.hdf5:
        for name in file.others:
            found(printable(name), "is not named trial_NNNN and is not used", "warning")
        if not file.trials:
            found(None, "holds no trials")
        for trial in file.trials:
            try:
                with refusing_damage("cannot be read"):
                    stored = file.read(trial)
                    record = _record(stored, key, data)
                looked = None if look is None else look(stored.contents.features)
            except DataError as damage:
                found(trial, str(damage).removeprefix(f"{key}:{trial}: ").rstrip("."))
                continue
            result.records.append(record)
            result.label_forms.append(stored.form)
            result.looks.append(looked)
            result.findings += lost.in_trial(trial, stored.contents.features)
            for reason in stored.odd:
                found(trial, reason, "warning")
        result.findings += lost.in_file()
    result.content = content_of(data, result.records)
    return result


@dataclass(frozen=True, eq=False)
class StoredTrial:
    """A sound trial: its values, and how they lie in the file.

    form: of its labels, see `FileInspection`.
    odd: a line for each thing about its sentence that deserves a look.
    chunks: where its features lie, see `stored_chunks`.
    """

    group: h5py.Group
    contents: TrialContents
    form: str | None
    odd: list[str]
    chunks: list[list[int]]


class DataFile:
    """An HDF5 data file in memory.

    hdf5: the open file. trials: names in the order of their numbers. others: names beside them.

    Raises:
        DataError: it cannot be opened.
    """

    def __init__(self, key: str, data: bytes) -> None:
        signed = data.startswith(b"\x89HDF\r\n\x1a\n")
        wrong = f"not an HDF5 file: {len(data):,} bytes, wrong signature"
        with refusing_damage("cannot be read as HDF5" if signed else wrong):
            self.hdf5 = h5py.File(io.BytesIO(data), "r")
            names = list(self.hdf5)
        self.session, self.split = session_and_split(key)
        trials = [name for name in names if _TRIAL_NAME.fullmatch(printable(name))]
        self.trials = sorted(trials, key=lambda name: (int(name[6:]), name))
        self.others = sorted({*names} - {*trials}, key=printable)
        self._taken: list[tuple[int, int, str]] = []  # first byte and end of features, and whose

    def read(self, name: str, labels: bool = True) -> StoredTrial:
        """Everything about a trial.

        Args:
            labels: read its labels, too.

        Raises:
            DataError: it is damaged. What h5py raises: likewise.
        """
        group = open_member(self.hdf5, name)
        if not isinstance(group, h5py.Group):
            raise DataError("is not a group")
        features, chunks = _read_features(group)
        self._take(name, chunks)
        session = read_text(group, "session")
        if session is None:
            raise DataError("attribute session is missing")
        if session != self.session:
            raise DataError(
                f"attribute session says {session} but the file lies in {self.session}: a session "
                "copied under another name"
            )
        class_ids = phoneme_ids = form = None
        if labels and self.is_labelled(group):
            class_ids, phoneme_ids, form = _read_labels(group)
        sentence, odd = _read_sentence(group)
        contents = TrialContents(
            name=name,
            session=session,
            block_num=_required(group, "block_num"),
            trial_num=_required(group, "trial_num"),
            features=features,
            class_ids=class_ids,
            phoneme_ids=phoneme_ids,
            sentence=sentence,
        )
        return StoredTrial(group, contents, form, odd if form else [], chunks)

    def read_sentence(self, name: str) -> str | None:
        """What was said in a trial; raises as `read` does."""
        return _read_sentence(open_member(self.hdf5, name))[0]

    def is_labelled(self, trial: h5py.Group) -> bool:
        """Whether a trial must have labels, or has some though its split (test) need not."""
        if self.split != "test":
            return True
        return has_member(trial, "seq_class_ids") and read_number(trial, "seq_len") not in (None, 0)

    def _take(self, name: str, chunks: Iterable[list[int]]) -> None:
        """Note where a trial's features lie; refuse bytes that another trial has already."""
        for _, _, start, length, _ in chunks:
            end = start + length
            place = bisect_left(self._taken, (start,))
            for first, last, holder in self._taken[max(place - 1, 0) : place + 1]:
                if first < end and start < last:
                    raise DataError(
                        f"its features are the bytes of {holder}: a link to them, not a recording"
                    )
            self._taken.insert(place, (start, end, name))


def _read_features(group: h5py.Group) -> tuple[np.ndarray, list[list[int]]]:
    """Features [T, C] as they are stored, and where."""
    dataset = read_dataset(group, "input_features")
    if dataset.ndim != 2:
        raise DataError(f"input_features has shape {dataset.shape}, not [T, C]")
    if not dataset.size:
        raise DataError(f"input_features is empty (shape {dataset.shape})")
    if dataset.dtype.kind not in "fiu":
        raise DataError(f"input_features is {dataset.dtype}, not float32 or float16")
    stated = _required(group, "n_time_steps")
    if stated != len(dataset):
        raise DataError(
            f"attribute n_time_steps is {stated} but input_features has {len(dataset)} bins"
        )
    chunks = stored_chunks(dataset)
    features = dataset[()]
    finite = np.isfinite(features)
    if not finite.all():
        row, column = (int(i) for i in np.argwhere(~finite)[0])
        raise DataError(
            f"input_features holds {int((~finite).sum()):,} NaN or infinite values, the first at "
            f"bin {row}, feature {column}"
        )
    return features, chunks


def _required(group: h5py.Group, name: str) -> int:
    value = read_number(group, name)
    if value is None:
        raise DataError(f"attribute {name} is missing")
    return value


# --- labels and sentences -------------------------------------------------------------------------


def _read_labels(group: h5py.Group) -> tuple[np.ndarray, np.ndarray, str]:
    """Class ids, phoneme ids and the form that connects them.

    Phonemes that are not stored follow from the diphones.

    Raises:
        DataError: missing, impossible, or contradicting each other.
    """
    labels, stored = _sequence(group, "seq_class_ids", "seq_len", N_DIPHONES), None
    if has_member(group, "seq_class_ids_phoneme"):
        stored = _sequence(group, "seq_class_ids_phoneme", "seq_len_phoneme", N_PHONEMES)
    elif labels.max() < N_PHONEMES:
        return labels, labels, "phoneme"
    for form in LABEL_FORMS:
        with suppress(DataError):
            phonemes = decode_diphones(labels, form)
            if stored is None or np.array_equal(phonemes, stored):
                return labels, phonemes, form
    if stored is None:
        raise DataError(
            f"label {labels.max()} is no phoneme (1 … {N_PHONEMES - 1}), and the labels are no "
            f"diphones of them in either form: {_ALPHABET}"
        )
    raise DataError(
        f"the {len(labels)} diphone labels do not match the {len(stored)} phoneme labels in either "
        "label form"
    )


def _sequence(group: h5py.Group, name: str, length_name: str, n_classes: int) -> np.ndarray:
    """The first `length_name` labels of dataset `name`, checked."""
    dataset = read_dataset(group, name)
    if dataset.ndim != 1 or dataset.dtype.kind not in "iu":
        raise DataError(f"{name} is {dataset.dtype} of shape {dataset.shape}, not a list of int32")
    length = _required(group, length_name)
    if length < 1:
        raise DataError(f"attribute {length_name} is {length}: no labels")
    if length > len(dataset):
        raise DataError(f"attribute {length_name} is {length} but {name} holds {len(dataset)}")
    everything = dataset[()]
    labels = everything[:length]
    outside = np.flatnonzero((labels < 1) | (labels >= n_classes))
    if outside.size:
        raise DataError(
            f"{name}[{outside[0]}] is {labels[outside[0]]}, outside 1 … {n_classes - 1}: "
            f"{_ALPHABET}"
        )
    if everything[length:].any():
        raise DataError(f"{name} goes on after the {length} labels that {length_name} states")
    return labels.astype(np.int32)


def _read_sentence(group: h5py.Group) -> tuple[str | None, list[str]]:
    """What was said, by the attribute sentence_label, or else the dataset transcription.

    Returns:
        (the sentence, a line for each of the two that is missing or says something else).
    """
    label, transcription, odd = read_text(group, "sentence_label"), None, []
    try:
        transcription = text_of(read_dataset(group, "transcription")[()], "dataset transcription")
    except DataError as damage:
        odd.append(str(damage))
    if label is None:
        odd.append("attribute sentence_label is missing")
    elif transcription and normalise_text(transcription) != normalise_text(label):
        odd.append(f"transcription says {transcription!r}, sentence_label {label!r}")
    return label or transcription or None, odd


# --- where features lie in the file ---------------------------------------------------------------


def _record(stored: StoredTrial, key: str, data: bytes) -> TrialRecord:
    """The manifest's record of a trial, whose bytes decode to what h5py reads.

    Raises:
        DataError: no record can be made, or it would be wrong.
    """
    trial = stored.contents
    dtype = trial.features.dtype
    if dtype.str not in ("<f4", "<f2"):
        raise DataError(
            f"input_features is {dtype}, not float32 or float16: 'python "
            "code/prepare_dataset.py encode' converts it"
        )
    offset, length, chunks = _layout(stored)
    span = memoryview(data)[offset : offset + length]
    session, split = session_and_split(key)
    record = TrialRecord(
        session=session,
        split=split,
        key=key,
        trial=trial.name,
        n_time_steps=trial.features.shape[0],
        n_features=trial.features.shape[1],
        dtype=dtype.str,
        offset=offset,
        length=length,
        chunks=chunks,
        crc32=zlib.crc32(span),
        class_ids=trial.class_ids,
        phoneme_ids=trial.phoneme_ids,
        sentence_label=trial.sentence,
        block_num=trial.block_num,
        trial_num=trial.trial_num,
        corpus=read_text(stored.group, "corpus") or corpus_of(session, trial.block_num),
    )
    if not np.array_equal(record.decode(span).view(np.uint8), trial.features.view(np.uint8)):
        raise DataError(
            f"the bytes of input_features are not where h5py {h5py.__version__} says: install the "
            "version that docker/requirements_sagemaker.txt names, and repeat the command"
        )
    return record


def _layout(stored: StoredTrial) -> tuple[int, int, ChunkLayout | None]:
    """Offset and length of the byte span that holds the features, and how to read it."""
    if not stored.chunks:
        raise DataError(
            "input_features is not stored as one run of bytes in this file (compact layout): "
            f"{_REWRITE}"
        )
    table = np.array(stored.chunks, np.int64)
    offset = int(table[:, 2].min())
    length = int((table[:, 2] + table[:, 3]).max()) - offset
    table[:, 2] -= offset
    dataset = stored.group["input_features"]
    if dataset.chunks is None:
        return offset, length, None
    filters = filters_of(dataset)
    for number, label in filters:
        if number not in HDF5_FILTERS:
            raise DataError(
                f"input_features uses HDF5 filter {number} ({label}), which cannot be undone here: "
                f"{_REWRITE} where it can be read"
            )
    names = tuple(HDF5_FILTERS[number] for number, _ in filters)
    return offset, length, ChunkLayout(dataset.chunks, names, table)
