"""Which trials each cache is for, settled before anything is read.

A training trial comes up again and again, a validation trial once per validation: RAM is for the
former first. Every GPU is to keep the same training trials, and RAM the other ones, so that no
trial takes room in both. All of it follows from the manifest, the configuration and the number of
processes; a resumed run and every rank plan the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..config import DatasetConfig
from ..dataset.manifest import TrialManifest
from ..dataset.trial_record import TrialRecord


@dataclass(frozen=True)
class RamPlan:
    """Decoded bytes of trials by index into `TrialManifest.trials`, the most wanted first.

    Attributes:
        first: what RAM is for.
        rest: kept in what the first leave.
    """

    first: Mapping[int, int]
    rest: Mapping[int, int]

    @property
    def n_bytes(self) -> int:
        """Bytes of everything worth keeping."""
        return sum(self.first.values()) + sum(self.rest.values())


@dataclass(frozen=True)
class DevicePlan:
    """What one GPU keeps.

    Attributes:
        n_time_steps: bins of each trial kept, by index into `TrialManifest.trials`.
        n_features: C, columns of a row (a bin).
        dtype: of the rows.
        scratch_rows: most rows that the distinct trials of one rank's batch can have.
    """

    n_time_steps: Mapping[int, int]
    n_features: int
    dtype: np.dtype
    scratch_rows: int

    @property
    def smallest_bytes(self) -> int:
        """Least budget that does anything: a batch passing through, one row of zeros, one row."""
        return (self.scratch_rows + 2) * self.n_features * self.dtype.itemsize


def plan_ram(
    manifest: TrialManifest, dataset: DatasetConfig, world_size: int = 1, shared: bool = False
) -> RamPlan:
    """What the RAM of one host is for.

    Args:
        world_size: processes that share a batch.
        shared: several of them use this host's RAM. Then a trial that is on one GPU is worth
            keeping too, because each GPU reads it for itself; but last.
    """
    on_device = plan_device(manifest, dataset, world_size).n_time_steps
    train = _scattered(manifest, dataset, "train")
    rest = _scattered(manifest, dataset, "val") + [i for i in train if shared and i in on_device]

    def sized(indices: list[int]) -> dict[int, int]:
        return {i: decoded_bytes(manifest.trials[i], dataset.cache_dtype) for i in indices}

    return RamPlan(sized([i for i in train if i not in on_device]), sized(rest))


def plan_device(manifest: TrialManifest, dataset: DatasetConfig, world_size: int = 1) -> DevicePlan:
    """What every GPU keeps under `dataset.gpu_cache_gb`; nothing where that is too little.

    Args:
        world_size: processes that share a batch.
    """
    train = _scattered(manifest, dataset, "train")
    lengths = {i: manifest.trials[i].n_time_steps for i in train}
    n_features = len(dataset.feature_subset or ()) or manifest.n_features
    dtype = features_dtype(manifest, dataset.cache_dtype)
    share = -(-dataset.batch_size // world_size)
    scratch_rows = sum(sorted(lengths.values())[-share:])
    free = int(dataset.gpu_cache_gb * 1e9) // (n_features * dtype.itemsize) - scratch_rows - 1
    kept = {}
    for index, length in lengths.items():
        if length <= free:
            kept[index] = length
            free -= length
    return DevicePlan(kept, n_features, dtype, scratch_rows)


def decoded_dtype(trial: TrialRecord, cache_dtype: str) -> np.dtype:
    """Type of a trial's features as they are handed out."""
    return np.dtype("<f2" if cache_dtype == "float16" else trial.dtype)


def decoded_bytes(trial: TrialRecord, cache_dtype: str) -> int:
    """Size of a trial's features as they are handed out."""
    itemsize = decoded_dtype(trial, cache_dtype).itemsize
    return trial.n_time_steps * trial.n_features * itemsize


def features_dtype(manifest: TrialManifest, cache_dtype: str) -> np.dtype:
    """Type that holds any trial's features: files of both precisions are possible."""
    found = {decoded_dtype(trial, cache_dtype) for trial in manifest.trials}
    return np.dtype("<f2") if found == {np.dtype("<f2")} else np.dtype("<f4")


def _scattered(manifest: TrialManifest, dataset: DatasetConfig, split: str) -> list[int]:
    """The run's trials of a split, in an order whose beginning has some of every session."""
    indices = manifest.select(split, dataset.sessions)
    return sorted(indices, key=lambda i: (i * 2_654_435_761) % 2**32)
