"""Look into one HDF5 data file held in memory: its trials' records and everything wrong with it."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import h5py
import numpy as np

from ..errors import DataError
from ..labels.diphones import N_DIPHONES, decode_diphones, detect_label_form
from ..labels.phonemes import N_PHONEMES
from ..labels.recording_blocks import corpus_of
from .trial_record import HDF5_FILTERS, ChunkLayout, Finding, TrialRecord

DATA_FILE = re.compile(r"(?P<session>[^/]+)/data_(?P<split>train|val|test)\.hdf5")
TRIAL_NAME = re.compile(r"trial_\d+")
# What h5py raises on damaged bytes, depending on where the damage is.
HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)


@dataclass(frozen=True)
class ValueStatistics:
    """Sums over the features of a file, from which means and deviations are combined."""

    count: int = 0
    total: float = 0.0
    total_of_squares: float = 0.0
    minimum: float = np.inf
    maximum: float = -np.inf

    def merged(self, other: ValueStatistics) -> ValueStatistics:
        return ValueStatistics(
            self.count + other.count,
            self.total + other.total,
            self.total_of_squares + other.total_of_squares,
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
        )

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else np.nan

    @property
    def std(self) -> float:
        if not self.count:
            return np.nan
        return float(np.sqrt(max(self.total_of_squares / self.count - self.mean**2, 0.0)))


@dataclass
class ChannelSums:
    """Sums per channel over trials of one width, from which drift is told.

    trials, bins: how many. of_trials, of_trials_squared: [C] of the trials' means and of their
    squares. of_bins, of_bins_squared: [C] over all bins. products: [C, C] float32 of channels with
    each other, over every `THINNED`th bin.
    """

    trials: int
    bins: int
    of_trials: np.ndarray
    of_trials_squared: np.ndarray
    of_bins: np.ndarray
    of_bins_squared: np.ndarray
    products: np.ndarray
    THINNED: ClassVar[int] = 4  # neighbouring bins say nearly the same

    @staticmethod
    def of(features: np.ndarray) -> ChannelSums:
        """Of one trial [T, C] float32."""
        total = features.sum(axis=0, dtype=np.float64)
        squares = np.einsum("tc,tc->c", features, features, dtype=np.float64)
        mean = total / len(features)
        some = features[:: ChannelSums.THINNED]
        return ChannelSums(1, len(features), mean, mean**2, total, squares, some.T @ some)

    def add(self, other: ChannelSums) -> None:
        """Take another one's trials in."""
        self.trials += other.trials
        self.bins += other.bins
        self.of_trials += other.of_trials
        self.of_trials_squared += other.of_trials_squared
        self.of_bins += other.of_bins
        self.of_bins_squared += other.of_bins_squared
        self.products += other.products

    @staticmethod
    def none(width: int) -> ChannelSums:
        """Of no trial."""
        a, b, c, d = np.zeros((4, width))
        return ChannelSums(0, 0, a, b, c, d, np.zeros((width, width), np.float32))


def sketch_of(features: np.ndarray) -> np.ndarray:
    """What a trial [T, C] looks like from afar, by which copies of it are found: [n + 1] float64.

    Means over up to 4 parts of its time × 8 parts of its channels, then the standard deviation.
    They hardly feel how features are stored, rounded, or changed in their last digits; a digest
    would feel all of that.
    """
    rows, columns = (
        np.linspace(0, size, min(size, parts) + 1).astype(int)
        for size, parts in zip(features.shape, (4, 8), strict=True)
    )
    sums = np.add.reduceat(features, rows[:-1], axis=0, dtype=np.float64)
    sums = np.add.reduceat(sums, columns[:-1], axis=1)
    means = sums / np.outer(np.diff(rows), np.diff(columns))
    return np.append(means, features.std(dtype=np.float64))


@dataclass
class FileInspection:
    """What one data file holds.

    label_forms: per record "self_loop", "transition", "phoneme", or None without labels.
    channels: by number of channels, when statistics were asked for.
    sketches: per record its `sketch_of`, when statistics were asked for.
    """

    key: str
    size: int = 0
    records: list[TrialRecord] = field(default_factory=list)
    label_forms: list[str | None] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    statistics: ValueStatistics = field(default_factory=ValueStatistics)
    channels: dict[int, ChannelSums] = field(default_factory=dict)
    sketches: list[np.ndarray] = field(default_factory=list)


def inspect_file(
    key: str, data: bytes, *, checksums: bool = True, statistics: bool = False
) -> FileInspection:
    """Records of every sound trial in the file's bytes, findings for everything else.

    Args:
        key: SESSION/data_SPLIT.hdf5, the file's key in its dataset.
        data: the whole file.
        checksums: take the CRC-32 of every trial's stored features.
        statistics: also sum up the feature values.
    """
    match = DATA_FILE.fullmatch(key)
    if match is None:
        raise DataError(
            f"{key} is not named SESSION/data_train.hdf5, data_val.hdf5 or data_test.hdf5."
        )
    result = FileInspection(key, len(data))

    def found(trial: str | None, reason: str, kind: str, severity: str = "error") -> None:
        result.findings.append(Finding(key, trial, reason, kind, severity))

    try:
        file = h5py.File(io.BytesIO(data), "r")
    except HDF5_ERRORS as error:
        if not data.startswith(b"\x89HDF\r\n\x1a\n"):
            found(None, f"not an HDF5 file ({len(data):,} bytes, wrong signature)", "not HDF5")
        else:
            found(None, f"cannot be opened as HDF5 ({_one_line(error)})", "truncated file")
        return result
    with file:
        try:
            names = list(file)
        except HDF5_ERRORS as error:
            found(None, f"the list of trials cannot be read ({_one_line(error)})", "truncated file")
            return result
        for name in names:
            if not TRIAL_NAME.fullmatch(name):
                found(name, "is not named trial_NNNN and is not used", "unknown name", "warning")
        trials = sorted(filter(TRIAL_NAME.fullmatch, names), key=lambda name: (int(name[6:]), name))
        if not trials:
            found(None, "holds no trials", "empty file")
        for trial in trials:

            def warn(reason: str, kind: str, trial: str = trial) -> None:
                found(trial, reason, kind, "warning")

            try:
                record, form, features = _inspect_trial(
                    file, match["session"], match["split"], key, trial, data, warn
                )
            except DamagedTrial as damage:
                found(trial, damage.reason, damage.kind)
                continue
            except HDF5_ERRORS as error:
                found(trial, f"cannot be read ({_one_line(error)})", "unreadable trial")
                continue
            if checksums:
                span = memoryview(data)[record.offset : record.offset + record.length]
                record = _with_crc(record, zlib.crc32(span))
            if statistics:
                values = features.astype(np.float32, copy=False)
                result.statistics = result.statistics.merged(_summed(values))
                width = record.n_features
                result.channels.setdefault(width, ChannelSums.none(width)).add(
                    ChannelSums.of(values)
                )
                result.sketches.append(sketch_of(values))
            result.records.append(record)
            result.label_forms.append(form)
    return result


class DamagedTrial(Exception):  # noqa: N818
    """Why a trial cannot be used: the reason for people, the kind for tables."""

    def __init__(self, reason: str, kind: str) -> None:
        super().__init__(reason)
        self.reason, self.kind = reason, kind


def _inspect_trial(
    file: h5py.File,
    session: str,
    split: str,
    key: str,
    trial: str,
    data: bytes,
    warn: Callable[[str, str], None],
) -> tuple[TrialRecord, str | None, np.ndarray]:
    group = file[trial]
    if not isinstance(group, h5py.Group):
        raise DamagedTrial("is not a group", "wrong kind")
    attributes = dict(group.attrs)
    dataset = _dataset(group, "input_features")
    if dataset.ndim != 2:
        raise DamagedTrial(f"input_features has shape {dataset.shape}, not [T, C]", "wrong shape")
    n_time_steps, n_features = dataset.shape
    if not n_time_steps or not n_features:
        raise DamagedTrial(f"input_features is empty (shape {dataset.shape})", "empty trial")
    dtype = dataset.dtype.str
    if dtype not in ("<f4", "<f2"):
        raise DamagedTrial(
            f"input_features is {dataset.dtype}, not float32 or float16", "wrong dtype"
        )
    stated = _integer(attributes, "n_time_steps")
    if stated != n_time_steps:
        raise DamagedTrial(
            f"attribute n_time_steps is {stated} but input_features has {n_time_steps} bins",
            "wrong shape",
        )
    named = attribute_text(attributes, "session")
    if named is None:
        raise DamagedTrial("attribute session is missing", "missing attribute")
    if named != session:
        raise DamagedTrial(
            f"attribute session says {named} but the file lies in {session}: a session copied "
            "under another name",
            "duplicate session",
        )
    block_num = _integer(attributes, "block_num")
    labels, phonemes, form = (None, None, None)
    if split != "test":
        labels, phonemes, form = read_labels(group, attributes)
        if attribute_text(attributes, "sentence_label") is None:
            warn("attribute sentence_label is missing", "missing attribute")
        if "transcription" not in group:
            warn("dataset transcription is missing", "missing dataset")
    offset, length, chunks = _layout(dataset, len(data))
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
        class_ids=labels,
        phoneme_ids=phonemes,
        sentence_label=attribute_text(attributes, "sentence_label"),
        block_num=block_num,
        trial_num=_integer(attributes, "trial_num"),
        corpus=attribute_text(attributes, "corpus") or corpus_of(session, block_num),
    )
    try:
        features = record.decode(memoryview(data)[offset : offset + length])
    except DataError as error:
        raise DamagedTrial(
            str(error).removeprefix(f"{record.name}: "), "unreadable trial"
        ) from error
    finite = np.isfinite(features)
    if not finite.all():
        row, column = (int(i) for i in np.argwhere(~finite)[0])
        raise DamagedTrial(
            f"input_features holds {int((~finite).sum()):,} NaN or infinite values, the first at "
            f"bin {row}, feature {column}",
            "not finite",
        )
    return record, form, features


def read_labels(
    group: h5py.Group, attributes: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, str]:
    """Class ids, phoneme ids and the form that connects them."""
    if "seq_class_ids_phoneme" not in group:
        labels = _sequence(group, attributes, "seq_class_ids", "seq_len", N_DIPHONES)
        if labels.max() >= N_PHONEMES:
            raise DamagedTrial(
                f"dataset seq_class_ids_phoneme is missing, though label {labels.max()} is a "
                "diphone class",
                "missing dataset",
            )
        return labels, labels, "phoneme"
    labels = _sequence(group, attributes, "seq_class_ids", "seq_len", N_DIPHONES)
    phonemes = _sequence(group, attributes, "seq_class_ids_phoneme", "seq_len_phoneme", N_PHONEMES)
    form = detect_label_form(labels, phonemes)
    if form is None:
        try:
            decode_diphones(labels, "self_loop")
            reason = "they encode another phoneme sequence"
        except DataError as error:
            reason = str(error).rstrip(".")
        raise DamagedTrial(
            f"the {len(labels)} diphone labels do not match the {len(phonemes)} phoneme labels in "
            f"either label form ({reason})",
            "label form",
        )
    return labels, phonemes, form


def _sequence(
    group: h5py.Group, attributes: dict[str, Any], name: str, length_name: str, n_classes: int
) -> np.ndarray:
    """The first `length_name` labels of dataset `name`, checked."""
    dataset = _dataset(group, name)
    if dataset.ndim != 1 or dataset.dtype.kind not in "iu":
        raise DamagedTrial(
            f"{name} is {dataset.dtype} of shape {dataset.shape}, not a list of int32",
            "wrong dtype" if dataset.ndim == 1 else "wrong shape",
        )
    length = _integer(attributes, length_name)
    if length < 1:
        raise DamagedTrial(f"attribute {length_name} is {length}: no labels", "empty labels")
    if length > len(dataset):
        raise DamagedTrial(
            f"attribute {length_name} is {length} but {name} holds {len(dataset)}", "label length"
        )
    everything = np.asarray(dataset[:])
    labels = everything[:length].astype(np.int32)
    outside = np.flatnonzero((everything[:length] < 1) | (everything[:length] >= n_classes))
    if outside.size:
        position = int(outside[0])
        raise DamagedTrial(
            f"{name}[{position}] is {everything[position]}, outside 1 … {n_classes - 1}",
            "label range",
        )
    if np.any(everything[length:]):
        raise DamagedTrial(
            f"{name} goes on after the {length} labels that {length_name} states", "label length"
        )
    return labels


def _dataset(group: h5py.Group, name: str) -> h5py.Dataset:
    if name not in group:
        raise DamagedTrial(f"dataset {name} is missing", "missing dataset")
    dataset = group[name]
    if not isinstance(dataset, h5py.Dataset):
        raise DamagedTrial(f"{name} is not a dataset", "wrong kind")
    return dataset


def _integer(attributes: dict[str, Any], name: str) -> int:
    if name not in attributes:
        raise DamagedTrial(f"attribute {name} is missing", "missing attribute")
    value = np.asarray(attributes[name])
    if value.size != 1 or value.dtype.kind not in "iuf" or value.reshape(-1)[0] % 1:
        raise DamagedTrial(
            f"attribute {name} is {attributes[name]!r}, not a whole number", "wrong dtype"
        )
    return int(value.reshape(-1)[0])


def attribute_text(attributes: dict[str, Any], name: str) -> str | None:
    """A text attribute, whether stored as text or as bytes; None if it is absent."""
    value = attributes.get(name)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return None if value is None else str(value)


def _layout(dataset: h5py.Dataset, file_size: int) -> tuple[int, int, ChunkLayout | None]:
    """Offset and length of the byte span that holds the features, and how to read it."""
    rewrite = "rewrite the file with 'python code/prepare_dataset.py encode'"
    chunks: ChunkLayout | None = None
    if dataset.chunks is None:
        start = dataset.id.get_offset()
        if start is None or dataset.id.get_storage_size() != dataset.nbytes:
            raise DamagedTrial(
                "input_features is not stored as one run of bytes in this file (compact, virtual, "
                f"external or never written): {rewrite}",
                "layout",
            )
        offset, length = int(start), int(dataset.nbytes)
    else:
        filters = _filters(dataset, rewrite)
        stored: list[Any] = []
        dataset.id.chunk_iter(stored.append)
        rows, columns = dataset.chunks
        expected = -(-dataset.shape[0] // rows) * -(-dataset.shape[1] // columns)
        if len(stored) != expected:
            raise DamagedTrial(
                f"input_features has {len(stored)} of its {expected} chunks", "missing chunks"
            )
        table = np.array(
            [[*c.chunk_offset, c.byte_offset, c.size, c.filter_mask] for c in stored], np.int64
        )
        table = table[np.lexsort((table[:, 1], table[:, 0]))]
        offset = int(table[:, 2].min())
        length = int((table[:, 2] + table[:, 3]).max()) - offset
        table[:, 2] -= offset
        chunks = ChunkLayout((rows, columns), filters, table)
    if offset + length > file_size:
        raise DamagedTrial(
            f"input_features ends at byte {offset + length:,} of a file of {file_size:,}: "
            "the file is cut off",
            "truncated file",
        )
    return offset, length, chunks


def _filters(dataset: h5py.Dataset, rewrite: str) -> tuple[str, ...]:
    plist = dataset.id.get_create_plist()
    names = []
    for index in range(plist.get_nfilters()):
        number, _, _, label = plist.get_filter(index)
        if number not in HDF5_FILTERS:
            raise DamagedTrial(
                f"input_features uses HDF5 filter {number} ({label.decode(errors='replace')}), "
                f"which cannot be undone here: {rewrite} where it can be read",
                "layout",
            )
        names.append(HDF5_FILTERS[number])
    return tuple(names)


def _with_crc(record: TrialRecord, crc32: int) -> TrialRecord:
    fields = {name: getattr(record, name) for name in TrialRecord.__slots__}
    return TrialRecord(**{**fields, "crc32": crc32})


def _summed(features: np.ndarray) -> ValueStatistics:
    flat = features.reshape(-1)
    return ValueStatistics(
        flat.size,
        float(flat.sum(dtype=np.float64)),
        float(np.dot(flat, flat)),
        float(flat.min()),
        float(flat.max()),
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
