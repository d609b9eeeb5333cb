"""CTC over diphones and, from the same output, over phonemes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..config import TrainingConfig
from ..labels.diphones import N_DIPHONES, marginalise_log_probs
from ..streaming.batch import Batch
from . import gpu_ctc
from .device import send
from .gpu_ctc import ctc_nll_without_waiting, label_scores
from .rnn_model import Packing


@dataclass
class LossTerms:
    """One batch's loss; every tensor is a float32 scalar on the device."""

    total: torch.Tensor  # what is differentiated: weighted nats per trial
    nats_per_frame: torch.Tensor  # of the class labels, per output frame, detached
    phoneme: torch.Tensor | None  # nats per output frame of the phoneme labels, detached
    alpha: float


def ctc_nll(
    log_probs: torch.Tensor,
    labels: torch.Tensor,
    frame_lengths: torch.Tensor,
    label_lengths: torch.Tensor,
    kernel: str = "auto",
    packing: Packing | None = None,
) -> torch.Tensor:
    """[B] negative log-likelihood of each label sequence, in nats; infinite if it cannot fit.

    The gradient is that of the formula, whether `log_probs` are normalised or not.

    Args:
        log_probs: [B, T', C] float32, blank 0; with `packing`, [N, C] of the frames that exist.
        labels: [B, L] int64, zero-padded.
        frame_lengths, label_lengths: [B] int64 on the CPU.
        kernel: `objective.ctc_kernel`; "auto" runs our own on GPUs where it agrees with torch's
            (see gpu_ctc).
    """
    device = log_probs.device
    if packing is None:
        scores = label_scores(log_probs, labels)
    else:
        spoken = F.pad(labels, (1, 0)).index_select(0, packing.trial)
        scores = packing.padded(log_probs.gather(1, spoken))
    if device.type == "cuda" and kernel == "auto" and gpu_ctc.reason_against(device) is None:
        return ctc_nll_without_waiting(
            scores, labels, send(frame_lengths, device), send(label_lengths, device)
        )
    return _ctc_nll_by_torch(scores, labels, frame_lengths, label_lengths)


def _ctc_nll_by_torch(
    scores: torch.Tensor,
    labels: torch.Tensor,
    frame_lengths: torch.Tensor,
    label_lengths: torch.Tensor,
) -> torch.Tensor:
    """torch's CTC on [B, T', 1 + L] scores: each label has a column, repeats share their first."""
    columns = torch.arange(1, labels.shape[1] + 1, device=labels.device).repeat(len(labels), 1)
    columns[:, 1:].masked_fill_(labels[:, 1:] == labels[:, :-1], 0)
    nll = F.ctc_loss(
        scores.transpose(0, 1),
        columns.cummax(1).values if columns.numel() else columns,
        frame_lengths,
        label_lengths,
        reduction="none",
    )
    # torch's gradient counts on a log-softmax that takes each frame's probabilities away again
    real = send(torch.arange(scores.shape[1]) < frame_lengths.unsqueeze(1), scores.device)
    probability = (scores.exp() * real.unsqueeze(2)).sum((1, 2))
    return nll + (probability.detach() - probability)


class JointObjective:
    """weight x phoneme CTC + (1 - weight) x class CTC, the weight by step.

    With 41 classes the classes are phonemes and the weight is 0. With 1681 the phoneme distribution
    is the diphone distribution marginalised over the previous phoneme (arXiv 2411.10657). The class
    loss is known at every weight; at 1 it has no gradient. The phoneme loss is not computed at 0.
    """

    def __init__(self, config: TrainingConfig) -> None:
        points = config.objective.phoneme_weights(config.num_training_batches)
        self.steps, self.weights = (list(column) for column in zip(*points, strict=True))
        self.marginalises = config.dataset.n_classes == N_DIPHONES
        self.ctc_kernel = config.objective.ctc_kernel

    @property
    def is_joint(self) -> bool:
        """Whether the phoneme term takes part at any step."""
        return self.marginalises and max(self.weights) > 0

    def alpha(self, step: int) -> float:
        """The phoneme term's weight at a global step."""
        return float(np.interp(step, self.steps, self.weights)) if self.marginalises else 0.0

    def __call__(
        self,
        logits: torch.Tensor,
        packing: Packing,
        batch: Batch,
        alpha: float,
        global_batch_size: int | None = None,
    ) -> LossTerms:
        """The loss of one batch (or of one rank's share of it).

        Args:
            logits: [N, >= C] of the frames that exist, any float type; the loss is float32 at
                least. Columns beyond the classes have probability 0.
            packing: whose frames they are.
            batch: with labels.
            alpha: the phoneme term's weight.
            global_batch_size: trials over all ranks; the sum over this rank's trials is divided
                by it, so that summing gradients over ranks gives the mean over the batch.
        """

        def nll(log_probs: torch.Tensor, labels: Any, label_lengths: Any) -> torch.Tensor:
            lengths = (packing.frame_lengths, label_lengths)
            return ctc_nll(log_probs, labels, *lengths, self.ctc_kernel, packing).sum()

        n_frames = max(int(packing.frame_lengths.sum()), 1)
        trials = global_batch_size or len(packing.frame_lengths)
        log_probs = logits.log_softmax(-1, torch.promote_types(logits.dtype, torch.float32))
        of_classes = log_probs if alpha < 1 else log_probs.detach()
        classes = nll(of_classes, batch.labels, batch.label_lengths)
        terms = LossTerms((1 - alpha) / trials * classes, classes.detach() / n_frames, None, alpha)
        if alpha > 0:
            marginal = marginalise_log_probs(log_probs[:, :N_DIPHONES])
            phonemes = nll(marginal, batch.phoneme_labels, batch.phoneme_lengths)
            phoneme_total = alpha / trials * phonemes
            terms.total = terms.total + phoneme_total if alpha < 1 else phoneme_total
            terms.phoneme = phonemes.detach() / n_frames
        return terms
