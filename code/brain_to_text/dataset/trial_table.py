"""Any number of trials as columns: a few arrays of numbers and two long texts.

Python's own library reads and chooses them; numpy views the arrays without a copy. A million trials
take some 150 MB, and load in seconds.
"""

from __future__ import annotations

import hashlib
from array import array
from base64 import b64decode, b64encode
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
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
# Type of each column of numbers. Labels are kept as phonemes: diphones follow from these, the form,
# and whether the closing pair is there, which the number of labels says.
_NUMBERS = {
    "number": "I",  # trial_NNNN, and its digits
    "digits": "B",
    "n_time_steps": "I",
    "half": "B",  # 1: float16
    "offset": "Q",
    "length": "Q",
    "crc32": "I",
    "block_num": "q",
    "trial_num": "q",
    "n_phonemes": "I",
    "n_labels": "I",
    "frames_needed": "I",
    "n_letters": "I",  # of its sentence
    "corpus": "I",  # into `corpora`
    "layout": "I",  # into `layouts`
    "n_layout_numbers": "I",
}
# Columns that say which features and labels a trial has.
_CONTENT = ("number", "digits", "n_time_steps", "half", "crc32", "n_phonemes", "n_labels")
_FIRST_SYMBOL = 48  # phonemes are text, one character each: chr(48 + id), which JSON leaves alone


class FileTrials(NamedTuple):
    """Which trials of a table lie in one file."""

    key: str
    session: str
    split: str
    rows: range


class TrialTable(Sequence[TrialRecord]):
    """Trials ordered by session, split (train, val, test) and number; a record is made when asked.

    Attributes:
        files: where each file's trials are; every file's are next to each other.
        n_time_steps, length, crc32, block_num, …: one number per trial, see `TrialRecord`.
        n_labels, frames_needed: of labelled trials, else 0.
    """

    n_time_steps: array[int]
    half: array[int]
    offset: array[int]
    length: array[int]
    crc32: array[int]
    block_num: array[int]
    trial_num: array[int]
    n_phonemes: array[int]
    n_labels: array[int]
    frames_needed: array[int]

    def __init__(
        self,
        n_features: int,
        label_form: str,
        counts: Mapping[str, int],
        columns: Mapping[str, array[int]],
        *,
        phonemes: str,
        sentences: str,
        corpora: Sequence[str | None],
        layouts: Sequence[Sequence[Any] | None],
        layout_numbers: array[int],
    ) -> None:
        self.n_features, self.label_form = n_features, label_form
        self._columns = dict(columns)
        for name, column in columns.items():
            setattr(self, name, column)
        self._phonemes, self._sentences = phonemes, sentences
        self._corpora, self._layouts, self._layout_numbers = corpora, layouts, layout_numbers
        self._phonemes_from = _starts(columns["n_phonemes"])
        self._letters_from = _starts(columns["n_letters"])
        self._numbers_from = _starts(columns["n_layout_numbers"])
        ends = list(accumulate(counts.values(), initial=0))
        self.files = [
            FileTrials(key, *session_and_split(key), range(first, first + n_trials))
            for (key, n_trials), first in zip(counts.items(), ends[:-1], strict=True)
        ]
        self._files_from = ends[:-1]
        expected = (len(phonemes), len(sentences), len(layout_numbers), *[ends[-1]] * len(columns))
        found = (self._phonemes_from[-1], self._letters_from[-1], self._numbers_from[-1])
        if (*found, *map(len, columns.values())) != expected:
            raise ValueError("its columns are of different lengths")

    @classmethod
    def of(
        cls, records: Iterable[TrialRecord], keys: Iterable[str], n_features: int, label_form: str
    ) -> TrialTable:
        """A table of `records`; every file of `keys` is in it, with trials or without."""
        ordered = sorted(records, key=lambda r: (*file_order(r.key), int(r.trial[6:]), r.trial))
        counts = dict.fromkeys(sorted({*keys, *(r.key for r in ordered)}, key=file_order), 0)
        columns = {name: array(kind) for name, kind in _NUMBERS.items()}
        corpora: dict[str | None, int] = {None: 0}
        layouts: dict[Any, int] = {None: 0}
        phonemes, sentences, layout_numbers = [], [], array("q")
        for record in ordered:
            counts[record.key] += 1
            labels = () if record.class_ids is None else record.class_ids
            spoken = record.phoneme_ids if len(labels) else None
            symbols = "" if spoken is None else "".join(chr(_FIRST_SYMBOL + p) for p in spoken)
            layout, numbers = (None, []) if record.chunks is None else _packed(record.chunks)
            phonemes.append(symbols)
            sentences.append(record.sentence_label or "")
            layout_numbers.extend(numbers)
            row: dict[str, int] = {
                "number": int(record.trial[6:]),
                "digits": len(record.trial) - 6,
                "half": record.dtype == "<f2",
                "n_phonemes": len(symbols),
                "n_labels": len(labels),
                "frames_needed": record.frames_needed,
                "n_letters": len(sentences[-1]),
                "corpus": corpora.setdefault(record.corpus, len(corpora)),
                "layout": layouts.setdefault(layout, len(layouts)),
                "n_layout_numbers": len(numbers),
            }
            for name, column in columns.items():
                column.append(row[name] if name in row else getattr(record, name))
        return cls(
            n_features,
            label_form,
            counts,
            columns,
            phonemes="".join(phonemes),
            sentences="".join(sentences),
            corpora=list(corpora),
            layouts=list(layouts),
            layout_numbers=layout_numbers,
        )

    def __len__(self) -> int:
        return len(self.n_time_steps)

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
        number, digits = self._columns["number"][row], self._columns["digits"][row]
        return f"{self._file(row).key}:trial_{number:0{digits}d}"

    def _file(self, row: int) -> FileTrials:
        return self.files[bisect_right(self._files_from, row) - 1]

    def _record(self, row: int) -> TrialRecord:
        file = self._file(row)
        numbers = {name: column[row] for name, column in self._columns.items()}
        class_ids, phoneme_ids = self._labels(row)
        letters = self._sentences[self._letters_from[row] : self._letters_from[row + 1]]
        return TrialRecord(
            session=file.session,
            split=file.split,
            key=file.key,
            trial=self.name(row).rpartition(":")[2],
            n_time_steps=numbers["n_time_steps"],
            n_features=self.n_features,
            dtype="<f2" if numbers["half"] else "<f4",
            offset=numbers["offset"],
            length=numbers["length"],
            chunks=self._chunks(row),
            crc32=numbers["crc32"],
            class_ids=class_ids,
            phoneme_ids=phoneme_ids,
            sentence_label=letters or None,
            block_num=numbers["block_num"],
            trial_num=numbers["trial_num"],
            corpus=self._corpora[numbers["corpus"]],
        )

    def _labels(self, row: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """(class ids, phoneme ids) of a trial, both None without labels."""
        import numpy as np

        from ..labels.diphones import LabelForm, encode_diphones

        first, end = self._phonemes_from[row : row + 2]
        if first == end:
            return None, None
        symbols = np.frombuffer(self._phonemes[first:end].encode(), np.uint8)
        phonemes = symbols.astype(np.int32) - _FIRST_SYMBOL
        if self.label_form == "phoneme":
            return phonemes, phonemes
        form: LabelForm = "transition" if self.label_form == "transition" else "self_loop"
        unclosed = len(phonemes) * (2 if form == "self_loop" else 1)
        return encode_diphones(phonemes, form, self.n_labels[row] > unclosed), phonemes

    def _chunks(self, row: int) -> ChunkLayout | None:
        layout = self._layouts[self._columns["layout"][row]]
        if layout is None:
            return None
        import numpy as np

        numbers = self._layout_numbers[self._numbers_from[row] : self._numbers_from[row + 1]]
        (rows, columns), filters, irregular = layout
        places = [
            (first, column)
            for first in range(0, self.n_time_steps[row], rows)
            for column in range(0, self.n_features, columns)
        ]
        table = np.zeros((len(places), 5), np.int64)
        table[:, :2] = places
        parts = np.array(numbers, np.int64).reshape(3 if irregular else 1, len(places))
        table[:, 3] = parts[0]
        gaps = 0
        if irregular:
            gaps, table[:, 4] = parts[1:]
        table[:, 2] = np.cumsum(parts[0] + gaps) - parts[0]
        return ChunkLayout((rows, columns), tuple(filters), table)

    def feature_bytes(self) -> np.ndarray:
        """[n] int64: bytes of each trial's decoded features."""
        import numpy as np

        sizes = 4 - 2 * np.asarray(self.half, np.int64)
        return sizes * self.n_features * np.asarray(self.n_time_steps)

    def fingerprint(self) -> str:
        """See `TrialManifest.fingerprint`."""
        digest = hashlib.sha256(f"{self.label_form} {self.n_features}".encode())
        for file in self.files:
            digest.update(f"{file.key} {len(file.rows)}\n".encode())
        for name in _CONTENT:
            digest.update(self._columns[name])
        digest.update(self._phonemes.encode())
        return digest.hexdigest()[:32]

    # --- as plain types for JSON ------------------------------------------------------------------

    def to_plain(self) -> dict[str, Any]:
        """The inverse of `from_plain`; which file has how many trials is not in it."""
        return {
            "numbers": {name: _text(column) for name, column in self._columns.items()},
            "phonemes": self._phonemes,
            "sentences": self._sentences,
            "corpora": self._corpora,
            "layouts": self._layouts,
            "layout_numbers": _text(self._layout_numbers),
        }

    @classmethod
    def from_plain(
        cls, plain: dict[str, Any], counts: Mapping[str, int], n_features: int, label_form: str
    ) -> TrialTable:
        """The table that `to_plain` describes; takes `plain` apart, to save memory.

        Raises:
            ValueError: its columns do not go together. Other errors: it has another structure.
        """
        texts = plain.pop("numbers")
        columns = {name: _array(kind, texts.pop(name)) for name, kind in _NUMBERS.items()}
        numbers = _array("q", plain.pop("layout_numbers"))
        return cls(n_features, label_form, counts, columns, layout_numbers=numbers, **plain)


def file_order(key: str) -> tuple[str, int]:
    """Sorts files by session and split."""
    session, split = session_and_split(key)
    return session, SPLITS.index(split)


def _starts(lengths: array[int]) -> array[int]:
    """Where each of consecutive parts begins, and where the last ends."""
    return array("Q", accumulate(lengths, initial=0))


def _text(column: array[int]) -> str:
    return b64encode(column).decode()


def _array(kind: str, text: str) -> array[int]:
    return array(kind, b64decode(text))


def _packed(chunks: ChunkLayout) -> tuple[tuple[Any, ...], list[int]]:
    """(shape, filters, irregular) and the size of each chunk; if irregular, then each one's gap
    to the chunk before, then each one's mask.

    Chunks are in row-major order of their place in the array, so their first row and column need
    not be stored.
    """
    _, _, offsets, sizes, masks = chunks.table.T.tolist()
    ends = [0, *(offset + size for offset, size in zip(offsets, sizes, strict=True))]
    gaps = [offset - end for offset, end in zip(offsets, ends, strict=False)]
    irregular = any(gaps) or any(masks)
    numbers = [*sizes, *gaps, *masks] if irregular else sizes
    return (tuple(chunks.chunk_shape), tuple(chunks.filters), irregular), numbers
