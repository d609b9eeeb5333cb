"""One trial at rest: where its features lie in its file, how to decode them, and its labels."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import uuid4

from ..errors import DataError

if TYPE_CHECKING:
    import numpy as np

# Filters of HDF5 that `TrialRecord.decode` undoes, by their registered number.
HDF5_FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 32000: "lzf"}


@dataclass(frozen=True, eq=False, slots=True)
class ChunkLayout:
    """How a chunked dataset lies inside its byte span.

    chunk_shape: rows (time bins) and columns (features) of one chunk.
    filters: names from HDF5_FILTERS in the order in which they were applied.
    table: [n_chunks, 5] int64: first row, first column, offset in the span, bytes, filter mask
        (bit i set: filter i was skipped for this chunk).
    """

    chunk_shape: tuple[int, int]
    filters: tuple[str, ...]
    table: np.ndarray


@dataclass(frozen=True, eq=False, slots=True)
class TrialRecord:
    """Everything a training job needs to know about a trial without opening its file.

    n_time_steps: 20 ms bins T. n_features: C. dtype: "<f4" or "<f2".
    offset, length: the byte span of `input_features` in the file; one ranged GET reads it.
    crc32: CRC-32 of the span's bytes as stored.
    class_ids: [L] int32 labels, None in the test split. phoneme_ids: [Lp] int32, likewise.
    """

    session: str
    split: str
    key: str
    trial: str
    n_time_steps: int
    n_features: int
    dtype: str
    offset: int
    length: int
    chunks: ChunkLayout | None = None
    crc32: int = 0
    class_ids: np.ndarray | None = None
    phoneme_ids: np.ndarray | None = None
    sentence_label: str | None = None
    block_num: int = 0
    trial_num: int = 0
    corpus: str | None = None

    @property
    def name(self) -> str:
        """File and trial, as error messages and tables show it."""
        return f"{self.key}:{self.trial}"

    @property
    def feature_bytes(self) -> int:
        """Bytes of the decoded features."""
        return self.n_time_steps * self.n_features * (2 if self.dtype == "<f2" else 4)

    @property
    def frames_needed(self) -> int:
        """Frames that CTC needs: one per label, and a blank between equal ones; 0 if unlabelled."""
        labels = self.class_ids
        if labels is None:
            return 0
        return len(labels) + int((labels[1:] == labels[:-1]).sum())

    @property
    def stored_bytes(self) -> int:
        """Bytes of the features as stored: the span without what lies between its chunks."""
        return self.length if self.chunks is None else int(self.chunks.table[:, 3].sum())

    def pieces(self) -> list[tuple[int, int]]:
        """Where each run of the features' bytes begins and ends in the file."""
        if self.chunks is None:
            return [(self.offset, self.offset + self.length)]
        starts = self.chunks.table[:, 2] + self.offset
        ends = starts + self.chunks.table[:, 3]
        return list(zip(starts.tolist(), ends.tolist(), strict=True))

    def decode(self, span: bytes | memoryview) -> np.ndarray:
        """Features [T, C] in the stored dtype, read-only, from the bytes of the span.

        Raises:
            DataError: the bytes are too few or cannot be decompressed.
        """
        import numpy as np

        if len(span) != self.length:
            raise DataError(f"{self.name}: {len(span):,} bytes instead of {self.length:,}.")
        if self.chunks is None:
            features = np.frombuffer(span, dtype=self.dtype).reshape(
                self.n_time_steps, self.n_features
            )
        else:
            features = self._decode_chunks(memoryview(span), self.chunks)
        features.flags.writeable = False
        return features

    def _decode_chunks(self, span: memoryview, chunks: ChunkLayout) -> np.ndarray:
        import numpy as np

        rows, columns = chunks.chunk_shape
        dtype = np.dtype(self.dtype)
        features = np.empty((self.n_time_steps, self.n_features), dtype)
        for row, column, offset, size, mask in chunks.table.tolist():
            applied = [name for bit, name in enumerate(chunks.filters) if not mask >> bit & 1]
            raw: bytes | memoryview = span[offset : offset + size]
            try:
                for name in reversed(applied):
                    raw = _undo(name, raw, dtype.itemsize, rows * columns * dtype.itemsize)
                block = np.frombuffer(raw, dtype).reshape(rows, columns)
            except (zlib.error, OSError, RuntimeError, ValueError) as error:
                raise DataError(
                    f"{self.name}: the chunk at bin {row} cannot be decompressed ({error}); write "
                    "or upload the file again."
                ) from error
            part = features[row : row + rows, column : column + columns]
            part[:] = block[: part.shape[0], : part.shape[1]]
        return features


def _undo(name: str, raw: bytes | memoryview, itemsize: int, size: int) -> bytes | memoryview:
    """What one of `HDF5_FILTERS` was applied to; `size` is that of the whole chunk, in bytes."""
    import numpy as np

    if name == "gzip":
        return zlib.decompress(raw, bufsize=size)
    if name == "lzf":
        return _inflate_lzf(bytes(raw), size)
    if name == "fletcher32":
        return raw[:-4]  # the manifest's CRC-32 has covered these bytes already
    planes = np.frombuffer(raw, np.uint8).reshape(itemsize, -1)  # of "shuffle"
    whole = np.empty((planes.shape[1], itemsize), np.uint8)
    for byte, plane in enumerate(planes):  # five times faster than planes.T
        whole[:, byte] = plane
    return whole.reshape(-1).data


def _inflate_lzf(raw: bytes, size: int) -> bytes:
    """Let HDF5 undo LZF: hand it the stored bytes in a file that exists only in memory."""
    import h5py
    import numpy as np

    with h5py.File(f"{uuid4()}", "w", driver="core", backing_store=False) as file:
        dataset = file.create_dataset("raw", (size,), np.uint8, chunks=(size,), compression="lzf")
        dataset.id.write_direct_chunk((0,), raw)
        return dataset[:].tobytes()
