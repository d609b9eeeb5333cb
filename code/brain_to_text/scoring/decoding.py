"""Error rates of decoded sequences: greedy CTC decoding in batches, edit distances by a library."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein

from ..labels.diphones import N_DIPHONES, LabelForm, collapse_to_phonemes
from ..labels.phonemes import N_PHONEMES
from ..model.losses import ctc_nll


def greedy_decode(scores: torch.Tensor, frame_lengths: torch.Tensor) -> list[list[int]]:
    """Best class per frame, repeats merged, then blanks dropped.

    Args:
        scores: [B, T', C] logits or log-probabilities; one transfer of [B, T'] class ids follows.
        frame_lengths: [B] CPU; frames beyond a trial's own do not count.
    """
    return merge_frames(scores.argmax(-1).cpu().numpy(), frame_lengths.numpy())


def merge_frames(classes: np.ndarray, frame_lengths: np.ndarray) -> list[list[int]]:
    """CTC's mapping from frames to labels, for a whole batch: [B, T'] ids to B lists of ids."""
    kept = np.ones(classes.shape, dtype=bool)
    kept[:, 1:] = classes[:, 1:] != classes[:, :-1]
    kept &= (classes != 0) & (np.arange(classes.shape[1]) < frame_lengths[:, None])
    labels = classes[kept].tolist()
    ends = np.cumsum(kept.sum(1)).tolist()
    return [labels[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def edit_counts(reference: Sequence[int], hypothesis: Sequence[int]) -> tuple[int, int, int]:
    """(substitutions, deletions, insertions) of one cheapest alignment of two label sequences."""
    counts = {"replace": 0, "delete": 0, "insert": 0}
    for operation in Levenshtein.editops(reference, hypothesis):
        counts[operation.tag] += 1
    return counts["replace"], counts["delete"], counts["insert"]


@dataclass
class ErrorCounts:
    """Edits summed over trials; `rate` is edits per reference label (above 1 is possible)."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference_labels: int = 0

    def add(self, reference: Sequence[int], hypothesis: Sequence[int]) -> None:
        substitutions, deletions, insertions = edit_counts(reference, hypothesis)
        self.substitutions += substitutions
        self.deletions += deletions
        self.insertions += insertions
        self.reference_labels += len(reference)

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.reference_labels + other.reference_labels,
        )

    @property
    def edits(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        return self.edits / self.reference_labels if self.reference_labels else float("nan")


@dataclass
class SessionScore:
    """Sums over one session's trials; merging gives the same numbers in any order and grouping."""

    n_trials: int = 0
    n_frames: int = 0
    n_labels: int = 0
    nats: list[float] = field(default_factory=list)  # per trial, summed exactly when reported
    classes: ErrorCounts = field(default_factory=ErrorCounts)  # DER, or PER of a 41-class model
    phonemes: ErrorCounts = field(default_factory=ErrorCounts)  # from marginalised probabilities
    path: ErrorCounts = field(default_factory=ErrorCounts)  # phonemes of the decoded diphones

    def __add__(self, other: SessionScore) -> SessionScore:
        return SessionScore(
            self.n_trials + other.n_trials,
            self.n_frames + other.n_frames,
            self.n_labels + other.n_labels,
            self.nats + other.nats,
            self.classes + other.classes,
            self.phonemes + other.phonemes,
            self.path + other.path,
        )

    def rates(self, diphones: bool) -> dict[str, float | int]:
        """DER and PER (PER alone for a phoneme model), loss, trials."""
        return {
            **({"DER": self.classes.rate} if diphones else {}),
            "PER": self.phonemes.rate if diphones else self.classes.rate,
            **({"PER_path": self.path.rate} if diphones else {}),
            "CTC_loss": math.fsum(self.nats) / max(self.n_frames, 1),
            "n_trials": self.n_trials,
        }


@dataclass
class ValidationResult:
    """One pass over labelled trials.

    Attributes:
        der: diphone error rate; of a 41-class model, its phoneme error rate.
        per: phoneme error rate, decoded from marginalised probabilities.
        per_path: phoneme error rate of the decoded diphones; None for a 41-class model.
        ctc_loss: nats per output frame, of the model's classes.
        ctc_loss_per_label: the same sum of nats per reference label.
        per_session: session name to its rates.
        n_trials, seconds: size and duration of the pass.
        logits: per trial [T', C] float16 with its index in the manifest, when they were kept.
    """

    der: float
    per: float
    per_path: float | None
    ctc_loss: float
    ctc_loss_per_label: float
    per_session: dict[str, dict[str, float | int]]
    counts: dict[str, dict[str, int]]
    n_trials: int
    seconds: float = 0.0
    logits: dict[int, torch.Tensor] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for a metrics file: everything but the logits."""
        numbers = {name: value for name, value in vars(self).items() if name != "logits"}
        return {name: value for name, value in numbers.items() if value is not None}


class ValidationMeter:
    """Collects batches on the device, scores them on the host in one go.

    `add` reads no result back; class ids (two bytes a frame), losses and labels are all it keeps.
    """

    def __init__(
        self, sessions: Sequence[str], n_classes: int, label_form: str | None = "self_loop"
    ) -> None:
        self.sessions = list(sessions)
        self.diphones = n_classes == N_DIPHONES
        self.label_form: LabelForm | None = None
        if label_form in ("self_loop", "transition"):
            self.label_form = cast(LabelForm, label_form)
        self.scores: dict[int, SessionScore] = {}
        self._pending: list[dict[str, Any]] = []

    def add(self, logits: torch.Tensor, batch: Any, frame_lengths: torch.Tensor) -> None:
        """Take one batch: logits [B, T', C] and labels on the device, lengths on the CPU."""
        self.add_parts([(slice(0, len(logits)), logits)], batch, frame_lengths)

    def add_parts(
        self,
        parts: Iterable[tuple[slice, torch.Tensor]],
        batch: Any,
        frame_lengths: torch.Tensor,
    ) -> None:
        """Take one batch whose logits come as (rows, logits of those rows), in order."""
        decoded = [
            self._decode(logits, batch.labels[rows], frame_lengths[rows], batch.label_lengths[rows])
            for rows, logits in parts
        ]
        pending: dict[str, Any] = {"frames": frame_lengths}
        pending["nll"] = torch.cat([part["nll"] for part in decoded])
        for name in decoded[0].keys() - {"nll"}:
            pending[name] = [part[name] for part in decoded]
        pending["batch"] = _Labels(
            batch.labels.to(torch.int16),
            batch.label_lengths,
            batch.phoneme_labels.to(torch.int16),
            batch.phoneme_lengths,
            batch.day_indices,
        )
        self._pending.append(pending)

    def _decode(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        frame_lengths: torch.Tensor,
        label_lengths: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Loss [b] and best classes [b, T'] of some trials, on their device."""
        log_probs = logits.float().log_softmax(-1)
        decoded = {
            "nll": ctc_nll(log_probs, labels, frame_lengths, label_lengths),
            "classes": log_probs.argmax(-1).to(torch.int16),
        }
        if self.diphones:
            # the best phoneme needs no logarithm: sums of probabilities, as marginalise_log_probs
            marginal = log_probs.exp_().unflatten(-1, (N_PHONEMES, N_PHONEMES)).sum(-2)
            decoded["phonemes"] = marginal.argmax(-1).to(torch.int16)
        return decoded

    def result(self, gather: Callable[[Any], list[Any]] = lambda own: [own]) -> ValidationResult:
        """Score everything taken so far.

        Args:
            gather: the scores of every process that shares the pass, from this one's.
        """
        for pending in self._pending:
            self._score(pending)
        self._pending.clear()
        scores: dict[int, SessionScore] = {}
        for part in gather(self.scores):
            for day, score in part.items():
                scores[day] = scores.get(day, SessionScore()) + score
        days = sorted(scores)
        total = sum((scores[day] for day in days), SessionScore())
        rates = total.rates(self.diphones)
        return ValidationResult(
            der=total.classes.rate,
            per=float(rates["PER"]),
            per_path=total.path.rate if self.diphones else None,
            ctc_loss=math.fsum(total.nats) / max(total.n_frames, 1),
            ctc_loss_per_label=math.fsum(total.nats) / max(total.n_labels, 1),
            per_session={self.sessions[d]: scores[d].rates(self.diphones) for d in days},
            counts={
                "classes": asdict(total.classes),
                **({"phonemes": asdict(total.phonemes)} if self.diphones else {}),
                **({"path": asdict(total.path)} if self.diphones else {}),
            },
            n_trials=total.n_trials,
        )

    def _score(self, pending: dict[str, Any]) -> None:
        labels, frames = pending["batch"], pending["frames"].numpy()
        decoded = _merged(pending["classes"], frames)
        references = _unpad(labels.labels, labels.label_lengths)
        phoneme_references = _unpad(labels.phoneme_labels, labels.phoneme_lengths)
        if self.diphones:
            marginal = _merged(pending["phonemes"], frames)
        nats = pending["nll"].tolist()
        for trial, day in enumerate(labels.day_indices.tolist()):
            score = self.scores.setdefault(day, SessionScore())
            score.n_trials += 1
            score.n_frames += int(frames[trial])
            score.n_labels += len(references[trial])
            score.nats.append(nats[trial])
            score.classes.add(references[trial], decoded[trial])
            if self.diphones:
                reference = phoneme_references[trial]
                score.phonemes.add(reference, marginal[trial])
                score.path.add(reference, collapse_to_phonemes(decoded[trial], self.label_form))


def _merged(parts: Sequence[torch.Tensor], frame_lengths: np.ndarray) -> list[list[int]]:
    """Labels of every trial from parts of a batch, each [b, T'] best classes."""
    merged: list[list[int]] = []
    for part in parts:
        lengths = frame_lengths[len(merged) : len(merged) + len(part)]
        merged += merge_frames(part.cpu().numpy(), lengths)
    return merged


@dataclass
class _Labels:
    labels: torch.Tensor
    label_lengths: torch.Tensor
    phoneme_labels: torch.Tensor
    phoneme_lengths: torch.Tensor
    day_indices: torch.Tensor


def _unpad(labels: torch.Tensor, lengths: torch.Tensor) -> list[list[int]]:
    return [
        row[:length] for row, length in zip(labels.cpu().tolist(), lengths.tolist(), strict=True)
    ]
