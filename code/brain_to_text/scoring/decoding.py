"""What a model says about trials, greedily decoded: the one pass of validation and evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np
import torch

from ..dataset.trial_record import TrialRecord
from ..labels.diphones import N_DIPHONES, LabelForm, collapse_to_phonemes, marginalise_log_probs
from ..labels.phonemes import N_PHONEMES
from ..model.augmentations import Augmentation
from ..model.losses import ctc_nll
from ..model.rnn_model import GRUDecoder
from ..streaming.batch import Batch
from ..streaming.dataset_s3 import EvaluationDatasetS3
from .statistics import ErrorCounts


@dataclass(frozen=True)
class Inference:
    """A model outside its training steps: on its data's device, the features only smoothed.

    Attributes:
        autocast: the precision of the forward pass.
        ctc_kernel: `objective.ctc_kernel`, for the loss.
    """

    model: GRUDecoder
    augmentation: Augmentation
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    ctc_kernel: str = "auto"

    @torch.no_grad()
    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits [B, T', classes] of a batch by a model in evaluation mode; T' is at least 1."""
        features, n_time_steps = self.augmentation(batch.features, batch.n_time_steps)
        with self.autocast():
            logits: torch.Tensor = self.model(
                features, batch.day_indices, n_time_steps=n_time_steps
            )
        return logits

    def over(
        self, dataset: EvaluationDatasetS3
    ) -> Generator[tuple[Batch, torch.Tensor, torch.Tensor], None, None]:
        """(batch, its logits, its frame lengths [B] on the CPU), batch by batch.

        The model's training mode is restored afterwards.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            with dataset.batches() as batches:
                for batch in batches:
                    frames = self.model.frame_lengths(batch.n_time_steps)
                    yield batch, self.logits(batch), frames
        finally:
            self.model.train(was_training)


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


# --- validation: counts, while the device goes on -------------------------------------------------


@dataclass
class SessionScore:
    """Sums over one session's trials; merging gives the same numbers in any order and grouping."""

    n_trials: int = 0
    n_frames: int = 0
    nats: list[float] = field(default_factory=list)  # per trial, summed exactly when reported
    classes: ErrorCounts = field(default_factory=ErrorCounts)  # DER, or PER of a 41-class model
    phonemes: ErrorCounts = field(default_factory=ErrorCounts)  # from marginalised probabilities
    path: ErrorCounts = field(default_factory=ErrorCounts)  # phonemes of the decoded diphones

    def __add__(self, other: SessionScore) -> SessionScore:
        return SessionScore(*(getattr(self, n) + getattr(other, n) for n in vars(self)))

    def rates(self, diphones: bool) -> dict[str, Any]:
        """DER and PER (PER alone for a phoneme model), loss, trials."""
        parts = {"PER": self.classes}
        if diphones:
            parts = {"DER": self.classes, "PER": self.phonemes, "PER_path": self.path}
        return {
            **{name: part.rate for name, part in parts.items()},
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
        per_session: session name to its rates.
        n_trials, seconds: size and duration of the pass.
        logits: per trial [T', C] float16 with its index in the manifest, when they were kept.
    """

    der: float
    per: float
    per_path: float | None
    ctc_loss: float
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
        self,
        sessions: Sequence[str],
        n_classes: int,
        label_form: str | None = "self_loop",
        ctc_kernel: str = "auto",
    ) -> None:
        self.sessions = list(sessions)
        self.ctc_kernel = ctc_kernel
        self.diphones = n_classes == N_DIPHONES
        self.label_form = cast(LabelForm | None, label_form)
        self.scores: dict[int, SessionScore] = {}
        self._pending: list[dict[str, Any]] = []

    def add(self, logits: torch.Tensor, batch: Any, frame_lengths: torch.Tensor) -> None:
        """Take one batch: logits [B, T', C] and labels on the device, lengths on the CPU."""
        log_probs = logits.float().log_softmax(-1)
        pending: dict[str, Any] = {
            "frames": frame_lengths,
            "nll": ctc_nll(
                log_probs, batch.labels, frame_lengths, batch.label_lengths, self.ctc_kernel
            ),
            "classes": log_probs.argmax(-1).to(torch.int16),
            "labels": (batch.labels.to(torch.int16), batch.label_lengths),
            "days": batch.day_indices,
        }
        if self.diphones:
            # the best phoneme needs no logarithm: sums of probabilities, as marginalise_log_probs
            marginal = log_probs.exp_().unflatten(-1, (N_PHONEMES, N_PHONEMES)).sum(-2)
            pending["phonemes"] = marginal.argmax(-1).to(torch.int16)
            phonemes = batch.phoneme_labels.to(torch.int16)
            pending["phoneme_labels"] = (phonemes, batch.phoneme_lengths)
        self._pending.append(pending)

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
        kinds = ("classes", "phonemes", "path") if self.diphones else ("classes",)
        return ValidationResult(
            der=total.classes.rate,
            per=rates["PER"],
            per_path=rates.get("PER_path"),
            ctc_loss=rates["CTC_loss"],
            per_session={self.sessions[d]: scores[d].rates(self.diphones) for d in days},
            counts={name: asdict(getattr(total, name)) for name in kinds},
            n_trials=total.n_trials,
        )

    def _score(self, pending: dict[str, Any]) -> None:
        frames = pending["frames"].numpy()
        decoded = merge_frames(pending["classes"].cpu().numpy(), frames)
        references = _unpad(*pending["labels"])
        if self.diphones:
            marginal = merge_frames(pending["phonemes"].cpu().numpy(), frames)
            spoken = _unpad(*pending["phoneme_labels"])
        nats = pending["nll"].tolist()
        for trial, day in enumerate(pending["days"].tolist()):
            score = self.scores.setdefault(day, SessionScore())
            score.n_trials += 1
            score.n_frames += int(frames[trial])
            score.nats.append(nats[trial])
            score.classes += ErrorCounts.between(references[trial], decoded[trial])
            if self.diphones:
                path = collapse_to_phonemes(decoded[trial], self.label_form)
                score.phonemes += ErrorCounts.between(spoken[trial], marginal[trial])
                score.path += ErrorCounts.between(spoken[trial], path)


def _unpad(labels: torch.Tensor, lengths: torch.Tensor) -> list[list[int]]:
    return [
        row[:length] for row, length in zip(labels.cpu().tolist(), lengths.tolist(), strict=True)
    ]


def evaluate(
    inference: Inference,
    dataset: EvaluationDatasetS3,
    sessions: Sequence[str],
    *,
    keep_logits: bool = False,
    stop: Callable[[], bool] | None = None,
    gather: Callable[[Any], list[Any]] = lambda own: [own],
) -> ValidationResult | None:
    """Score every trial of `dataset`, as validation during training does.

    Args:
        sessions: names in day-layer order.
        keep_logits: also return every trial's logits, [T', C] float16 on the CPU by manifest index.
        stop: asked between batches; when it says True the pass is given up.
        gather: every process's part from this one's, when processes share the pass.

    Returns:
        The scores, or None when the pass was given up.
    """
    started = time.perf_counter()
    meter = ValidationMeter(
        sessions, inference.model.n_classes, dataset.manifest.label_form, inference.ctc_kernel
    )
    kept: dict[int, torch.Tensor] = {}
    with closing(inference.over(dataset)) as batches:
        for batch, logits, frames in batches:
            if stop is not None and stop():
                return None
            if keep_logits:
                indices = batch.trial_indices.tolist()
                for index, own, length in zip(indices, logits, frames.tolist(), strict=True):
                    kept[index] = own[:length].half().cpu()
            meter.add(logits, batch, frames)
    result = meter.result(gather)
    result.seconds = time.perf_counter() - started
    if keep_logits:
        result.logits = {i: own for part in gather(kept) for i, own in part.items()}
    return result


# --- evaluation: every trial by itself ------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class DecodedTrial:
    """What the model said about one trial, beside what was said.

    Attributes:
        index: into `TrialManifest.trials`.
        record: the trial.
        reference: phoneme ids; None without labels.
        hypothesis: phoneme ids decoded from (marginalised) phoneme probabilities.
        phoneme_log_probs: [T', 41] float32.
        class_reference, class_hypothesis: diphone ids; None for a 41-class model. No reference,
            either, where the labels are in another form than the model's.
        path: phoneme ids that the decoded diphones stand for; None for a 41-class model.
        class_log_probs: [T', n_classes] float32, for chosen trials only.
    """

    index: int
    record: TrialRecord
    reference: list[int] | None
    hypothesis: list[int]
    phoneme_log_probs: np.ndarray
    class_reference: list[int] | None = None
    class_hypothesis: list[int] | None = None
    path: list[int] | None = None
    class_log_probs: np.ndarray | None = None

    @classmethod
    def of_phonemes(
        cls, index: int, record: TrialRecord, log_probs: np.ndarray, **classes: Any
    ) -> DecodedTrial:
        """A trial from its phoneme log-probabilities [T', 41], which are decoded here."""
        return cls(
            index=index,
            record=record,
            reference=None if record.phoneme_ids is None else record.phoneme_ids.tolist(),
            hypothesis=merge_frames(log_probs.argmax(-1)[None], np.array([len(log_probs)]))[0],
            phoneme_log_probs=log_probs,
            **classes,
        )


def decode_trials(
    inference: Inference,
    dataset: EvaluationDatasetS3,
    *,
    keep_classes: Collection[int] = (),
    label_form: LabelForm | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> list[DecodedTrial]:
    """Decode every trial of `dataset` greedily.

    Args:
        dataset: with or without labels.
        keep_classes: trials, by index, whose class log-probabilities are kept too.
        label_form: of the model's diphones; None: that of the data.
        progress: told after each batch how many trials it had.

    Returns:
        One entry per trial, in the manifest's order.
    """
    manifest = dataset.manifest
    form = label_form or ("transition" if manifest.label_form == "transition" else "self_loop")
    n_classes = inference.model.n_classes
    comparable = manifest.n_classes == n_classes and manifest.label_form == form
    decoded: list[DecodedTrial] = []
    with closing(inference.over(dataset)) as batches:
        for batch, logits, frames in batches:
            log_probs, lengths = logits.float().log_softmax(-1), frames.tolist()
            diphones = n_classes == N_DIPHONES
            phonemes = (marginalise_log_probs(log_probs) if diphones else log_probs).cpu().numpy()
            classes = greedy_decode(log_probs, frames) if diphones else []
            for row, index in enumerate(batch.trial_indices.tolist()):
                record, n = manifest.trials[index], lengths[row]
                about: dict[str, Any] = {}
                if diphones:
                    labels = record.class_ids if comparable else None
                    about = {
                        "class_reference": None if labels is None else labels.tolist(),
                        "class_hypothesis": classes[row],
                        "path": collapse_to_phonemes(classes[row], form),
                    }
                if index in keep_classes:
                    about["class_log_probs"] = log_probs[row, :n].cpu().numpy()
                own = phonemes[row, :n].copy()
                decoded.append(DecodedTrial.of_phonemes(index, record, own, **about))
            progress(len(batch))
    return sorted(decoded, key=lambda trial: trial.index)
