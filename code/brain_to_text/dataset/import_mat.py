"""Read the 2024 benchmark's MATLAB files (participant T12) into a dataset of the public schema.

Willett et al., "A high-performance speech neuroprosthesis", Nature 620, 2023; the files of the
Brain-to-Text Benchmark '24: train, test and competitionHoldOut, one .mat per session, each with
sentenceText, blockIdx, tx1 … tx4 (threshold crossings) and spikePow, 20 ms bins. As the
benchmark's baseline does, the first 128 channels (area 6v) of tx1 and spikePow are taken, 256
features in all, z-scored over each block.
"""

from __future__ import annotations

import io
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from ..errors import ConfigError, DataError
from ..storage.store import ObjectStore, open_store
from .encoding import EncodingOptions, Execution, encode_files
from .hdf5_values import cause_of, text_of
from .hdf5_writer import TrialContents, data_file_bytes
from .isolation import limited
from .manifest import TrialManifest

SPLITS = {"train": "train", "test": "val", "competitionHoldOut": "test"}  # the baseline's use
_SESSION = re.compile(r"[A-Za-z0-9]+(\.\d+)+")
_FIRST_NUMBER = {"train": 0, "val": 1000, "test": 2000}  # so that a session's trials differ
_CHANNELS = 128
_LEAST_STD = 1e-8  # added to deviations, as the baseline does


def import_mat(
    folder: str, target: ObjectStore, options: EncodingOptions, **how: Unpack[Execution]
) -> TrialManifest:
    """Write every session of the benchmark's `folder` to `target`, and a manifest.

    Trials of train and test must have a sentence, from which their labels are made; those of
    competitionHoldOut become the test split, labelled only where they have one.

    Args:
        options: form, lexicon and exclude_damaged count; labels are from text.
        how: see `encode_files`.

    Raises:
        DataError: no such files, damage, words that nobody can pronounce.
        StorageError: folder or target cannot be read or written.
        ConfigError: scipy is not installed.
    """
    sources = {}
    for name, split in SPLITS.items():
        for path in sorted(Path(folder, name).glob("*.mat")):
            if not _SESSION.fullmatch(path.stem):
                raise DataError(f"{path} is not named like a session, e.g. t12.2022.04.28.mat.")
            read = partial(_as_data_file, path, split)
            sources[f"{path.stem}/data_{split}.hdf5"] = str(path), read
    if not sources:
        raise DataError(
            f"{folder} has no train/*.mat (or test, competitionHoldOut): give the folder "
            "competitionData of the unpacked archive."
        )
    options, command = replace(options, from_text=True), "prepare_dataset.py import-mat"
    return encode_files(sources, folder, target, command, options, **how)


def _as_data_file(path: Path, split: str) -> bytes:
    """The bytes of a data file with the features and sentences of a benchmark's file."""
    data = open_store(path.parent).read(path.name)
    with limited(10 * len(data)):  # MATLAB compresses its files
        return data_file_bytes(_trials(path, data, split))


def _trials(path: Path, data: bytes, split: str) -> list[TrialContents]:
    variables = _variables(path, data)
    try:
        sentences = [text_of(s, "sentenceText") for s in variables["sentenceText"].reshape(-1)]
    except DataError as damage:
        raise DataError(f"{path}: {damage}.") from damage
    crossings, power = (variables[name].reshape(-1) for name in ("tx1", "spikePow"))
    blocks = variables["blockIdx"].reshape(-1)
    if not len(sentences) == len(crossings) == len(power) == len(blocks):
        raise DataError(
            f"{path} has {len(sentences)} sentences, {len(crossings)} trials of tx1, {len(power)} "
            f"of spikePow and {len(blocks)} block numbers: get it again from the archive."
        )
    if blocks.dtype.kind not in "fiu" or (blocks % 1).any():
        raise DataError(f"{path}: blockIdx holds no whole numbers: get it again from the archive.")
    features = [
        _features(f"{path} trial {number}", *both)
        for number, both in enumerate(zip(crossings, power, strict=True))
    ]
    for block in np.unique(blocks):
        members = np.flatnonzero(blocks == block)
        together = np.concatenate([features[i] for i in members])
        mean, std = together.mean(axis=0), together.std(axis=0)
        for i in members:
            features[i] = ((features[i] - mean) / (std + _LEAST_STD)).astype(np.float32)
    return [
        TrialContents(
            name=f"trial_{number:04d}",
            session=path.stem,
            block_num=int(blocks[number]),
            trial_num=_FIRST_NUMBER[split] + number,
            features=values,
            sentence=sentence or None,
        )
        for number, (sentence, values) in enumerate(zip(sentences, features, strict=True))
    ]


def _variables(path: Path, data: bytes) -> dict[str, np.ndarray]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ConfigError("import-mat needs scipy: type 'pip install scipy'.") from error
    names = ("sentenceText", "blockIdx", "tx1", "spikePow")
    again = "get it again from the archive"
    try:
        variables: dict[str, Any] = loadmat(io.BytesIO(data), variable_names=names)
    except NotImplementedError as error:
        raise DataError(f"{path} is a MATLAB 7.3 file: save it with '-v7'.") from error
    except Exception as error:
        raise DataError(
            f"{path} cannot be read as a MATLAB file ({cause_of(error)}): {again}."
        ) from error
    missing = [name for name in names if name not in variables]
    if missing:
        raise DataError(f"{path} has no variable {missing[0]}: {again}.")
    return variables


def _features(where: str, crossings: Any, power: Any) -> np.ndarray:
    """[T, 256] float64 of one trial."""
    parts = [np.asarray(part) for part in (crossings, power)]
    for name, part in zip(("tx1", "spikePow"), parts, strict=True):
        if part.ndim != 2 or part.dtype.kind not in "fiu" or part.shape[1] < _CHANNELS:
            raise DataError(
                f"{where}: {name} is {part.dtype} of shape {part.shape}, not numbers [T, "
                f"{_CHANNELS} or more]."
            )
    if len(parts[0]) != len(parts[1]):
        raise DataError(f"{where}: tx1 has {len(parts[0])} bins, spikePow {len(parts[1])}.")
    return np.concatenate([part[:, :_CHANNELS] for part in parts], axis=1).astype(np.float64)
