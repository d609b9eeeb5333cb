"""What stands under a name in HDF5, however h5py, MATLAB, pandas or HDFView wrote it."""

from __future__ import annotations

import math
import re
from typing import Any

import h5py
import numpy as np

from ..errors import DataError
from ..redaction import one_line
from .trial_record import HDF5_FILTERS, MOST_INFLATED

# What h5py raises on damaged bytes, depending on where the damage is.
HDF5_ERRORS = (
    *(OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError),
    *(ArithmeticError, AssertionError, MemoryError, SystemError),
)
MOST_LABELS = 100_000  # elements of a label array; the schema has 500
_MOST_ATTRIBUTE_BYTES = 2**20


def read_number(holder: h5py.Group, name: str) -> int | None:
    """A whole number, however it is stored; None if it is absent or empty.

    Raises:
        DataError: it is something else.
    """
    value = _attribute(holder, name)
    array = np.asarray(value)
    if value is None or not array.size:
        return None
    if array.dtype.kind in "SUO" and array.size == 1:
        text = text_of(value, f"attribute {name}")
        if text and re.fullmatch(r"[+-]?[0-9]{1,18}", text):
            return int(text)
    number = array.reshape(-1)[0]
    if array.size != 1 or array.dtype.kind not in "iuf" or number % 1 or abs(int(number)) >= 2**62:
        raise DataError(f"attribute {name} is {value!r}, not a whole number")
    return int(number)


def read_text(holder: h5py.Group, name: str) -> str | None:
    """A text, stored as text, bytes, padded, alone in an array or letter by letter; None if empty.

    Raises:
        DataError: it is something else, or not UTF-8.
    """
    value = _attribute(holder, name)
    if value is None or (isinstance(value, float) and math.isnan(value)):  # pandas' missing text
        return None
    return text_of(value, f"attribute {name}") or None


def read_dataset(group: h5py.Group, name: str) -> h5py.Dataset:
    """A dataset of a trial; one without any value counts as missing.

    Raises:
        DataError: it is missing or something else.
    """
    if name not in group:
        raise DataError(f"dataset {name} is missing")
    dataset = group[name]
    if not isinstance(dataset, h5py.Dataset):
        raise DataError(f"{name} is not a dataset")
    if dataset.shape is None:
        raise DataError(f"dataset {name} is missing: it holds no value")
    return dataset


def _attribute(holder: h5py.Group, name: str) -> Any:
    """Its value as h5py gives it; None if it is absent or has none."""
    if name not in holder.attrs:
        return None
    stored = holder.attrs.get_id(name)
    n_values = stored.get_space().get_simple_extent_npoints()
    if n_values * stored.get_type().get_size() > _MOST_ATTRIBUTE_BYTES:
        raise DataError(f"attribute {name} is larger than a megabyte")
    value = holder.attrs[name]
    return None if isinstance(value, h5py.Empty) else value


def text_of(value: Any, what: str) -> str:
    """The text that `value`, as h5py gives it, stands for; see `read_text`."""
    parts = np.asarray(value).reshape(-1).tolist()
    try:
        if all(isinstance(part, int) for part in parts) and len(parts) > 1:  # character codes
            whole = "".join(map(chr, parts))
        else:
            texts = [p.decode() if isinstance(p, bytes) else p for p in parts]
            if not all(isinstance(t, str) for t in texts):
                raise DataError(f"{what} is {value!r}, not a text")
            if len(texts) > 1 and any(len(t) > 1 for t in texts):
                raise DataError(f"{what} holds {len(texts)} texts, not one")
            whole = "".join(texts)
        whole.encode()
    except (ValueError, OverflowError) as error:
        raise DataError(f"{what} is not UTF-8 text: save it as such") from error
    return whole.partition("\0")[0].strip()


def printable(name: str | bytes) -> str:
    """A name as h5py gives it (bytes where it is not UTF-8), for one line."""
    return one_line(name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name)


def cause_of(error: BaseException) -> str:
    """What an exception says, on one line."""
    return " ".join(one_line(str(error)).split()) or type(error).__name__


def check_stored(dataset: h5py.Dataset, what: str) -> list[Any]:
    """Check that every value of a dataset is really in this file, so that none is made up.

    HDF5 reads values that were never written, or whose file is elsewhere, as zeros. Returns where
    its chunks are.

    Raises:
        DataError: some are not, or it claims more values than its bytes can hold.
    """
    if dataset.is_virtual or dataset.external:
        raise DataError(
            f"{what} lies in other files ({'virtual' if dataset.is_virtual else 'external'}): copy "
            "the values into this one where they can be read"
        )
    stored = dataset.id.get_storage_size()
    chunks: list[Any] = []
    if dataset.chunks is not None:
        sizes = zip(dataset.shape, dataset.chunks, strict=True)
        expected = math.prod(-(-size // chunk) for size, chunk in sizes)
        dataset.id.chunk_iter(chunks.append)
        if len(chunks) != expected:
            raise DataError(
                f"{what} has {len(chunks)} of its {expected} chunks: the others were never "
                "written, so record or copy it again"
            )
        numbers = {number for number, _ in filters_of(dataset)}
        packed, foreign = numbers & {1, 32000}, numbers - HDF5_FILTERS.keys()
        if not foreign and dataset.nbytes > stored * (MOST_INFLATED if packed else 1):
            raise DataError(
                f"{what} claims {dataset.nbytes:,} bytes, which its {stored:,} stored bytes cannot "
                "hold"
            )
    elif not stored and dataset.nbytes:
        raise DataError(f"{what} was never written: record or copy it again")
    elif stored != dataset.nbytes:
        raise DataError(f"{what} has {stored:,} of its {dataset.nbytes:,} bytes: copy it again")
    return chunks


def filters_of(dataset: h5py.Dataset) -> list[tuple[int, str]]:
    """(registered number, label) of its filters, in the order in which they were applied."""
    plist = dataset.id.get_create_plist()
    filters = [plist.get_filter(index) for index in range(plist.get_nfilters())]
    return [(number, label.decode(errors="replace")) for number, _, _, label in filters]
