"""Logits of whole trials where nothing is learnt: the forward pass of validation and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from ..streaming.batch import Batch
from .augmentations import Augmentation
from .rnn_model import GRUDecoder


class TrialLogits:
    """A decoder with its weights as they are now.

    Args:
        model: in evaluation mode, on the device of the batches.
        augmentation: only its smoothing is used.
        autocast: the precision of the forward pass.
    """

    def __init__(
        self,
        model: GRUDecoder,
        augmentation: Augmentation,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._model, self._augmentation, self._autocast = model, augmentation, autocast

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows of the batch, their logits [b, T', classes]); a trial at a time on CPUs.

        T' is at least the longest of these rows' frames, and at least 1.
        """
        assert batch.features is not None  # on the device by now
        features, n_time_steps = self._augmentation(
            batch.features, batch.n_time_steps, training=False
        )
        with self._autocast():
            logits = self._model(features, batch.day_indices, n_time_steps=n_time_steps)
        # on a CPU a trial at a time stays in the cache, and in memory that is already mapped
        size = 1 if logits.device.type == "cpu" else len(logits)
        for start in range(0, len(logits), size):
            rows = slice(start, start + size)
            longest = int(self._model.frame_lengths(n_time_steps[rows]).clamp_min(1).max())
            yield rows, logits[rows, :longest]
