"""One pass of a model over labelled trials: the same for validation in training and afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..model.augmentations import Augmentation
from ..model.rnn_model import GRUDecoder
from ..model.trial_logits import TrialLogits
from ..streaming.dataset_s3 import EvaluationDatasetS3
from .decoding import ValidationMeter, ValidationResult


@torch.no_grad()
def evaluate(
    model: GRUDecoder,
    augmentation: Augmentation,
    dataset: EvaluationDatasetS3,
    sessions: Sequence[str],
    *,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    keep_logits: bool = False,
    stop: Callable[[], bool] | None = None,
    gather: Callable[[Any], list[Any]] = lambda own: [own],
) -> ValidationResult | None:
    """Score every trial of `dataset`.

    Args:
        model: on the dataset's device; its training mode is restored afterwards.
        augmentation: only its smoothing is used.
        sessions: names in day-layer order.
        autocast: the precision of the forward pass.
        keep_logits: also return every trial's logits, [T', C] float16 on the CPU by manifest index.
        stop: asked between batches; when it says True the pass is given up.
        gather: every process's part from this one's, when processes share the pass.

    Returns:
        The scores, or None when the pass was given up.
    """
    started = time.perf_counter()
    meter = ValidationMeter(sessions, model.n_classes, dataset.manifest.label_form)
    logits_by_trial: dict[int, torch.Tensor] = {}
    was_training = model.training
    model.eval()
    logits_of = TrialLogits(model, augmentation, autocast)
    try:
        with dataset.batches() as batches:
            for batch in batches:
                if stop is not None and stop():
                    return None
                frame_lengths = model.frame_lengths(batch.n_time_steps)
                parts: Iterable[tuple[slice, torch.Tensor]] = logits_of(batch)
                if keep_logits:
                    parts = list(parts)
                    for rows, logits in parts:
                        for index, frames, own in zip(
                            batch.trial_indices[rows].tolist(),
                            frame_lengths[rows].tolist(),
                            logits,
                            strict=True,
                        ):
                            logits_by_trial[index] = own[:frames].half().cpu()
                meter.add_parts(parts, batch, frame_lengths)
    finally:
        model.train(was_training)
    result = meter.result(gather)
    result.seconds = time.perf_counter() - started
    if keep_logits:
        result.logits = {}
        for part in gather(logits_by_trial):
            result.logits.update(part)
    return result
