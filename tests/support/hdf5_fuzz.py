"""Damage small HDF5 data files in every way, and look at them as the commands do."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np
from brain_to_text.dataset.encoding import EncodingOptions, encode_file
from brain_to_text.dataset.hdf5_reader import inspect_file
from brain_to_text.dataset.hdf5_writer import padded
from brain_to_text.dataset.isolation import limited
from brain_to_text.errors import DataError
from brain_to_text.labels.diphones import encode_diphones

from .small_data import SESSIONS

FILE = f"{SESSIONS[0]}/data_train.hdf5"
LAYOUTS: tuple[dict[str, Any], ...] = (
    {},
    {"chunks": (16, 4), "compression": "gzip", "shuffle": True},
    {"chunks": (16, 4), "compression": "lzf", "fletcher32": True},
    {"chunks": (7, 3)},
)
# What begins a structure of HDF5.
SIGNS = (b"TREE", b"HEAP", b"SNOD", b"OHDR", b"FRHP", b"FHDB", b"BTHD", b"GCOL", b"OCHK", b"BTLF")


def small_file(layout: int, libver: str) -> bytes:
    """Three trials of 40 bins × 4 features, with labels, as one file."""
    buffer = io.BytesIO()
    rng = np.random.default_rng(layout)
    with h5py.File(buffer, "w", libver=libver) as file:
        for number in range(3):
            group = file.create_group(f"trial_{number:04d}")
            features = rng.standard_normal((40, 4)).astype(np.float32)
            group.create_dataset("input_features", data=features, **LAYOUTS[layout])
            phonemes = rng.integers(1, 41, 3).astype(np.int32)
            labels = encode_diphones(phonemes)
            group["seq_class_ids"] = padded(labels)[:40]
            group["seq_class_ids_phoneme"] = padded(phonemes)[:40]
            group["transcription"] = np.frombuffer(b"hello you\0\0\0", np.uint8).astype(np.int32)
            group.attrs.update(
                n_time_steps=40,
                seq_len=len(labels),
                seq_len_phoneme=3,
                block_num=1,
                trial_num=number,
                session="t15.2023.08.11",
                sentence_label="hello you",
            )
    return buffer.getvalue()


def mutations(seed: int, count: int) -> Iterator[bytes]:
    """Damaged files: mostly a few bytes in the structures of HDF5 itself."""
    rng = np.random.default_rng(seed)
    bases = [small_file(layout, libver) for layout in range(4) for libver in ("earliest", "latest")]
    structures = [
        [i for sign in SIGNS for found in re.finditer(sign, base) for i in range(*found.span())]
        for base in bases
    ]
    for number in range(count):
        which = int(rng.integers(len(bases)))
        data = bytearray(bases[which])
        near = int(rng.choice(structures[which])) + int(rng.integers(96))
        at = near if rng.random() < 0.8 else int(rng.integers(len(data)))
        length = int(rng.integers(1, 200))
        if number % 4 == 0:
            data[at : at + 1] = bytes([int(rng.integers(256))])
        elif number % 4 == 1:
            data[at : at + 8] = int(rng.integers(2**32) << rng.integers(32)).to_bytes(8, "little")
        elif number % 4 == 2:
            source = int(rng.integers(len(data)))
            data[at : at + length] = data[source : source + length]
        else:
            data[at:] = data[at + length :] if rng.random() < 0.5 else b""
        yield bytes(data)


def moved(layout: int, libver: str, source: int, length: int, place: int) -> bytes:
    """A small file, `length` of whose bytes stand at another place, too."""
    data = bytearray(small_file(layout, libver))
    data[place : place + length] = data[source : source + length]
    return bytes(data)


def hanging_file() -> bytes:
    """A file that HDF5 does not stop reading."""
    return moved(1, "latest", 438, 130, 3060)


def crashing_file() -> bytes:
    """A file on which HDF5 crashes."""
    return moved(2, "earliest", 177, 42, 13016)


def look_at(data: bytes) -> str:
    """What index and encode make of a file: "sound", or the first sentence about it."""
    with limited(len(data)):
        inspection = inspect_file(FILE, data)
        sentences = [str(f) for f in inspection.findings if f.severity == "error"]
        for record in inspection.records:
            span = data[record.offset : record.offset + record.length]
            assert zlib.crc32(span) == record.crc32
        try:
            encoded, *_ = encode_file(FILE, data, EncodingOptions(exclude_damaged=True))
            inspect_file(FILE, encoded)
        except DataError as error:
            sentences.append(str(error))
    assert all(sentence.isprintable() for sentence in sentences), sentences
    return sentences[0] if sentences else "sound"
