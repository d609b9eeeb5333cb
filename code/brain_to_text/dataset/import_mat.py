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
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from ..storage.store import open_store
from .encoding import Sources
from .hdf5_values import cause_of, text_of
from .hdf5_writer import TrialContents, data_file_bytes
from .isolation import limited

SPLITS = {"train": "train", "test": "val", "competitionHoldOut": "test"}  # the baseline's use
_SESSION = re.compile(r"[A-Za-z0-9]+(\.\d+)+")
_FIRST_NUMBER = {"train": 0, "val": 1000, "test": 2000}  # so that a session's trials differ
_CHANNELS = 128
_LEAST_STD = 1e-8  # added to deviations, as the baseline does


def mat_sources(folder: str) -> Sources:
    """Every session of the benchmark's `folder`, for `encode_files` with labels from text.

    Trials of train and test must have a sentence, from which their labels are made; those of
    competitionHoldOut become the test split, labelled only where they have one.

    Raises:
        DataError: no such files. ConfigError: scipy is not installed.
    """
    if find_spec("scipy") is None:
        raise ConfigError("import-mat needs scipy: type 'pip install scipy'.")
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
    return sources


def _as_data_file(path: Path, split: str) -> bytes:
    """The bytes of a data file with the features and sentences of a benchmark's file.

    Raises:
        DataError: it is damaged. StorageError: it cannot be read.
    """
    data = open_store(path.parent).read(path.name)
    with limited(10 * len(data)):  # MATLAB compresses its files
        try:
            return data_file_bytes(_trials(path.stem, data, split))
        except DataError as damage:
            raise DataError(
                f"{path}: {damage}; get it again from the archive, or save it with MATLAB's '-v7'."
            ) from damage


def _trials(session: str, data: bytes, split: str) -> list[TrialContents]:
    names = ("sentenceText", "blockIdx", "tx1", "spikePow")
    sentences, blocks, crossings, power = (v.reshape(-1) for v in _variables(data, names))
    if not len(sentences) == len(crossings) == len(power) == len(blocks):
        raise DataError(
            f"{len(sentences)} sentences, {len(crossings)} trials of tx1, {len(power)} of spikePow "
            f"and {len(blocks)} block numbers do not go together"
        )
    if blocks.dtype.kind not in "fiu" or (blocks % 1).any():
        raise DataError("blockIdx holds no whole numbers")
    features = [_features(i, crossings[i], power[i]) for i in range(len(blocks))]
    for block in np.unique(blocks):
        members = np.flatnonzero(blocks == block)
        together = np.concatenate([features[i] for i in members])
        mean, std = together.mean(axis=0), together.std(axis=0)
        for i in members:
            features[i] = ((features[i] - mean) / (std + _LEAST_STD)).astype(np.float32)
    return [
        TrialContents(
            name=f"trial_{number:04d}",
            session=session,
            block_num=int(blocks[number]),
            trial_num=_FIRST_NUMBER[split] + number,
            features=features[number],
            sentence=text_of(sentence, "sentenceText") or None,
        )
        for number, sentence in enumerate(sentences)
    ]


def _variables(data: bytes, names: Sequence[str]) -> list[np.ndarray]:
    from scipy.io import loadmat

    try:
        variables: dict[str, Any] = loadmat(io.BytesIO(data), variable_names=names)
        return [variables[name] for name in names]
    except NotImplementedError as error:
        raise DataError("it is a MATLAB 7.3 file") from error
    except KeyError as error:
        raise DataError(f"it has no variable {error.args[0]}") from error
    except Exception as error:
        raise DataError(f"it cannot be read as a MATLAB file ({cause_of(error)})") from error


def _features(number: int, crossings: Any, power: Any) -> np.ndarray:
    """[T, 256] float64 of one trial."""
    parts = [np.asarray(part) for part in (crossings, power)]
    for name, part in zip(("tx1", "spikePow"), parts, strict=True):
        if part.ndim != 2 or part.dtype.kind not in "fiu" or part.shape[1] < _CHANNELS:
            raise DataError(
                f"{name} of trial {number} is {part.dtype} of shape {part.shape}, not numbers [T, "
                f"{_CHANNELS} or more]"
            )
    if len(parts[0]) != len(parts[1]):
        raise DataError(
            f"tx1 of trial {number} has {len(parts[0])} bins, its spikePow {len(parts[1])}"
        )
    return np.concatenate([part[:, :_CHANNELS] for part in parts], axis=1).astype(np.float64)
