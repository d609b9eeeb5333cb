"""CTC over diphones and, from the same output, over phonemes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from ..config import ObjectiveConfig
from ..labels.diphones import N_DIPHONES, marginalise_log_probs
from .device import send
from .gpu_ctc import ctc_nll_without_waiting, works_on


class LabelledBatch(Protocol):
    """What the losses read of a batch: labels on any device, lengths on the CPU."""

    @property
    def labels(self) -> Any: ...
    @property
    def label_lengths(self) -> Any: ...
    @property
    def phoneme_labels(self) -> Any: ...
    @property
    def phoneme_lengths(self) -> Any: ...


@dataclass
class LossTerms:
    """One batch's loss; every tensor is a float32 scalar on the device."""

    total: torch.Tensor  # what is differentiated: weighted nats per trial
    nats_per_frame: torch.Tensor  # the same, per output frame, detached
    diphone: torch.Tensor | None  # nats per output frame of the class labels, detached
    phoneme: torch.Tensor | None  # nats per output frame of the phoneme labels, detached
    alpha: float


def min_frames(labels: torch.Tensor, label_lengths: torch.Tensor) -> torch.Tensor:
    """[B] frames that CTC needs at least: one per label and one blank between equal neighbours."""
    pair = torch.arange(1, labels.shape[1], device=labels.device)
    inside = pair < label_lengths.to(labels.device).unsqueeze(1)
    repeats = ((labels[:, 1:] == labels[:, :-1]) & inside).sum(1)
    return label_lengths.to(labels.device) + repeats


def ctc_nll(
    log_probs: torch.Tensor,
    labels: torch.Tensor,
    frame_lengths: torch.Tensor,
    label_lengths: torch.Tensor,
    kernel: str = "torch",
) -> torch.Tensor:
    """[B] negative log-likelihood of each label sequence, in nats; infinite if it cannot fit.

    Args:
        log_probs: [B, T', C] float32, normalised over C (the gradient assumes it), blank 0.
        labels: [B, L] int64, zero-padded.
        frame_lengths, label_lengths: [B] int64 on the CPU.
        kernel: "triton" runs our own on GPUs where it agrees with torch's (see gpu_ctc).
    """
    device = log_probs.device
    if kernel == "triton" and device.type == "cuda" and works_on(device):
        return ctc_nll_without_waiting(
            log_probs, labels, send(frame_lengths, device), send(label_lengths, device)
        )
    return F.ctc_loss(
        log_probs.transpose(0, 1), labels, frame_lengths, label_lengths, blank=0, reduction="none"
    )


class JointObjective:
    """alpha x phoneme CTC + (1 - alpha) x class CTC; a term of weight 0 is not computed.

    With 41 classes the classes are phonemes and alpha is 0. With 1681 the phoneme distribution is
    the diphone distribution marginalised over the previous phoneme (arXiv 2411.10657).
    """

    def __init__(self, config: ObjectiveConfig, n_classes: int) -> None:
        self.config = config
        self.n_classes = n_classes
        self.marginalises = n_classes == N_DIPHONES

    @property
    def is_joint(self) -> bool:
        """Whether the phoneme term takes part at any step."""
        return self.marginalises and (
            self.config.schedule is not None or self.config.phoneme_weight > 0
        )

    def alpha(self, step: int) -> float:
        """The phoneme term's weight at a global step: fixed, or growing stepwise to its end."""
        schedule = self.config.schedule
        if not self.marginalises:
            return 0.0
        if schedule is None:
            return self.config.phoneme_weight
        grown = schedule.start + schedule.step_size * (step // schedule.interval)
        return min(grown, schedule.end)

    def costliest_step(self, n_steps: int) -> int:
        """A step of the first `n_steps` at which both terms are computed, where there is one."""
        schedule = self.config.schedule
        changes = range(0, n_steps, n_steps if schedule is None else schedule.interval)
        return max(changes, key=lambda step: 0 < self.alpha(step) < 1)

    def __call__(
        self,
        logits: torch.Tensor,
        batch: LabelledBatch,
        frame_lengths: torch.Tensor,
        step: int,
        global_batch_size: int | None = None,
    ) -> LossTerms:
        """The loss of one batch (or of one rank's share of it).

        Args:
            logits: [B, T', C], any float type; the loss is computed in float32.
            batch: the labels.
            frame_lengths: [B] output frames per trial, CPU.
            step: global step, for the schedule.
            global_batch_size: trials over all ranks; the sum over this rank's trials is divided
                by it, so that summing gradients over ranks gives the mean over the batch.
        """
        alpha, kernel = self.alpha(step), self.config.ctc_kernel
        n_frames = max(int(frame_lengths.sum()), 1)
        log_probs = logits.float().log_softmax(-1)
        trials = global_batch_size or len(logits)
        total = logits.new_zeros((), dtype=torch.float32)
        means: dict[str, torch.Tensor | None] = {"class": None, "phoneme": None}
        if alpha < 1:
            nll = ctc_nll(log_probs, batch.labels, frame_lengths, batch.label_lengths, kernel).sum()
            means["class"] = nll.detach() / n_frames
            total = total + (1 - alpha) / trials * nll
        if alpha > 0:
            marginal = marginalise_log_probs(log_probs)
            nll = ctc_nll(
                marginal, batch.phoneme_labels, frame_lengths, batch.phoneme_lengths, kernel
            ).sum()
            means["phoneme"] = nll.detach() / n_frames
            total = total + alpha / trials * nll
        per_frame = total.detach() * (trials / n_frames)
        return LossTerms(total, per_frame, means["class"], means["phoneme"], alpha)
