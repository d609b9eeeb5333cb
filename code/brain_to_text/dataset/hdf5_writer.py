"""Write data files of the public schema: groups of trials in HDF5, made in memory."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import h5py
import numpy as np

from ..errors import DataError

FeatureType = Literal["float32", "float16"]
FEATURE_TYPES: tuple[FeatureType, ...] = ("float32", "float16")
MAX_SEQ_ELEMENTS = 500  # length of the label arrays and of the transcription in the public schema


@dataclass(frozen=True, eq=False)
class TrialContents:
    """One trial as the schema has it; label fields are None in the test split.

    features: [T, C], z-scored. class_ids: [L] int32. phoneme_ids: [Lp] int32 in a diphone set.
    sentence: as typed; also stored as character codes where the schema's array holds them.
    """

    name: str
    session: str
    block_num: int
    trial_num: int
    features: np.ndarray
    class_ids: np.ndarray | None = None
    phoneme_ids: np.ndarray | None = None
    sentence: str | None = None


def data_file_bytes(trials: Iterable[TrialContents]) -> bytes:
    """The bytes of an HDF5 data file that holds `trials`.

    Raises:
        DataError: labels longer than the schema's arrays.
    """
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        features = {t.name: write_trial(file.create_group(t.name), t) for t in trials}
        fill_features(file, features)
    return buffer.getvalue()


def write_trial(
    group: h5py.Group, trial: TrialContents, dtype: FeatureType = "float32"
) -> np.ndarray:
    """Write a trial's attributes and labels, and make its dataset `input_features`.

    Returns:
        the features as they are to be stored, [T, C], for `fill_features`.

    Raises:
        DataError: labels longer than the schema's arrays, features that float16 cannot hold.
    """
    with np.errstate(over="ignore"):  # found below
        features = np.asarray(trial.features).astype(dtype)
    if dtype == "float16" and not np.isfinite(features).all():
        raise DataError("a feature exceeds what float16 can hold (65,504): say --dtype float32.")
    group.create_dataset("input_features", features.shape, features.dtype)
    group.attrs["n_time_steps"] = len(features)
    group.attrs["session"] = trial.session
    group.attrs["block_num"] = trial.block_num
    group.attrs["trial_num"] = trial.trial_num
    for name, length, ids in (
        ("seq_class_ids", "seq_len", trial.class_ids),
        ("seq_class_ids_phoneme", "seq_len_phoneme", trial.phoneme_ids),
    ):
        if ids is not None:
            group[name] = padded(ids)
            group.attrs[length] = len(ids)
    if trial.sentence is not None:
        if len(trial.sentence) <= MAX_SEQ_ELEMENTS:
            codes = np.frombuffer(trial.sentence.encode("utf-32-le"), np.uint32)
            group["transcription"] = padded(codes)
        group.attrs["sentence_label"] = trial.sentence
    return features


def fill_features(file: h5py.File, features: Mapping[str, np.ndarray]) -> None:
    """Write the features of all trials, by name, after everything else in the file.

    So labels lie together, and a few requests to S3 read them all.
    """
    for trial, values in features.items():
        file[trial]["input_features"][...] = values


def padded(values: np.ndarray) -> np.ndarray:
    """[500] int32 with zeros after `values`.

    Raises:
        DataError: `values` are more than the schema's arrays hold.
    """
    if len(values) > MAX_SEQ_ELEMENTS:
        raise DataError(f"{len(values)} labels do not fit into the schema's {MAX_SEQ_ELEMENTS}.")
    return np.pad(np.asarray(values, np.int32), (0, MAX_SEQ_ELEMENTS - len(values)))
