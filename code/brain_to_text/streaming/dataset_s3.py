"""Batches of trials as tensors, streamed from S3 (or a folder) ahead of the training loop.

`BrainToTextDatasetS3` gives training batches: the batch at a step is a pure function of (seed,
step), whatever the number of threads, ranks, restarts or the state of any cache.
`EvaluationDatasetS3` gives every trial of a split once.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict, Unpack

import numpy as np
import torch

from ..config import TrainingConfig
from ..dataset.selection import Indices
from .batch import Batch, collate, pad_features
from .batch_plan import BatchPlan, evaluation_batches, shard
from .prefetch import Prefetcher, PrefetchLimits
from .trial_stream import Reads, TrialStream

# Of dataset.prefetch_mb: training batches wait in RAM while a validation pass runs. At the default
# the longest of its batches do not fit two at a time (on data like the real one, the first 6 of 23
# at 64 trials): one is then read while the one before is scored, which is all that overlap needs.
VALIDATION_SHARE = 0.25


class BatchOptions(TypedDict, total=False):
    """How batches are made, and which of them this process gets: see `StreamedBatches`."""

    device: torch.device | None
    limits: PrefetchLimits | None
    feature_subset: Sequence[int] | None
    rank: int
    world_size: int


class StreamedBatches(abc.ABC):
    """What both datasets share: from trial indices to a `Batch`.

    Args:
        stream: where features come from.
        trials_by_session: trial indices of each session; the position is the day index.
        device: where iterated batches end up; None leaves them on the CPU.
        limits: how far batches are prepared ahead.
        feature_subset: feature columns to use, in order.
        rank, world_size: which share this process reads.
    """

    def __init__(
        self,
        stream: TrialStream,
        trials_by_session: Sequence[Indices],
        *,
        device: torch.device | None = None,
        limits: PrefetchLimits | None = None,
        feature_subset: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.stream = stream
        self.manifest = stream.manifest
        self.stats = stream.stats
        self.device = device
        self._limits = limits or PrefetchLimits()
        self._subset = None if feature_subset is None else np.array(feature_subset, dtype=np.int64)
        self._rank, self._world_size = rank, world_size
        self._on_gpu = device is not None and device.type == "cuda"
        table = self.manifest.trials
        self._n_time_steps = np.asarray(table.n_time_steps, np.int64)
        # while a batch waits, each of its trials is there as it was read or as it was decoded
        self._trial_bytes = np.maximum(np.asarray(table.length).astype(int), table.feature_bytes())
        self._day = np.full(len(self.manifest.trials), -1, np.int64)
        for day, trials in enumerate(trials_by_session):
            self._day[trials] = day
        # Half precision crosses the bus as it is and becomes float32 on the device.
        half = stream.dtype == np.float16
        self._dtype = torch.float16 if half and self._on_gpu else torch.float32

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of batches."""

    @abc.abstractmethod
    def trial_indices(self, step: int) -> np.ndarray:
        """This rank's trials of batch `step`: [B] int64 into `manifest.trials`."""

    def __getitem__(self, step: int) -> Batch:
        """The batch at `step`, read now, on the CPU.

        Raises:
            IndexError: no such batch.
            StorageError, DataError: see `TrialStream.fetch`.
        """
        if not 0 <= step < len(self):
            raise IndexError(f"batch {step} of {len(self)}")
        return self._begin(step)[1]()

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, start: int = 0, stop: int | None = None) -> Prefetcher:
        """Iterate over batches start … stop-1, prepared ahead and moved to the device.

        Close the iterator (or use it in `with`) when leaving early.
        """
        stop = len(self) if stop is None else min(stop, len(self))
        ahead = (self._begin, self._batch_bytes, start, stop, self._limits)
        return Prefetcher(*ahead, self.stats, self.device)

    def close(self) -> None:
        """Close the stream that feeds this dataset; batches under way are given up."""
        self.stream.close()

    def _batch_bytes(self, step: int) -> int:
        """Memory that preparing batch `step` needs: the padded tensor, and its trials."""
        trials = self.trial_indices(step)
        if len(trials) == 0:
            return 0
        n_features = self.manifest.n_features if self._subset is None else len(self._subset)
        padded = len(trials) * int(self._n_time_steps[trials].max()) * n_features
        return padded * self._dtype.itemsize + int(self._trial_bytes[np.unique(trials)].sum())

    def _begin(self, step: int) -> tuple[Reads, Callable[[], Batch]]:
        """Start a batch's reads; returns them, and what waits for them and puts it together."""
        trials = self.trial_indices(step)
        reads = self.stream.submit(trials)

        def assemble() -> Batch:
            features = pad_features(reads.result(), self._dtype, self._subset, self._on_gpu)
            records = [self.manifest.trials[i] for i in trials]
            return collate(step, trials, records, self._day[trials], features, self._on_gpu)

        return reads, assemble


class BrainToTextDatasetS3(StreamedBatches, torch.utils.data.Dataset):
    """Training batches: `dataset[step]` is the batch of that step, `batches()` iterates over them.

    Read it through `batches()`, not through a DataLoader with worker processes: after a fork the
    stream refuses to work, and a thread hands a batch over without copying it.

    Args:
        stream: where features come from.
        trials_by_session: trial indices to draw from, one array per session in day-layer order.
        batch_size: trials per step over all ranks.
        days_per_batch: sessions per batch.
        n_batches: length of the dataset: training steps.
        seed: of the batch plan.
        must_include_days: sessions (by position) that every batch contains.
        length_groups: see `BatchPlan`.
        options: see `StreamedBatches`.
    """

    def __init__(
        self,
        stream: TrialStream,
        trials_by_session: Sequence[Indices],
        *,
        batch_size: int,
        days_per_batch: int,
        n_batches: int,
        seed: int,
        must_include_days: Sequence[int] = (),
        length_groups: int = 1,
        **options: Unpack[BatchOptions],
    ) -> None:
        super().__init__(stream, trials_by_session, **options)
        self.plan = BatchPlan(
            trials_by_session,
            batch_size,
            days_per_batch,
            seed,
            must_include_days,
            n_time_steps=self._n_time_steps,
            length_groups=length_groups,
        )
        self._n_batches = n_batches

    @classmethod
    def from_config(
        cls,
        stream: TrialStream,
        trials_by_session: Sequence[Indices],
        config: TrainingConfig,
        *,
        device: torch.device | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> BrainToTextDatasetS3:
        """The batches that a configuration describes."""
        return cls(
            stream,
            trials_by_session,
            batch_size=config.dataset.batch_size,
            days_per_batch=config.dataset.days_per_batch,
            n_batches=config.num_training_batches,
            seed=config.dataset.seed,
            must_include_days=config.dataset.must_include_days or (),
            length_groups=config.dataset.length_groups,
            limits=PrefetchLimits.from_config(config.dataset, 1 - VALIDATION_SHARE),
            feature_subset=config.dataset.feature_subset,
            device=device,
            rank=rank,
            world_size=world_size,
        )

    def __len__(self) -> int:
        return self._n_batches

    def trial_indices(self, step: int) -> np.ndarray:
        trials = self.plan.trials(step)
        return shard(trials, self._n_time_steps[trials], self._rank, self._world_size)

    def days(self, step: int) -> set[int]:
        """Sessions, by position, that batch `step` has trials of on any rank."""
        return set(self._day[self.plan.trials(step)].tolist())


class EvaluationDatasetS3(StreamedBatches):
    """Every trial once, in batches of similar length and fixed order, dealt out to the ranks.

    Args:
        stream: where features come from.
        trials_by_session: the trials to score, one array per session in day-layer order.
        batch_size: trials per batch.
        options: see `StreamedBatches`. The batches themselves do not depend on the number of ranks.
    """

    def __init__(
        self,
        stream: TrialStream,
        trials_by_session: Sequence[Indices],
        *,
        batch_size: int,
        **options: Unpack[BatchOptions],
    ) -> None:
        super().__init__(stream, trials_by_session, **options)
        trials = np.concatenate([np.asarray(t, np.int64) for t in trials_by_session])
        everything = evaluation_batches(trials, self._n_time_steps[trials], batch_size)
        self._batches = everything[self._rank :: self._world_size]

    @classmethod
    def from_config(
        cls,
        stream: TrialStream,
        trials_by_session: Sequence[Indices],
        config: TrainingConfig,
        *,
        device: torch.device | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> EvaluationDatasetS3:
        """Validation as a configuration describes it."""
        return cls(
            stream,
            trials_by_session,
            batch_size=config.dataset.batch_size,
            limits=PrefetchLimits.from_config(config.dataset, VALIDATION_SHARE),
            feature_subset=config.dataset.feature_subset,
            device=device,
            rank=rank,
            world_size=world_size,
        )

    def __len__(self) -> int:
        return len(self._batches)

    def trial_indices(self, step: int) -> np.ndarray:
        return self._batches[step]
