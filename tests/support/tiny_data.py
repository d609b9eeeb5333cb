"""Small HDF5 datasets in the public schema: random features, valid labels, any layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
from brain_to_text.dataset.hdf5_writer import TrialContents, data_file_bytes
from brain_to_text.labels.diphones import encode_diphones

from .small_data import laid_out

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
            made = []
            for number in range(count):
                name, shape = f"trial_{number:04d}", (int(rng.integers(*bins)), n_features)
                features = (scale * rng.standard_normal(shape)).astype(dtype)
                phonemes = rng.integers(1, 40, size=int(rng.integers(2, 6))).astype(np.int32)
                trial = TrialContents(name, session, 1 + number // 4, number, features)
                labels = encode_diphones(phonemes)
                made.append(
                    replace(trial, class_ids=labels, phoneme_ids=phonemes, sentence="hello world")
                )
                written[f"{key}:{name}"] = features
            (folder / session).mkdir(parents=True, exist_ok=True)
            (folder / key).write_bytes(laid_out(data_file_bytes(made), layout, dtype))
    return written


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
