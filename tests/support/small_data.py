"""Small datasets with every kind of label and layout, for tests that look at the files."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from brain_to_text.dataset.hdf5_writer import TrialContents, data_file_bytes
from brain_to_text.dataset.trial_record import TrialRecord
from brain_to_text.labels.diphones import LabelForm, encode_diphones
from brain_to_text.labels.phonemes import phoneme_ids
from brain_to_text.storage.store import ObjectStore

LAYOUTS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "chunked": {"chunks": (32, 16)},
    "gzip": {"chunks": (32, 16), "compression": "gzip", "compression_opts": 1, "shuffle": True},
    "lzf": {"chunks": (32, 16), "compression": "lzf"},
}
WORDS = (
    {"we": "W IY", "you": "Y UW", "they": "DH EY"},
    {"go": "G OW", "see": "S IY", "say": "S EY", "know": "N OW"},
)
SESSIONS = ("t15.2023.08.11", "t15.2023.08.13")
N_FEATURES = 6


def small_trial(
    session: str,
    index: int,
    seed: int,
    *,
    form: LabelForm | None = "self_loop",
    split: str = "train",
) -> TrialContents:
    """A trial with long enough features for its few labels; form None gives phoneme labels."""
    rng = np.random.default_rng(seed)
    chosen = [list(words)[seed % len(words)] for words in WORDS]
    spoken = " ".join(f"{words[word]} |" for words, word in zip(WORDS, chosen, strict=True))
    phonemes = phoneme_ids(spoken.split())
    features = rng.standard_normal((90 + 7 * index, N_FEATURES)).astype(np.float32)
    block = {"train": 2, "val": 8, "test": 9}[split]
    trial = TrialContents(f"trial_{index:04d}", session, block, index, features)
    if split == "test":
        return trial
    return replace(
        trial,
        class_ids=phonemes if form is None else encode_diphones(phonemes, form),
        phoneme_ids=None if form is None else phonemes,
        sentence=" ".join(chosen),
    )


def write_small_dataset(
    folder: Path,
    *,
    form: LabelForm | None = "self_loop",
    layout: str = "contiguous",
) -> dict[str, np.ndarray]:
    """Two sessions with train and val, the second with test too; returns features by trial name."""
    features: dict[str, np.ndarray] = {}
    for s, session in enumerate(SESSIONS):
        for p, split in enumerate(("train", "val", "test")):
            if split == "test" and s == 0:
                continue
            contents = [
                small_trial(session, i, 100 * s + 10 * p + i, form=form, split=split)
                for i in range(3)
            ]
            key = f"{session}/data_{split}.hdf5"
            (folder / session).mkdir(parents=True, exist_ok=True)
            (folder / key).write_bytes(laid_out(data_file_bytes(contents), layout))
            features |= {f"{key}:{trial.name}": trial.features for trial in contents}
    return features


def laid_out(data: bytes, layout: str, dtype: str = "<f4") -> bytes:
    """The same data file with features of another type and in another of `LAYOUTS`."""
    if (layout, dtype) == ("contiguous", "<f4"):
        return data
    buffer = io.BytesIO(data)
    with h5py.File(buffer, "r+") as file:
        for trial in file.values():
            features = trial.pop("input_features")[:].astype(dtype)
            options = dict(LAYOUTS[layout])
            if options:
                options["chunks"] = (32, min(16, features.shape[1]))
            trial.create_dataset("input_features", data=features, **options)
    return buffer.getvalue()


def span_of(store: ObjectStore, trial: TrialRecord) -> bytes:
    """The bytes that a trial's one ranged GET would read."""
    return store.read(trial.key)[trial.offset : trial.offset + trial.length]
