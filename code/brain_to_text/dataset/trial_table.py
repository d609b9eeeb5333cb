"""Any number of trials: a line of JSON for each, and arrays of the numbers that choosing needs.

A record is made from its line when it is asked for. A million trials take some 220 MB, and load in
seconds. Python's own library reads and chooses them; numpy views the arrays without a copy.
"""

from __future__ import annotations

import hashlib
import io
import json
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, islice, product
from operator import index as whole_number
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from ..labels.diphones import N_DIPHONES
from ..labels.phonemes import N_PHONEMES
from ..storage.locations import session_and_split
from .trial_record import ChunkLayout, TrialRecord

if TYPE_CHECKING:
    import numpy as np

SPLITS = ("train", "val", "test")
N_CLASSES = {
    "self_loop": N_DIPHONES,
    "transition": N_DIPHONES,
    "phoneme": N_PHONEMES,
    "unlabelled": 0,
}
_FIRST_SYMBOL = 48  # phonemes are text, one character each: chr(48 + id), which JSON leaves alone


class FileTrials(NamedTuple):
    """Which trials of a table lie in one file."""

    key: str
    session: str
    split: str
    rows: range


class _Line(NamedTuple):
    """What the line of a trial says, in this order; the first ten as in `TrialRecord`.

    Labels are stored as phonemes. Diphones follow from these, the form, and whether the closing
    pair is there, which the number of labels says.
    """

    trial: str
    n_time_steps: int
    dtype: str
    offset: int
    length: int
    crc32: int
    block_num: int
    trial_num: int
    sentence_label: str | None
    corpus: str | None
    n_labels: int
    frames_needed: int
    phonemes: str
    chunks: list[Any] | None


_AS_IN_RECORD = _Line._fields[:10]


class TrialTable(Sequence[TrialRecord]):
    """Trials ordered by session, split (train, val, test) and number; a record is made when asked.

    Args:
        n_features, label_form: of all trials.
        counts: how many trials each file has, in order.
        lines: of every trial, UTF-8.

    Attributes:
        files: where each file's trials are; every file's are next to each other.
        n_time_steps, length, block_num, trial_num: one number per trial, see `TrialRecord`.
        half: 1 for float16. n_labels, frames_needed: of labelled trials, else 0.
        fingerprint: 32 hex digits over every trial's name, features and labels.

    Raises:
        ValueError, TypeError, LookupError: these are no such lines, or there is no such form.
        DataError: a file is no data file.
    """

    def __init__(
        self, n_features: int, label_form: str, counts: Mapping[str, int], lines: bytes
    ) -> None:
        self.n_features, self.label_form, self.lines = n_features, label_form, lines
        self.n_classes = N_CLASSES[label_form]
        self.n_time_steps, self.half, self.length = array("I"), array("B"), array("Q")
        self.block_num, self.trial_num = array("q"), array("q")
        self.n_labels, self.frames_needed = array("I"), array("I")
        ends = list(accumulate(counts.values(), initial=0))
        self.files = [
            FileTrials(key, *session_and_split(key), range(first, first + n_trials))
            for (key, n_trials), first in zip(counts.items(), ends[:-1], strict=True)
        ]
        self._files_from = ends[:-1]
        self._starts = array("Q")
        digest = hashlib.sha256(f"{label_form} {n_features}".encode())
        stream = io.BytesIO(lines)
        for file in self.files:
            digest.update(f"{file.key} {len(file.rows)}\n".encode())
            if not file.rows:
                continue
            first, its_lines = stream.tell(), list(islice(stream, len(file.rows)))
            self._starts.extend(accumulate(map(len, its_lines[:-1]), initial=first))
            # a column is a tuple of one value per trial
            rows = json.loads(b"[%b]" % b",".join(its_lines))
            column: Any = _Line._make(zip(*rows, strict=True))
            self.n_time_steps.extend(column.n_time_steps)
            self.half.extend(dtype == "<f2" for dtype in column.dtype)
            self.length.extend(column.length)
            self.block_num.extend(column.block_num)
            self.trial_num.extend(column.trial_num)
            self.n_labels.extend(column.n_labels)
            self.frames_needed.extend(column.frames_needed)
            digest.update(",".join((*column.trial, *column.phonemes)).encode())
            digest.update(array("I", column.crc32))
        for numbers in (self.n_time_steps, self.half, self.n_labels):
            digest.update(numbers)
        if len(self) != ends[-1] or stream.read(1):
            raise ValueError("there are other trials than it says")
        self.fingerprint = digest.hexdigest()[:32]

    @classmethod
    def of(
        cls, records: Iterable[TrialRecord], keys: Iterable[str], n_features: int, label_form: str
    ) -> TrialTable:
        """A table of `records`; every file of `keys` is in it, with trials or without."""
        ordered = sorted(records, key=lambda r: (*_file_order(r.key), int(r.trial[6:]), r.trial))
        n_trials = Counter(record.key for record in ordered)
        counts = {key: n_trials[key] for key in sorted({*keys, *n_trials}, key=_file_order)}
        lines = io.BytesIO()
        for record in ordered:
            text = json.dumps(_line_of(record), separators=(",", ":"), ensure_ascii=False)
            lines.write(text.encode() + b"\n")
        return cls(n_features, label_form, counts, lines.getvalue())

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> TrialRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[TrialRecord]: ...
    def __getitem__(self, index: int | slice) -> TrialRecord | list[TrialRecord]:
        if isinstance(index, slice):
            return [self._record(row) for row in range(*index.indices(len(self)))]
        return self._record(range(len(self))[whole_number(index)])

    def name(self, row: int) -> str:
        """As `TrialRecord.name`."""
        return f"{self._file(row).key}:{self._line(row).trial}"

    def feature_bytes(self) -> np.ndarray:
        """[n] int64: bytes of each trial's decoded features."""
        import numpy as np

        sizes = 4 - 2 * np.asarray(self.half, np.int64)
        return sizes * self.n_features * np.asarray(self.n_time_steps)

    def _file(self, row: int) -> FileTrials:
        return self.files[bisect_right(self._files_from, row) - 1]

    def _line(self, row: int) -> _Line:
        first = self._starts[row]
        return _Line(*json.loads(self.lines[first : self.lines.index(b"\n", first)]))

    def _record(self, row: int) -> TrialRecord:
        file, line = self._file(row), self._line(row)
        class_ids, phoneme_ids = self._labels(line)
        as_they_are: dict[str, Any] = dict(zip(_AS_IN_RECORD, line, strict=False))
        return TrialRecord(
            session=file.session,
            split=file.split,
            key=file.key,
            n_features=self.n_features,
            chunks=self._chunks(line),
            class_ids=class_ids,
            phoneme_ids=phoneme_ids,
            **as_they_are,
        )

    def _labels(self, line: _Line) -> tuple[np.ndarray | None, np.ndarray | None]:
        """(class ids, phoneme ids) of a trial, both None without labels."""
        import numpy as np

        from ..labels.diphones import LabelForm, encode_diphones

        if not line.n_labels:
            return None, None
        symbols = np.frombuffer(line.phonemes.encode(), np.uint8)
        phonemes = symbols.astype(np.int32) - _FIRST_SYMBOL
        if self.label_form == "phoneme":
            return phonemes, phonemes
        form: LabelForm = "transition" if self.label_form == "transition" else "self_loop"
        unclosed = len(phonemes) * (2 if form == "self_loop" else 1)
        return encode_diphones(phonemes, form, line.n_labels > unclosed), phonemes

    def _chunks(self, line: _Line) -> ChunkLayout | None:
        """The inverse of `_packed`."""
        if line.chunks is None:
            return None
        import numpy as np

        (rows, columns), filters, *numbers = line.chunks
        corners = product(range(0, line.n_time_steps, rows), range(0, self.n_features, columns))
        gaps, sizes, masks = np.array(numbers, np.int64)
        offsets = np.cumsum(gaps + sizes) - sizes
        table = np.column_stack([np.array(list(corners)), offsets, sizes, masks])
        return ChunkLayout((rows, columns), tuple(filters), table)


def _line_of(record: TrialRecord) -> _Line:
    labels = () if record.class_ids is None else record.class_ids
    spoken = record.phoneme_ids if len(labels) else None
    as_they_are: dict[str, Any] = {name: getattr(record, name) for name in _AS_IN_RECORD}
    return _Line(
        **as_they_are,
        n_labels=len(labels),
        frames_needed=record.frames_needed,
        phonemes="" if spoken is None else "".join(chr(_FIRST_SYMBOL + p) for p in spoken),
        chunks=None if record.chunks is None else _packed(record.chunks),
    )


def _packed(chunks: ChunkLayout) -> list[Any]:
    """Shape, filters, and of each chunk its gap to the one before, its size and its filter mask.

    Chunks are in row-major order, so their first row and column need
    not be stored.
    """
    _, _, offsets, sizes, masks = chunks.table.T
    gaps = offsets.copy()
    gaps[1:] -= (offsets + sizes)[:-1]
    return [chunks.chunk_shape, chunks.filters, gaps.tolist(), sizes.tolist(), masks.tolist()]


def _file_order(key: str) -> tuple[str, int]:
    """Sorts files by session and split."""
    session, split = session_and_split(key)
    return session, SPLITS.index(split)
