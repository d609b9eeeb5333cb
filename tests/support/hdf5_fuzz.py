"""Damage small HDF5 data files in every way, and look at them as the commands do."""

from __future__ import annotations

import io
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

KEY = "t15.2023.08.11/data_train.hdf5"
LAYOUTS: tuple[dict[str, Any], ...] = (
    {},
    {"chunks": (16, 4), "compression": "gzip", "shuffle": True},
    {"chunks": (16, 4), "compression": "lzf", "fletcher32": True},
    {"chunks": (7, 3)},
)
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


def mutations(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """`count` damaged files, each with a name that says how it came to be."""
    rng = np.random.default_rng(seed)
    bases = [small_file(layout, libver) for layout in range(4) for libver in ("earliest", "latest")]
    places = []
    for base in bases:
        signed = [i for sign in SIGNS for i in _all(base, sign)]
        after = {j for i in signed for j in range(i, min(i + 96, len(base)))}
        places.append((np.array(sorted(after | set(range(min(len(base), 1024))))), len(base)))
    kinds = ("flip", "byte", "word", "long", "run", "cut", "copy", "many")
    for number in range(count):
        which = int(rng.integers(len(bases)))
        data = bytearray(bases[which])
        near, size = places[which]
        kind = kinds[number % len(kinds)]
        at = int(rng.choice(near)) if rng.random() < 0.8 else int(rng.integers(size))
        if kind == "flip":
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == "byte":
            data[at] = int(rng.choice([0, 1, 127, 128, 254, 255, int(rng.integers(256))]))
        elif kind in ("word", "long"):
            width = 4 if kind == "word" else 8
            value = int(
                rng.choice([0, 1, 2**31 - 1, 2**32 - 1, at, size, int(rng.integers(2**32))])
            )
            value = value if rng.random() < 0.7 else value << 24
            data[at : at + width] = (value % 256**width).to_bytes(width, "little")
        elif kind == "run":
            data[at : at + int(rng.integers(2, 200))] = bytes(int(rng.integers(2, 200)))
        elif kind == "cut":
            del data[at:]
        elif kind == "copy":
            length = int(rng.integers(4, 300))
            source = int(rng.integers(size))
            data[at : at + length] = data[source : source + length]
        else:
            for place in rng.choice(near, int(rng.integers(2, 40))).tolist():
                data[place] ^= int(rng.integers(1, 256))
        yield f"{seed}/{number} {kind} at {at} of file {which}", bytes(data)


def _all(data: bytes, sign: bytes) -> Iterator[int]:
    place = data.find(sign)
    while place >= 0:
        yield place
        place = data.find(sign, place + 1)


def look_at(data: bytes) -> str:
    """What index and encode make of a file: "sound", or the first sentence about it."""
    sentences = []
    with limited(len(data)):
        inspection = inspect_file(KEY, data)
        sentences += [str(f) for f in inspection.findings if f.severity == "error"]
        for record in inspection.records:
            span = data[record.offset : record.offset + record.length]
            assert zlib.crc32(span) == record.crc32
        for exclude in (False, True):
            try:
                encoded, *_ = encode_file(KEY, data, EncodingOptions(exclude_damaged=exclude))
                inspect_file(KEY, encoded)
            except DataError as error:
                sentences.append(str(error))
    if any("\n" in sentence or not sentence.isprintable() for sentence in sentences):
        raise AssertionError(f"not one printable line: {sentences!r}")
    return sentences[0] if sentences else "sound"
