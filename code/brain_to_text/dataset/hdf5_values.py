"""What stands under a name in HDF5, however h5py, MATLAB, pandas or HDFView wrote it."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from importlib import import_module
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
_MOST_LINKS = 16  # soft links followed one after the other, as HDF5 does
# Registered numbers of the filters that the package hdf5plugin brings.
_HDF5PLUGIN = {
    307: "bzip2",
    32001: "blosc",
    32004: "lz4",
    32008: "bitshuffle",
    32013: "zfp",
    32015: "zstd",
    32017: "sz",
    32018: "fcidecomp",
    32024: "sz3",
    32026: "blosc2",
    32028: "sperr",
}


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
        DataError: it is missing, something else, kept in another file, or compressed by a filter
            that is not installed.
    """
    refuse_external_link(group, name)
    if name not in group:
        raise DataError(f"dataset {name} is missing")
    dataset = group[name]
    if not isinstance(dataset, h5py.Dataset):
        raise DataError(f"{name} is not a dataset")
    if dataset.shape is None:
        raise DataError(f"dataset {name} is missing: it holds no value")
    _refuse_missing_filter(dataset, name)
    return dataset


def refuse_external_link(group: h5py.Group, path: str | bytes) -> None:
    """Check that no step of a path from `group` leads into another file, soft links followed.

    A file that is read from memory has no folder: HDF5 would follow such a link into the file
    itself, and find another trial's values there.

    Raises:
        DataError: names the link, and the file and the object it leads to.
    """
    steps, followed = _steps(path), 0
    while steps:
        step = steps.pop(0)
        if not isinstance(group, h5py.Group) or not group.id.links.exists(step):
            return
        kind = group.id.links.get_info(step).type
        if kind == h5py.h5l.TYPE_EXTERNAL:
            file, target = group.id.links.get_val(step)
            raise DataError(
                f"{printable(step)} is a link to {printable(target)} in another file, "
                f"{printable(file)}: copy the values into this file"
            )
        if kind == h5py.h5l.TYPE_SOFT and followed < _MOST_LINKS:
            followed += 1
            target = group.id.links.get_val(step)
            group = group.file if target.startswith(b"/") else group
            steps = _steps(target) + steps
        elif steps:
            group = group[step]


def _steps(path: str | bytes) -> list[bytes]:
    whole = path.encode() if isinstance(path, str) else path
    return [step for step in whole.split(b"/") if step not in (b"", b".")]


def _refuse_missing_filter(dataset: h5py.Dataset, name: str) -> None:
    with suppress(ImportError):
        import_module("hdf5plugin")  # where it is installed, it registers its filters
    for number, label in filters_of(dataset):
        if not h5py.h5z.filter_avail(number):
            way = (
                "type 'pip install hdf5plugin'"
                if number in _HDF5PLUGIN
                else "set HDF5_PLUGIN_PATH to the folder that has the filter"
            )
            called = _HDF5PLUGIN.get(number, printable(label)) or "without a name"
            raise DataError(
                f"{name} is compressed by HDF5 filter {number} ({called}), which is not installed: "
                f"{way}, then rewrite the file with 'python code/prepare_dataset.py encode'"
            )


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
