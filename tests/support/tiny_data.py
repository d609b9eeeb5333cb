"""Small HDF5 datasets in the public schema: random features, valid labels, any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
from brain_to_text.labels.diphones import encode_diphones

LAYOUTS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "chunked": {"chunks": (32, 16)},
    "gzip": {"chunks": (32, 16), "compression": "gzip", "compression_opts": 1, "shuffle": True},
    "lzf": {"chunks": (32, 16), "compression": "lzf"},
}

# Settings of a decoder that fits datasets with 16 features, in both senses.
TINY_DECODER = {
    "neural_dim": 16,
    "n_input_features": 16,
    "input_layer_sizes": "[16]",
    "n_units": 16,
    "n_layers": 2,
    "n_classes": 1681,
    "batch_size": 4,
    "days_per_batch": 2,
}


def write_dataset(
    folder: Path,
    sessions: tuple[str, ...] = ("t15.2023.08.11", "t15.2023.08.13", "t15.2023.08.18"),
    trials: dict[str, int] | None = None,
    *,
    n_features: int = 32,
    bins: tuple[int, int] = (40, 160),
    layout: str = "contiguous",
    dtype: str = "<f4",
    seed: int = 0,
    scale: float = 1.0,
) -> dict[str, np.ndarray]:
    """Write SESSION/data_{train,val}.hdf5 under `folder`.

    Args:
        scale: of the features; gzip makes next to nothing of zeros.

    Returns:
        Features by trial name ("SESSION/data_train.hdf5:trial_0000").
    """
    rng = np.random.default_rng(seed)
    written = {}
    for session in sessions:
        for split, count in (trials or {"train": 8, "val": 3}).items():
            key = f"{session}/data_{split}.hdf5"
            path = folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(path, "w") as file:
                for number in range(count):
                    name = f"trial_{number:04d}"
                    n_bins = int(rng.integers(*bins))
                    features = (scale * rng.standard_normal((n_bins, n_features))).astype(dtype)
                    _write_trial(file.create_group(name), features, session, number, layout, rng)
                    written[f"{key}:{name}"] = features
    return written


def _write_trial(
    group: h5py.Group,
    features: np.ndarray,
    session: str,
    number: int,
    layout: str,
    rng: np.random.Generator,
) -> None:
    group.create_dataset("input_features", data=features, **LAYOUTS[layout])
    phonemes = rng.integers(1, 40, size=int(rng.integers(2, 6))).astype(np.int32)
    diphones = encode_diphones(phonemes)
    for name, values in (("seq_class_ids_phoneme", phonemes), ("seq_class_ids", diphones)):
        padded = np.zeros(500, np.int32)
        padded[: len(values)] = values
        group.create_dataset(name, data=padded)
    group.create_dataset("transcription", data=np.zeros(500, np.int32))
    group.attrs["n_time_steps"] = len(features)
    group.attrs["seq_len"] = len(diphones)
    group.attrs["seq_len_phoneme"] = len(phonemes)
    group.attrs["block_num"] = 1 + number // 4
    group.attrs["trial_num"] = number
    group.attrs["session"] = session
    group.attrs["sentence_label"] = "hello world"


def append_in_turns(path: Path) -> None:
    """Rewrite a data file as a recorder would that appends 32 bins to each trial in turn."""
    rows = 32
    with h5py.File(path) as file:
        features = {name: trial["input_features"][:] for name, trial in file.items()}
    with h5py.File(path, "r+") as file:
        for name, values in features.items():
            del file[name]["input_features"]
            file[name].create_dataset(
                "input_features",
                (0, values.shape[1]),
                values.dtype,
                maxshape=(None, values.shape[1]),
                chunks=(rows, values.shape[1]),
            )
        for start in range(0, max(map(len, features.values())), rows):
            for name, values in features.items():
                part = values[start : start + rows]
                dataset = file[name]["input_features"]
                dataset.resize(len(dataset) + len(part), axis=0)
                if len(part):
                    dataset[-len(part) :] = part
