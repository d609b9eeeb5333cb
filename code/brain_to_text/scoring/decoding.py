"""What a model says about trials, greedily decoded: the one pass of validation and evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..dataset.manifest import TrialManifest
from ..dataset.trial_record import TrialRecord
from ..errors import DataError
from ..labels.diphones import N_DIPHONES, LabelForm, collapse_to_phonemes, marginalise_log_probs
from ..labels.phonemes import N_PHONEMES, phoneme_symbols
from ..labels.pronunciation import normalise_text
from ..model.augmentations import Augmentation
from ..model.losses import ctc_nll
from ..model.rnn_model import GRUDecoder
from ..model.trained_model import ModelArtefact
from ..storage.locations import shortened
from ..streaming.batch import Batch, pad_features
from ..streaming.dataset_s3 import EvaluationDatasetS3
from .error_rates import ErrorCounts


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


def greedy_decode(classes: np.ndarray, frame_lengths: np.ndarray) -> list[list[int]]:
    """CTC's mapping from frames to labels: repeats merged, then blanks dropped.

    Args:
        classes: [B, T'] ids of the best class of each frame.
        frame_lengths: [B]; frames beyond a trial's own do not count.
    """
    label = np.ones(classes.shape, dtype=bool)
    label[:, 1:] = classes[:, 1:] != classes[:, :-1]
    label &= (classes != 0) & (np.arange(classes.shape[1]) < frame_lengths[:, None])
    labels = classes[label].tolist()
    ends = np.cumsum(label.sum(1)).tolist()
    return [labels[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


# --- what comes of it -----------------------------------------------------------------------------


def _no_frames() -> np.ndarray:
    return np.empty((0, N_PHONEMES), np.float32)


@dataclass(frozen=True, eq=False)
class DecodedTrial:
    """What a model decoded from one trial, beside what was spoken.

    Attributes:
        index: into `TrialManifest.trials`.
        record: the trial.
        reference: phoneme ids; None without labels.
        hypothesis: phoneme ids decoded from (marginalised) phoneme probabilities.
        phoneme_log_probs: [T', 41] float32; [0, 41] where they were not asked for.
        class_reference, class_hypothesis: diphone ids; None for a 41-class model. No reference,
            either, where the labels are in another form than the model's.
        path: phoneme ids that the decoded diphones stand for; None for a 41-class model.
        n_frames: T'.
        nats: CTC loss, summed over the frames; None where it was not asked for.
        sentence: the decoded words, normalised; None where words were not decoded.
    """

    index: int
    record: TrialRecord
    reference: list[int] | None
    hypothesis: list[int]
    phoneme_log_probs: np.ndarray = field(default_factory=_no_frames)
    class_reference: list[int] | None = None
    class_hypothesis: list[int] | None = None
    path: list[int] | None = None
    n_frames: int = 0
    nats: float | None = None
    sentence: str | None = None

    @cached_property
    def errors(self) -> dict[str, ErrorCounts]:
        """Edits by error rate (DER, PER, PER of the diphone path, WER), where there are labels."""
        spoken = words = None
        if self.sentence is not None:
            spoken = normalise_text(self.record.sentence_label or "").split()
            words = self.sentence.split()
        sides: dict[str, tuple[Sequence[Hashable] | None, Sequence[Hashable] | None]] = {
            "DER": (self.class_reference, self.class_hypothesis),
            "PER": (self.reference, self.hypothesis),
            "PER (diphone path)": (self.reference, self.path),
            "WER": (spoken, words),
        }
        return {
            name: ErrorCounts.between(reference, hypothesis)
            for name, (reference, hypothesis) in sides.items()
            if reference and hypothesis is not None
        }


@dataclass(frozen=True, eq=False)
class DecodedSplit:
    """One pass of a model over the trials of a split.

    Attributes:
        trials: in the manifest's order.
        seconds: of the pass.
        logits: per trial [T', C] float16 by its index in the manifest, where they were asked for.
    """

    trials: list[DecodedTrial]
    seconds: float = 0.0
    logits: dict[int, torch.Tensor] | None = None

    @cached_property
    def numbers(self) -> dict[str, Any]:
        """A validation in numbers, as metrics.jsonl has them.

        der (of a 41-class model its PER), per, per_path (diphones alone), ctc_loss in nats per
        output frame, per_session, counts, n_trials, seconds. The same in any order of the trials
        and for any number of processes.
        """
        names = {"classes": "PER"}
        if any(trial.class_hypothesis is not None for trial in self.trials):
            names = {"classes": "DER", "phonemes": "PER", "path": "PER (diphone path)"}
        by_session: dict[str, list[DecodedTrial]] = {}
        for trial in self.trials:
            by_session.setdefault(trial.record.session, []).append(trial)
        rates = _rates(self.trials)
        numbers = {
            "der": rates.get(names["classes"], math.nan),
            "per": rates.get("PER", math.nan),
            "per_path": rates.get("PER_path"),
            "ctc_loss": rates["CTC_loss"],
            "per_session": {session: _rates(trials) for session, trials in by_session.items()},
            "counts": {name: asdict(total_errors(self.trials, of)) for name, of in names.items()},
            "n_trials": len(self.trials),
            "seconds": self.seconds,
        }
        return {name: value for name, value in numbers.items() if value is not None}


def total_errors(trials: Iterable[DecodedTrial], rate: str) -> ErrorCounts:
    """The edits of all trials together."""
    return sum((t.errors[rate] for t in trials if rate in t.errors), ErrorCounts())


def _rates(trials: Sequence[DecodedTrial]) -> dict[str, Any]:
    """DER and PER (PER alone for a phoneme model), loss and number of trials."""
    names = dict.fromkeys(name for trial in trials for name in trial.errors)
    rates: dict[str, Any] = {
        name.replace(" (diphone path)", "_path"): total_errors(trials, name).rate for name in names
    }
    n_frames = sum(trial.n_frames for trial in trials)
    nats = math.fsum(trial.nats or 0.0 for trial in trials)
    return rates | {"CTC_loss": nats / max(n_frames, 1), "n_trials": len(trials)}


# --- the pass -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Waiting:
    """What is left of a batch until the pass is over, on the device: two bytes a frame and output.

    Attributes:
        indices, frames: [B] on the CPU.
        classes, phonemes: [B, T'] int16, the best of each frame.
        nats: [B] float32, or None.
        log_probs: [B, T', 41] float32 of phonemes on the CPU, or None.
    """

    indices: torch.Tensor
    frames: torch.Tensor
    classes: torch.Tensor
    phonemes: torch.Tensor
    nats: torch.Tensor | None
    log_probs: np.ndarray | None

    def answers(self) -> Iterator[dict[str, Any]]:
        """Of each trial the fields of `DecodedTrial` that the model decides."""
        frames = self.frames.numpy()
        classes = greedy_decode(self.classes.cpu().numpy(), frames)
        phonemes = classes
        if self.phonemes is not self.classes:
            phonemes = greedy_decode(self.phonemes.cpu().numpy(), frames)
        nats = [None] * len(frames) if self.nats is None else self.nats.tolist()
        for row, (index, n) in enumerate(zip(self.indices.tolist(), frames.tolist(), strict=True)):
            answer = {"index": index, "n_frames": n, "nats": nats[row], "hypothesis": phonemes[row]}
            if phonemes is not classes:
                answer["class_hypothesis"] = classes[row]
            if self.log_probs is not None:
                answer["phoneme_log_probs"] = self.log_probs[row, :n].copy()
            yield answer


def decode(
    inference: Inference,
    dataset: EvaluationDatasetS3,
    *,
    label_form: LabelForm | None = None,
    loss: bool = False,
    probabilities: bool = False,
    keep_logits: bool = False,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], object] = lambda count: None,
    gather: Callable[[Any], list[Any]] = lambda part: [part],
) -> DecodedSplit | None:
    """Decode every trial of `dataset` greedily: validation, evaluation and reports alike.

    With `loss` alone nothing waits for the device before the last batch was handed to it.

    Args:
        dataset: with labels, or without where no loss is asked for.
        label_form: of the model's diphones; None: that of the data.
        loss: compute the CTC loss, too.
        probabilities: keep phoneme log-probabilities, too.
        keep_logits: keep every trial's logits, too.
        stop: asked between batches; when it says True the pass is given up.
        progress: told after each batch how many trials it had.
        gather: every process's part from this one's, when processes share the pass.

    Returns:
        All trials, of every process; None when the pass was given up.
    """
    started = time.perf_counter()
    waiting: list[_Waiting] = []
    logits_of: dict[int, torch.Tensor] = {}
    with closing(inference.over(dataset)) as batches:
        for batch, logits, frames in batches:
            if stop():
                return None
            if keep_logits:
                indices = batch.trial_indices.tolist()
                for index, row, n in zip(indices, logits, frames.tolist(), strict=True):
                    logits_of[index] = row[:n].half().cpu()
            waiting.append(_best(logits, batch, frames, inference, loss, probabilities))
            progress(len(batch.trial_indices))
    parts = gather([answer for batch in waiting for answer in batch.answers()])
    answers = sorted((a for part in parts for a in part), key=lambda answer: answer["index"])
    trials = [_trial(answer, dataset.manifest, label_form) for answer in answers]
    merged = {i: row for part in gather(logits_of) for i, row in part.items()}
    return DecodedSplit(trials, time.perf_counter() - started, merged if keep_logits else None)


def _best(
    logits: torch.Tensor,
    batch: Batch,
    frames: torch.Tensor,
    inference: Inference,
    loss: bool,
    probabilities: bool,
) -> _Waiting:
    """Of a batch's logits [B, T', C] the best class and phoneme of each frame, and what else was
    asked for."""
    log_probs = logits.float().log_softmax(-1)
    nats = None
    if loss:
        assert batch.labels is not None and batch.label_lengths is not None
        kernel = inference.ctc_kernel
        nats = ctc_nll(log_probs, batch.labels, frames, batch.label_lengths, kernel)
    classes = phonemes = log_probs.argmax(-1).to(torch.int16)
    if logits.shape[-1] == N_DIPHONES:
        log_probs = marginalise_log_probs(log_probs)
        phonemes = log_probs.argmax(-1).to(torch.int16)
    of_phonemes = log_probs.cpu().numpy() if probabilities else None
    return _Waiting(batch.trial_indices, frames, classes, phonemes, nats, of_phonemes)


def _trial(
    answer: dict[str, Any], manifest: TrialManifest, model_form: LabelForm | None
) -> DecodedTrial:
    record, diphones = manifest.trials[answer["index"]], answer.get("class_hypothesis")
    labels = path = None
    if diphones is not None:
        form = model_form or ("transition" if manifest.label_form == "transition" else "self_loop")
        path = collapse_to_phonemes(diphones, form)
        if manifest.n_classes == N_DIPHONES and model_form in (None, manifest.label_form):
            labels = record.class_ids
    return DecodedTrial(
        record=record,
        reference=None if record.phoneme_ids is None else record.phoneme_ids.tolist(),
        class_reference=None if labels is None else labels.tolist(),
        path=path,
        **answer,
    )


# --- a notebook's way -----------------------------------------------------------------------------


def decode_features(
    model: ModelArtefact,
    trials: Sequence[np.ndarray],
    session: str,
    device: torch.device | str = "cpu",
) -> list[str]:
    """Decode trials of one session, as `input_features` of the data holds them.

    Args:
        model: as `open_model` gives it.
        trials: arrays [T, C], z-scored bins of 20 ms.
        session: whose day layer is used.
        device: to compute on.

    Returns:
        The phonemes of each trial, e.g. "HH AH L OW |".

    Raises:
        DataError: the model has no such session, or a trial has another shape.
    """
    if session not in model.sessions:
        raise DataError(
            f"{model.location} has no day layer for {session}: give one of its "
            f"{len(model.sessions)} sessions ({shortened(model.sessions)})."
        )
    dataset, patch = model.config.dataset, model.config.model.patch_size
    columns = None if dataset.feature_subset is None else np.array(dataset.feature_subset)
    inference = Inference(model.build(device), Augmentation(dataset.data_transforms))
    day = torch.tensor([model.sessions.index(session)])
    phonemes: list[str] = []
    for number, trial in enumerate(trials):
        if trial.ndim != 2 or len(trial) < patch or trial.shape[1] != dataset.neural_dim:
            raise DataError(
                f"Trial {number} has the shape {trial.shape}: give [bins, features] with at least "
                f"{patch} bins and {dataset.neural_dim} features."
            )
        features, length = pad_features([trial], feature_subset=columns), torch.tensor([len(trial)])
        batch = Batch(0, features, length, None, None, None, None, day, torch.tensor([number]))
        log_probs = inference.logits(batch.to(device)).float().log_softmax(-1)
        if log_probs.shape[-1] == N_DIPHONES:
            log_probs = marginalise_log_probs(log_probs)
        frames = inference.model.frame_lengths(length)
        ids = greedy_decode(log_probs.argmax(-1).cpu().numpy(), frames.numpy())[0]
        phonemes.append(" ".join(phoneme_symbols(ids)))
    return phonemes
