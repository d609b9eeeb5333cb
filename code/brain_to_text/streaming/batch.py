"""A batch of trials as tensors: what the data side hands to the training side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..dataset.trial_record import TrialRecord


@dataclass(frozen=True)
class Batch:
    """Trials of one step (or one validation batch), each session's contiguous.

    Attributes:
        step: training step, or position of a validation batch.
        features: [B, T, C] float32, zero beyond n_time_steps; float16 on its way to a GPU.
        n_time_steps: [B] int64, CPU: bins of each trial.
        labels: [B, L] int64 class ids, zero beyond label_lengths; None without labels (test split).
        label_lengths: [B] int64, CPU.
        phoneme_labels, phoneme_lengths: the same for phonemes.
        day_indices: [B] int64, CPU: position of each trial's session in the run's session list.
        trial_indices: [B] int64, CPU: into `TrialManifest.trials`.
    """

    step: int
    features: torch.Tensor
    n_time_steps: torch.Tensor
    labels: torch.Tensor | None
    label_lengths: torch.Tensor | None
    phoneme_labels: torch.Tensor | None
    phoneme_lengths: torch.Tensor | None
    day_indices: torch.Tensor
    trial_indices: torch.Tensor

    def __len__(self) -> int:
        return len(self.n_time_steps)

    def to(self, device: torch.device | str) -> Batch:
        """This batch with features and labels on `device`; lengths and indices stay on the CPU.

        Copies from pinned memory do not wait. Half-precision features become float32 on arrival.
        """
        return dataclasses.replace(
            self,
            features=self.features.to(device, non_blocking=True).float(),
            labels=_move(self.labels, device),
            phoneme_labels=_move(self.phoneme_labels, device),
        )


def _move(tensor: torch.Tensor | None, device: torch.device | str) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)


def pad_features(
    trials: Sequence[np.ndarray],
    dtype: torch.dtype = torch.float32,
    feature_subset: np.ndarray | None = None,
    pin: bool = False,
) -> torch.Tensor:
    """[B, T, C] with trial b in its first rows and exact zeros after.

    Args:
        trials: B arrays [T_b, C_all].
        dtype: of the result.
        feature_subset: columns to take, in order; None for all.
        pin: in page-locked memory.
    """
    n_features = trials[0].shape[1] if feature_subset is None else len(feature_subset)
    shape = (len(trials), max(len(t) for t in trials), n_features)
    padded = torch.empty(shape, dtype=dtype, pin_memory=pin)
    rows = padded.numpy()
    for row, trial in zip(rows, trials, strict=True):
        row[: len(trial)] = trial if feature_subset is None else trial[:, feature_subset]
        row[len(trial) :] = 0
    return padded


def pad_labels(sequences: Sequence[np.ndarray], pin: bool = False) -> torch.Tensor:
    """[B, L] int64, zero beyond each sequence's end."""
    shape = (len(sequences), max((len(s) for s in sequences), default=0))
    padded = torch.zeros(shape, dtype=torch.int64, pin_memory=pin)
    for row, sequence in zip(padded.numpy(), sequences, strict=True):
        row[: len(sequence)] = sequence
    return padded


def collate(
    step: int,
    trial_indices: np.ndarray,
    records: Sequence[TrialRecord],
    day_indices: np.ndarray,
    features: torch.Tensor,
    pin: bool = False,
) -> Batch:
    """A batch from features that are already padded, and what the manifest says about them."""

    def labels(field: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        sequences = [getattr(record, field) for record in records]
        if any(s is None for s in sequences):
            return None, None
        return pad_labels(sequences, pin), torch.tensor([len(s) for s in sequences])

    class_labels, class_lengths = labels("class_ids")
    phoneme_labels, phoneme_lengths = labels("phoneme_ids")
    return Batch(
        step=step,
        features=features,
        n_time_steps=torch.tensor([record.n_time_steps for record in records]),
        labels=class_labels,
        label_lengths=class_lengths,
        phoneme_labels=phoneme_labels,
        phoneme_lengths=phoneme_lengths,
        day_indices=torch.from_numpy(day_indices),
        trial_indices=torch.from_numpy(trial_indices.copy()),
    )
