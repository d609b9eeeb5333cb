"""What a model says about each trial: sequences, their confidences, probabilities over time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from ..dataset.manifest import TrialManifest, TrialRecord
from ..labels.diphones import N_DIPHONES, LabelForm, collapse_to_phonemes, marginalise_log_probs
from ..labels.phonemes import BLANK
from ..model.augmentations import Augmentation
from ..model.losses import ctc_nll
from ..model.rnn_model import GRUDecoder
from ..model.trial_logits import TrialLogits
from ..streaming.batch import Batch
from ..streaming.dataset_s3 import EvaluationDatasetS3
from .decoding import merge_frames


@dataclass(frozen=True, eq=False)
class DecodedTrial:
    """What the model said about one trial, beside what was said.

    Attributes:
        index: into `TrialManifest.trials`.
        record: the trial.
        reference: phoneme ids; None without labels.
        hypothesis: phoneme ids decoded from (marginalised) phoneme probabilities.
        confidences: [len(hypothesis)] mean probability of each phoneme over its frames.
        class_reference, class_hypothesis: diphone ids; None for a 41-class model. No reference,
            either, where the labels are in another form than the model's.
        path: phoneme ids that the decoded diphones stand for; None for a 41-class model.
        phoneme_log_probs: [T', 41] float32.
        class_log_probs: [T', n_classes] float32, for chosen trials only.
        nats: CTC negative log-likelihood of the labels; None without labels of the model's classes
            and form.
    """

    index: int
    record: TrialRecord
    reference: list[int] | None
    hypothesis: list[int]
    confidences: np.ndarray
    class_reference: list[int] | None
    class_hypothesis: list[int] | None
    path: list[int] | None
    phoneme_log_probs: np.ndarray
    class_log_probs: np.ndarray | None
    nats: float | None


@torch.no_grad()
def decode_trials(
    model: GRUDecoder,
    augmentation: Augmentation,
    dataset: EvaluationDatasetS3,
    *,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    keep_classes: Collection[int] = (),
    label_form: LabelForm | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[DecodedTrial]:
    """Decode every trial of `dataset` greedily.

    Args:
        model: on the dataset's device; its training mode is restored afterwards.
        augmentation: only its smoothing is used.
        dataset: with or without labels.
        autocast: the precision of the forward pass.
        keep_classes: trials, by index, whose class log-probabilities are kept too.
        label_form: of the model's diphones; None: that of the data.
        progress: told after each batch how many trials it had.

    Returns:
        One entry per trial, in the manifest's order.
    """
    decoded: list[DecodedTrial] = []
    was_training = model.training
    model.eval()
    logits_of = TrialLogits(model, augmentation, autocast)
    try:
        with dataset.batches() as batches:
            for batch in batches:
                for rows, logits in logits_of(batch):
                    decoded += _decode_rows(
                        logits, rows, batch, model, dataset.manifest, keep_classes, label_form
                    )
                if progress is not None:
                    progress(len(batch))
    finally:
        model.train(was_training)
    return sorted(decoded, key=lambda trial: trial.index)


def _decode_rows(
    logits: torch.Tensor,
    rows: slice,
    batch: Batch,
    model: GRUDecoder,
    manifest: TrialManifest,
    keep_classes: Collection[int],
    label_form: LabelForm | None,
) -> Iterator[DecodedTrial]:
    log_probs = logits.float().log_softmax(-1)
    diphones = logits.shape[-1] == N_DIPHONES
    frames = model.frame_lengths(batch.n_time_steps[rows])
    lengths = frames.numpy()
    form = label_form
    if form is None:
        form = "transition" if manifest.label_form == "transition" else "self_loop"
    same_classes = manifest.n_classes == logits.shape[-1]
    if diphones:
        same_classes = same_classes and manifest.label_form == form
    nats: list[float | None] = [None] * len(logits)
    if batch.labels is not None and batch.label_lengths is not None and same_classes:
        targets, target_lengths = batch.labels[rows], batch.label_lengths[rows]
        nats = ctc_nll(log_probs, targets, frames, target_lengths).tolist()
    phonemes = (marginalise_log_probs(log_probs) if diphones else log_probs).cpu().numpy()
    hypotheses = merge_frames(phonemes.argmax(-1), lengths)
    classes: list[list[int]] = []
    if diphones:
        classes = merge_frames(log_probs.argmax(-1).cpu().numpy(), lengths)
    for row, index in enumerate(batch.trial_indices[rows].tolist()):
        record = manifest.trials[index]
        own = phonemes[row, : lengths[row]].copy()
        kept = log_probs[row, : lengths[row]].cpu().numpy() if index in keep_classes else None
        labels = record.class_ids if diphones and same_classes else None
        yield DecodedTrial(
            index=index,
            record=record,
            reference=None if record.phoneme_ids is None else record.phoneme_ids.tolist(),
            hypothesis=hypotheses[row],
            confidences=token_confidences(own),
            class_reference=None if labels is None else labels.tolist(),
            class_hypothesis=classes[row] if diphones else None,
            path=collapse_to_phonemes(classes[row], form) if diphones else None,
            phoneme_log_probs=own,
            class_log_probs=kept,
            nats=nats[row],
        )


def token_confidences(log_probs: np.ndarray) -> np.ndarray:
    """Confidence of each greedily decoded label: its mean probability over the frames it won.

    Args:
        log_probs: [T', C] normalised.

    Returns:
        [number of decoded labels] float64, in 0 … 1.
    """
    best = log_probs.argmax(-1)
    if not len(best):
        return np.zeros(0)
    run = np.cumsum(np.concatenate([[True], best[1:] != best[:-1]])) - 1
    probability = np.exp(log_probs.max(-1).astype(np.float64))
    mean = np.bincount(run, probability) / np.bincount(run)
    label = best[np.unique(run, return_index=True)[1]]
    return np.minimum(mean[label != BLANK], 1.0)


def example_trials(manifest: TrialManifest, trials: Sequence[int], most: int) -> list[int]:
    """Up to `most` trials to look at: the middle ones of sessions spread over the recording."""
    by_session: dict[str, list[int]] = {}
    for index in trials:
        by_session.setdefault(manifest.trials[index].session, []).append(index)
    sessions = sorted(by_session)
    places = np.unique(np.linspace(0, len(sessions) - 1, min(most, len(sessions))).round())
    return [by_session[sessions[int(p)]][len(by_session[sessions[int(p)]]) // 2] for p in places]
