"""What decoded trials add up to: rates with intervals, groups, confusions, a rival's difference."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..dataset.manifest import TrialManifest
from ..errors import DataError
from ..labels.phonemes import BLANK, PHONEMES
from ..labels.pronunciation import normalise_text
from ..labels.recording_blocks import corpus_of
from ..model.trained_model import ModelArtefact
from ..storage.locations import shortened
from .decoding import DecodedTrial, total_errors
from .error_rates import (
    align,
    bootstrap_interval,
    compare_paired,
    confusion_matrix,
    length_group,
    rates_by,
    worst_diphones,
)
from .sentences import training_sentences

RATES = ("DER", "PER", "PER (diphone path)", "WER")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One model's results on one split, or those of several models together.

    Attributes:
        artefact: the model; of an ensemble the first.
        data: where the trials were read from.
        split: "val", "test" or "train".
        manifest: of the dataset.
        trials: in the manifest's order.
        seconds: of the pass over the trials.
        examples: class log-probabilities [T', C] of the trials to look at, by index.
        words: facts about the decoder of words and its weights, where words were decoded.
        nbest: rows of nbest.csv, where more than one hypothesis was asked for.
        remarks: one sentence for everything left out, and for every doubt about the numbers.
        job: facts about the training job, for people: name, instance, duration, cost.
        members: of an ensemble, each on the trials of the whole.
        comparison: with another model, as `compare` gives it.
    """

    artefact: ModelArtefact
    data: str
    split: str
    manifest: TrialManifest
    trials: list[DecodedTrial]
    seconds: float
    examples: Mapping[int, np.ndarray] = field(default_factory=dict)
    words: Mapping[str, str] | None = None
    nbest: Sequence[Mapping[str, Any]] = ()
    remarks: tuple[str, ...] = ()
    job: Mapping[str, str] = field(default_factory=dict)
    members: tuple[Evaluation, ...] = ()
    comparison: Mapping[str, Any] | None = None

    @property
    def model(self) -> str:
        """What was evaluated, by its location, or those of an ensemble."""
        return " + ".join(one.artefact.location for one in self.members or (self,))

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Rates with intervals, counts, groups; plain types."""
        summary = summarise(self.trials, set(training_sentences(self.manifest)))
        if self.words is not None:
            scored = sum("WER" in trial.errors for trial in self.trials)
            count = f"{scored:,} of {len(self.trials):,} trials, those with a sentence"
            summary["words"] = {**self.words, "Scored": count}
        if self.members:
            summary["members"] = [
                {
                    "model": member.artefact.location,
                    "step": member.artefact.step,
                    "rates": member.summary.get("rates", {}),
                }
                for member in self.members
            ]
        if self.comparison is not None:
            summary["comparison"] = self.comparison
        return summary


def summarise(trials: Sequence[DecodedTrial], trained_on: Collection[str] = ()) -> dict[str, Any]:
    """Everything the report and summary.json say about decoded trials, as plain types.

    Without labels only the number of trials is known.

    Args:
        trained_on: normalised sentences of the training split, for rates on seen and unseen ones.
    """
    groups: dict[str, Callable[[DecodedTrial], str]] = {
        "session": lambda t: t.record.session,
        "corpus": corpus_name,
        "block": lambda t: f"{t.record.session} block {t.record.block_num}",
        "length": lambda t: length_group(len(t.reference)) if t.reference else "unknown",
    }
    if trained_on:
        groups["sentence"] = lambda t: seen_in_training(t, trained_on)
    by_rate: dict[str, dict[str, Any]] = {"rates": {}, "counts": {}, "groups": {}}
    for name in RATES:
        scored = [trial for trial in trials if name in trial.errors]
        if not scored:
            continue
        total = _edits_and_labels(scored, name)
        by_rate["rates"][name] = bootstrap_interval(*total)
        by_rate["counts"][name] = asdict(total_errors(scored, name))
        by_rate["groups"][name] = {
            kind: rates_by([key(trial) for trial in scored], *total) for kind, key in groups.items()
        }
    summary: dict[str, Any] = {"n_trials": len(trials)}
    if by_rate["rates"]:
        summary |= by_rate
    if "PER" in by_rate["rates"]:
        alignments = [align(t.reference, t.hypothesis) for t in trials if t.reference]
        summary["confusion"] = confusion_matrix(p for pairs in alignments for p in pairs).tolist()
        summary["worst_diphones"] = [
            {
                "diphone": diphone_name(*diphone),
                "rate": errors / tokens,
                "errors": errors,
                "tokens": tokens,
            }
            for diphone, errors, tokens in worst_diphones(alignments)
        ]
    return summary


def seen_in_training(trial: DecodedTrial, trained_on: Collection[str]) -> str:
    """Whether a trial's sentence is among the normalised sentences of the training split."""
    if not trial.record.sentence_label:
        return "unknown"
    return "seen" if normalise_text(trial.record.sentence_label) in trained_on else "unseen"


def compare(
    trials: Sequence[DecodedTrial], other: Sequence[DecodedTrial], other_name: str
) -> dict[str, Any]:
    """A model's trials against another model's, per error rate that both have.

    Only trials that both decoded count; the others are listed under `left_out`, by reason.

    Raises:
        DataError: no labelled trial in common.
    """
    this_one = {t.index: t for t in trials if t.reference}
    other_one = {t.index: t for t in other if t.reference}
    shared = sorted(this_one.keys() & other_one.keys())
    if not shared:
        raise DataError(
            "The two models share no labelled trial to be compared on: use --split val and models "
            "trained on the same sessions."
        )
    metrics = {}
    for name in RATES:
        pairs = [(this_one[i], other_one[i]) for i in shared]
        both = [pair for pair in pairs if all(name in trial.errors for trial in pair)]
        if both:
            errors, labels = _edits_and_labels([trial for trial, _ in both], name)
            errors_other, _ = _edits_and_labels([trial for _, trial in both], name)
            metrics[name] = compare_paired(errors_other, errors, labels)
    names = {t.index: t.record.name for t in (*trials, *other)}
    left_out = {
        "decoded by this model only": this_one.keys() - other_one.keys(),
        "decoded by the other model only": other_one.keys() - this_one.keys(),
        "without labels": names.keys() - this_one.keys() - other_one.keys(),
    }
    return {
        "other": other_name,
        "n_trials": len(shared),
        "left_out": {
            reason: [names[index] for index in sorted(indices)]
            for reason, indices in left_out.items()
            if indices
        },
        "metrics": metrics,
    }


def describe(summary: Mapping[str, Any]) -> list[str]:
    """The lines a person reads on the terminal."""
    lines = []
    for name, rate in summary.get("rates", {}).items():
        c = summary["counts"][name]
        lines.append(
            f"{name}: {rate['value']:.4f} (95 % interval {rate['low']:.4f} to {rate['high']:.4f}; "
            f"{c['substitutions']} substitutions, {c['deletions']} deletions, "
            f"{c['insertions']} insertions in {c['reference_labels']} labels)"
        )
    if not lines:
        lines.append(f"{summary['n_trials']} trials without labels: no error rates")
    comparison = summary.get("comparison")
    if comparison is None:
        return lines
    left_out = (
        f"; {len(names):,} left out, {reason} ({shortened(names)})"
        for reason, names in comparison["left_out"].items()
    )
    lines.append(
        f"Compared on the {comparison['n_trials']:,} trials that both models decoded"
        + "".join(left_out)
    )
    for name, c in comparison["metrics"].items():
        d = c["difference"]
        lines.append(
            f"{name} against {comparison['other']}: {c['rate_b']:.4f} vs {c['rate_a']:.4f}, "
            f"difference {d['value']:+.4f} ({d['low']:+.4f} to {d['high']:+.4f}), "
            f"p = {c['p_value']:.2g}"
        )
    return lines


def corpus_name(trial: DecodedTrial) -> str:
    """The corpus of a trial's block, from the file or from the public description."""
    record = trial.record
    return record.corpus or corpus_of(record.session, record.block_num) or "unknown"


def diphone_name(previous: int, current: int) -> str:
    """ "K→AE"; "#" is the boundary of the sentence."""
    names = ["#" if p == BLANK else PHONEMES[p].strip() for p in (previous, current)]
    return "→".join(names)


def _edits_and_labels(trials: Sequence[DecodedTrial], rate: str) -> tuple[list[int], list[int]]:
    errors = [trial.errors[rate] for trial in trials]
    return [e.edits for e in errors], [e.reference_labels for e in errors]
