"""What a data file holds apart from features, in a few bytes: whether its labels are still those
that were indexed.

Features are checked trial by trial, when they are read. All else in a file (labels, sentences,
HDF5's headers) is small: its sum tells, wherever the file was copied to and whoever copied it.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass

from ..storage.store import ObjectStore
from .trial_record import TrialRecord

_PART = 8 << 20  # of an upload by the AWS command line and boto3
_NEAR = 1 << 16  # bytes between two reads that are cheaper to read than to skip


@dataclass(frozen=True)
class FileContent:
    """What tells a data file from another of the same size.

    labels_crc32: of all bytes that are not features, and what lies close between; None where the
        manifest leaves out some of the file's sound trials.
    s3_etag: the file's after an upload as the AWS command line and boto3 make it; other programs
        take parts of other sizes, and under a KMS key ETags are no sums.
    """

    labels_crc32: int | None = None
    s3_etag: str | None = None


def content_of(data: bytes, records: Iterable[TrialRecord]) -> FileContent:
    """The content of a whole file, whose sound trials are `records`."""
    crc = 0
    for first, end in _label_ranges(records, len(data)):
        crc = zlib.crc32(memoryview(data)[first:end], crc)
    return FileContent(crc, _s3_etag(data))


def labels_crc32(
    store: ObjectStore, key: str, size: int, records: Iterable[TrialRecord], threads: Executor
) -> int:
    """`FileContent.labels_crc32` of a file as it lies there now, by ranged reads.

    Raises:
        StorageError: it cannot be read.
    """
    crc = 0
    ranges = _label_ranges(records, size)
    for part in threads.map(lambda span: store.read(key, span[0], span[1] - span[0]), ranges):
        crc = zlib.crc32(part, crc)
    return crc


def _label_ranges(records: Iterable[TrialRecord], size: int) -> Iterator[tuple[int, int]]:
    """First byte and end of everything that is not features, near ones as one."""
    features = sorted(run for record in records for run in record.pieces())
    first = end = 0  # of the range that may still grow
    at = 0
    for start, stop in (*features, (size, size)):
        if start > at:
            if at - end > _NEAR:
                if end > first:
                    yield first, end
                first = at
            end = start
        at = max(at, stop)
    if end > first:
        yield first, end


def _s3_etag(data: bytes) -> str:
    def md5(part: bytes | memoryview) -> hashlib._Hash:
        return hashlib.md5(part, usedforsecurity=False)

    if len(data) <= _PART:
        return md5(data).hexdigest()
    whole = memoryview(data)
    parts = [md5(whole[at : at + _PART]).digest() for at in range(0, len(data), _PART)]
    return f"{md5(b''.join(parts)).hexdigest()}-{len(parts)}"
