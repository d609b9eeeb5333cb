"""What stands under a name in HDF5, however h5py, MATLAB, pandas or HDFView wrote it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

import h5py
import numpy as np

from ..errors import DataError, short_repr
from ..redaction import one_line

with suppress(ImportError):
    import_module("hdf5plugin")  # where it is installed, it registers its filters

# What h5py raises on damaged bytes, depending on where the damage is.
HDF5_ERRORS = (
    *(OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError),
    *(ArithmeticError, AssertionError, MemoryError, SystemError),
)


@contextmanager
def refusing_damage(what: str) -> Iterator[None]:
    """Turn whatever h5py raises into a DataError that begins with `what`."""
    try:
        yield
    except HDF5_ERRORS as error:
        raise DataError(f"{what} ({cause_of(error)})") from error


def read_number(holder: h5py.Group, name: str) -> int | None:
    """A whole number, however it is stored; None if it is absent or empty.

    Raises:
        DataError: it is something else.
    """
    values = _attribute(holder, name)
    if values is None or not values.size:
        return None
    try:
        if values.size > 1 or values.dtype.kind not in "iufSUO":
            raise ValueError
        value = values.item()
        number = int(value)
        if (isinstance(value, float) and number != value) or abs(number) >= 2**62:
            raise ValueError
    except (ValueError, TypeError, OverflowError) as error:
        shown = short_repr(holder.attrs[name])
        raise DataError(f"attribute {name} is {shown}, not a whole number") from error
    return number


def read_text(holder: h5py.Group, name: str) -> str | None:
    """A text, stored as text, bytes, padded, alone in an array or letter by letter; None if empty.

    Raises:
        DataError: it is something else, or not UTF-8.
    """
    values = _attribute(holder, name)
    if values is None or (values.dtype.kind == "f" and np.isnan(values).all()):
        return None  # NaN is the missing text of pandas
    return text_of(values, f"attribute {name}") or None


def _attribute(holder: h5py.Group, name: str) -> np.ndarray | None:
    value = holder.attrs.get(name)
    return None if value is None or isinstance(value, h5py.Empty) else np.asarray(value)


def text_of(value: Any, what: str) -> str:
    """The text that `value`, as h5py gives it, stands for; see `read_text`."""
    parts = np.asarray(value).reshape(-1).tolist()
    codes = len(parts) > 1 and all(isinstance(part, int) for part in parts)
    try:
        letters = map(chr, parts) if codes else parts
        texts = [p.decode() if isinstance(p, bytes) else p for p in letters]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"{what} is {short_repr(value)}, not a text")
        if len(texts) > 1 and max(map(len, texts)) > 1:
            raise DataError(f"{what} holds {len(texts)} texts, not one")
        whole = "".join(texts)
        whole.encode()
    except (ValueError, OverflowError) as error:
        raise DataError(f"{what} is not UTF-8 text: save it as such") from error
    return whole.partition("\0")[0].strip()


def has_member(group: h5py.Group, name: str) -> bool:
    """Whether there is something under a name, if only a link that leads nowhere."""
    return bool(group.id.links.exists(name.encode()))


def open_member(group: h5py.Group, name: str | bytes) -> Any:
    """The object under a name, in the same file.

    A file that is read from memory has no folder: HDF5 follows a link into another file into this
    one, and finds another trial's values there.

    Raises:
        DataError: a link leads into another file; names that file. KeyError: there is no object.
    """
    link = group.get(name, getlink=True)
    elsewhere = link.filename if isinstance(link, h5py.ExternalLink) else None
    if elsewhere is None:  # a soft link may still lead to one into another file
        found = group[name]
        if h5py.h5o.get_info(found.id).fileno == h5py.h5o.get_info(group.id).fileno:
            return found
        elsewhere = found.file.filename
    raise DataError(
        f"{printable(name)} is a link into another file, {printable(elsewhere)}: copy the values "
        "into this file"
    )


def read_dataset(group: h5py.Group, name: str) -> h5py.Dataset:
    """A dataset of a trial; one without any value counts as missing.

    Raises:
        DataError: it is missing, something else, in another file, or compressed by a filter that
            is not installed.
    """
    if not has_member(group, name):
        raise DataError(f"dataset {name} is missing")
    dataset = open_member(group, name)
    if not isinstance(dataset, h5py.Dataset):
        raise DataError(f"{name} is not a dataset")
    if dataset.shape is None:
        raise DataError(f"dataset {name} is missing: it holds no value")
    for number, label in filters_of(dataset):
        if not h5py.h5z.filter_avail(number):
            raise DataError(
                f"{name} is compressed by HDF5 filter {number} ({label or 'without a name'}), which"
                " is not installed: type 'pip install hdf5plugin', or set HDF5_PLUGIN_PATH to the "
                "folder that has it, then rewrite the file with 'python code/prepare_dataset.py "
                "encode'"
            )
    return dataset


def stored_chunks(dataset: h5py.Dataset) -> list[list[int]]:
    """Where the values of a dataset [T, C] lie in this file, all of them, so that none is made up.

    HDF5 reads values that were never written, or whose file is elsewhere, as zeros.

    Returns:
        for each chunk its first row and column, first byte, bytes, and filter mask; one for a
        dataset without chunks, none where HDF5 does not tell (compact layout).

    Raises:
        DataError: some values are not there.
    """
    name = dataset.name.rpartition("/")[2]
    if dataset.is_virtual or dataset.external:
        raise DataError(
            f"{name} lies in other files ({'virtual' if dataset.is_virtual else 'external'}): copy "
            "the values into this one where they can be read"
        )
    stored = dataset.id.get_storage_size()
    if dataset.chunks is not None:
        found: list[Any] = []
        dataset.id.chunk_iter(found.append)
        sizes = zip(dataset.shape, dataset.chunks, strict=True)
        expected = math.prod(-(-size // chunk) for size, chunk in sizes)
        if len(found) != expected:
            raise DataError(
                f"{name} has {len(found)} of its {expected} chunks: the others were never written, "
                "so record or copy it again"
            )
        return sorted([*c.chunk_offset, c.byte_offset, c.size, c.filter_mask] for c in found)
    if not stored and dataset.nbytes:
        raise DataError(f"{name} was never written: record or copy it again")
    if stored != dataset.nbytes:
        raise DataError(f"{name} has {stored:,} of its {dataset.nbytes:,} bytes: copy it again")
    start = dataset.id.get_offset()
    return [] if start is None else [[0, 0, start, stored, 0]]


def filters_of(dataset: h5py.Dataset) -> list[tuple[int, str]]:
    """(registered number, label) of its filters, in the order in which they were applied."""
    plist = dataset.id.get_create_plist()
    filters = [plist.get_filter(index) for index in range(plist.get_nfilters())]
    return [(number, printable(label)) for number, _, _, label in filters]


def printable(name: str | bytes) -> str:
    """A name as h5py gives it (bytes where it is not UTF-8), for one line."""
    return one_line(name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name)


def cause_of(error: BaseException) -> str:
    """What an exception says, on one line."""
    return " ".join(one_line(str(error)).split()) or type(error).__name__
