"""Check a whole dataset, every trial of every file, before anything is trained on it."""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby
from operator import attrgetter
from typing import Any, TypeAlias

import numpy as np

from ..errors import DataError, Finding
from ..labels.phonemes import SILENCE
from ..labels.pronunciation import normalise_text, pronunciations_of
from ..redaction import one_line
from ..storage.locations import (
    MANIFEST_NAME,
    data_files,
    dataset_command,
    not_taken,
    session_and_split,
)
from ..storage.store import ObjectInfo, ObjectStore
from .indexing import inspect_dataset, manifest_from_inspections
from .isolation import Progress
from .manifest import TrialManifest, earlier_manifest, load_manifest
from .selection import ctc_problem
from .trial_record import TrialRecord
from .trial_table import FileTrials

_PATCHING = (14, 4, 3)  # patch size, stride and random cut of the reference recipe
_EXTREME_VALUE = 100.0  # z-scored features stay far below
_STD_RANGE = (0.5, 2.0)  # of z-scored features over a whole file
_FEW_FIT = 0.9  # share of a file's trials whose labels fit their sentences, below which we warn
_ENOUGH_TRIALS = 3  # in a file, before none that fits is an error
_ways = cache(pronunciations_of)
_SCATTERED = 1.05  # bytes of a span per byte of its chunks; HDF5's index between them takes less


_Look: TypeAlias = tuple[list[float], int]


def look_at(features: np.ndarray) -> _Look:
    """A trial [T, C]: count, sum, sum of squares, least and greatest of its values; a checksum.

    The checksum is the CRC-32 of the values in half precision: copies have the same, whichever type
    and layout they are stored in.
    """
    flat = features.reshape(-1).astype(np.float32, copy=False)
    values = flat.size, flat.sum(dtype=np.float64), np.dot(flat, flat), flat.min(), flat.max()
    with np.errstate(over="ignore"):
        half = flat.astype(np.float16)
    return [float(value) for value in values], zlib.crc32(half.tobytes())


@dataclass(frozen=True)
class SplitSummary:
    """One row of the report: the trials of one session and split.

    bins: shortest, mean and longest trial. labels: mean and most labels per trial.
    mean, std, minimum, maximum: of the feature values.
    """

    session: str
    split: str
    trials: int
    damaged: int
    bins: tuple[int, float, int]
    labels: tuple[float, int]
    mean: float
    std: float
    minimum: float
    maximum: float


@dataclass
class ValidationReport:
    """What was found. `findings` holds errors first, then warnings.

    shared_sentences: distinct sentences that occur in training and in validation.
    """

    url: str
    manifest: TrialManifest
    rows: list[SplitSummary]
    findings: list[Finding]
    shared_sentences: int = 0

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity != "error"]

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {
            "url": self.url,
            "ok": not self.errors,
            "fingerprint": self.manifest.fingerprint(),
            "sessions": len(self.manifest.sessions),
            "trials": len(self.manifest.trials),
            "n_features": self.manifest.n_features,
            "n_classes": self.manifest.n_classes,
            "label_form": self.manifest.label_form,
            "shared_sentences": self.shared_sentences,
            "splits": [
                {name: None if value != value else value for name, value in asdict(row).items()}
                for row in self.rows  # JSON lacks NaN, the mean of nothing
            ],
            "errors": [asdict(finding) for finding in self.errors],
            "warnings": [asdict(finding) for finding in self.warnings],
        }

    def to_text(self, most: int = 20) -> str:
        """A table of sessions and splits, then at most `most` findings of each kind."""
        lines = [
            self.manifest.summary(self.url),
            "",
            f"{'session':<16} {'split':<5} {'trials':>6} {'bad':>4} {'bins':>16} {'labels':>10} "
            f"{'mean':>7} {'std':>6} {'min':>7} {'max':>7}",
        ]
        for row in self.rows:
            bins = f"{row.bins[0]}…{row.bins[1]:.0f}…{row.bins[2]}"
            labels = f"{row.labels[0]:.0f}…{row.labels[1]}" if row.labels[1] else "none"
            lines.append(
                f"{row.session:<16} {row.split:<5} {row.trials:>6} {row.damaged:>4} {bins:>16} "
                f"{labels:>10} {row.mean:>7.3f} {row.std:>6.3f} {row.minimum:>7.2f} "
                f"{row.maximum:>7.2f}"
            )
        lines.append("")
        if self.shared_sentences:
            lines.append(f"Note: {self.shared_sentences} sentences of training are in val, too")
        for title, findings in (("ERROR", self.errors), ("Warning", self.warnings)):
            alike: dict[tuple[str, str], list[Finding]] = defaultdict(list)
            for finding in findings:
                alike[finding.kind, re.sub("[0-9]+", "#", finding.reason)].append(finding)
            for (kind, _), group in alike.items():
                lines += [one_line(f"{title} ({kind}): {finding}") for finding in group[:most]]
                if len(group) > most:
                    lines.append(f"{title} ({kind}): and {len(group) - most} more; see --json")
        verdict = "nothing to repair" if not self.errors else "repair these, or exclude them"
        lines.append(f"{len(self.errors)} errors, {len(self.warnings)} warnings: {verdict}")
        return "\n".join(lines)


def validate_dataset(
    store: ObjectStore,
    processes: int | None = None,
    progress: Progress = lambda done, total: None,
) -> ValidationReport:
    """Read every file whole and check everything that a training run relies on.

    Schema and types, finite values, labels against phonemes and label form, room for CTC at the
    reference recipe's patching, labels against sentences, repeated trials within and between
    splits, missing files, the manifest.

    Args:
        processes: worker processes; None decides by size.

    Raises:
        StorageError: the dataset cannot be read. DataError: there are no data files, or not
            all of them yet.
    """
    listing = store.list()
    earlier_manifest(store, listing)  # refuses an unfinished dataset
    files = data_files(listing, store.url)
    inspections = inspect_dataset(store, files, processes, look=look_at, progress=progress)
    manifest = manifest_from_inspections(files, inspections)
    trials = list(manifest.trials)
    looks = {
        record.name: look
        for inspection in inspections
        for record, look in zip(inspection.records, inspection.looks, strict=True)
    }
    rows = [
        _summary(manifest, file, trials[file.rows.start : file.rows.stop], looks)
        for file in manifest.trials.files
    ]
    findings = list(manifest.damaged)
    findings += [f for i in inspections for f in i.findings if f.severity != "error"]
    findings += _infeasible(manifest)
    findings += _repeated_features(trials, looks)
    findings += _repeated_numbers(trials)
    findings += missing_files(files)
    if not any(session_and_split(key)[1] == "val" for key in files):
        reason = "no session has it, so that nothing can be validated"
        findings.append(Finding("data_val.hdf5", None, reason, "missing file"))
    unknown = "is not SESSION/data_{train,val,test}.hdf5 and is not used"
    findings += [Finding(k, None, unknown, "unknown file", "warning") for k in not_taken(listing)]
    findings += scattered_chunks(trials)
    findings += _odd_values(rows)
    findings += _labels_against_sentences(trials)
    findings += _manifest_state(store, manifest, listing)
    findings.sort(key=lambda f: (f.severity != "error", f.key, f.trial or ""))
    return ValidationReport(store.url, manifest, rows, findings, _shared_sentences(trials))


def _summary(
    manifest: TrialManifest,
    file: FileTrials,
    trials: Sequence[TrialRecord],
    looks: Mapping[str, _Look],
) -> SplitSummary:
    values = np.array([looks[trial.name][0] for trial in trials] or [[np.nan] * 5])
    count, total, squares = values[:, :3].sum(axis=0)
    bins = [trial.n_time_steps for trial in trials] or [0]
    labels = manifest.trials.n_labels[file.rows.start : file.rows.stop].tolist() or [0]
    return SplitSummary(
        file.session,
        file.split,
        len(trials),
        len({finding.trial for finding in manifest.damaged if finding.key == file.key}),
        (min(bins), float(np.mean(bins)), max(bins)),
        (float(np.mean(labels)), max(labels)),
        float(total / count),
        float(np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0.0))),
        float(values[:, 3].min()),
        float(values[:, 4].max()),
    )


def _infeasible(manifest: TrialManifest) -> Iterator[Finding]:
    table = manifest.trials
    for file in table.files:
        for row in file.rows:
            if table.n_labels[row] and (reason := ctc_problem(table, row, *_PATCHING)):
                trial = table.name(row).rpartition(":")[2]
                yield Finding(file.key, trial, reason, "infeasible for CTC")


def _repeats(
    trials: Iterable[TrialRecord], key: Callable[[TrialRecord], object]
) -> Iterator[tuple[TrialRecord, TrialRecord]]:
    """Each trial whose key a trial before it has, too, with that one."""
    known: dict[object, TrialRecord] = {}
    for trial in trials:
        first = known.setdefault(key(trial), trial)
        if first is not trial:
            yield trial, first


def _repeated_features(
    trials: Sequence[TrialRecord], looks: Mapping[str, _Look]
) -> Iterator[Finding]:
    """Trials whose features are those of a trial before, however both are stored."""
    for trial, first in _repeats(trials, lambda t: (t.n_time_steps, looks[t.name][1])):
        reason, severity = f"has the same features as {first.name}", "warning"
        if first.split != trial.split:
            reason += f": {trial.split} is not independent of {first.split}"
            severity = "error"
        yield Finding(trial.key, trial.trial, reason, "duplicate trial", severity)


def _repeated_numbers(trials: Sequence[TrialRecord]) -> Iterator[Finding]:
    """Block and trial numbers used twice in a session."""
    for trial, first in _repeats(trials, lambda t: (t.session, t.block_num, t.trial_num)):
        reason = (
            f"is block {trial.block_num} trial {trial.trial_num} of its session, like {first.name}"
        )
        labels, earlier = trial.class_ids, first.class_ids
        if labels is not None and earlier is not None and np.array_equal(labels, earlier):
            reason += ", with the same labels"
        yield Finding(trial.key, trial.trial, reason, "repeated number", "warning")


def missing_files(keys: Iterable[str]) -> Iterator[Finding]:
    """Sessions without a file for training."""
    splits: dict[str, list[str]] = defaultdict(list)
    for session, split in sorted(map(session_and_split, keys)):
        splits[session].append(split)
    for session, found in splits.items():
        if "train" not in found:
            reason = f"is missing, though the session has data_{found[0]}.hdf5"
            yield Finding(f"{session}/data_train.hdf5", None, reason, "missing file")


def scattered_chunks(trials: Iterable[TrialRecord]) -> Iterator[Finding]:
    """Files whose trials lie between each other, so that the one GET of a trial reads others too.

    Files come to be so when trials are appended to in turns, or when a dataset is rewritten in
    place.
    """
    apart = (trial for trial in trials if trial.length > _SCATTERED * trial.stored_bytes)
    for key, group in groupby(apart, attrgetter("key")):
        scattered = list(group)
        times = sum(t.length for t in scattered) / sum(t.stored_bytes for t in scattered)
        reason = (
            f"the chunks of {len(scattered)} trials lie apart, so that reading them takes "
            f"{times:.1f} times their bytes: rewrite the files with "
            "'python code/prepare_dataset.py encode'"
        )
        yield Finding(key, None, reason, "scattered chunks", "warning")


def _odd_values(rows: Iterable[SplitSummary]) -> Iterator[Finding]:
    for row in rows:
        if row.trials and not _STD_RANGE[0] <= row.std <= _STD_RANGE[1]:
            reason = f"its features have a standard deviation of {row.std:.3g}: are they z-scored?"
        elif max(-row.minimum, row.maximum) > _EXTREME_VALUE:
            reason = f"its features range from {row.minimum:.4g} to {row.maximum:.4g}"
        else:
            continue
        key = f"{row.session}/data_{row.split}.hdf5"
        yield Finding(key, None, reason, "odd values", "warning")


def _labels_against_sentences(trials: Sequence[TrialRecord]) -> Iterator[Finding]:
    """Files whose phonemes are not those of their sentences: words are counted by the silences
    after them; where the CMU dictionary knows a word, its phonemes count, too.
    """
    both = [trial for trial in trials if trial.phoneme_ids is not None and trial.sentence_label]
    for key, group in groupby(both, attrgetter("key")):
        spoken = list(group)
        odd = [(t, reason) for t in spoken if (reason := _not_as_said(t))]
        fitting = 1 - len(odd) / len(spoken)
        if fitting >= _FEW_FIT:
            continue
        first, why = odd[0]
        reason = (
            f"the labels of {len(odd)} of {len(spoken)} trials ({1 - fitting:.0%}) do not fit "
            f"their sentences, the first {first.trial}: {why}; are they of the same trial, and "
            "numbered as in the guide?"
        )
        nothing_fits = len(odd) == len(spoken) >= _ENOUGH_TRIALS
        severity = "error" if nothing_fits else "warning"
        yield Finding(key, None, reason, "labels against sentences", severity)


def _not_as_said(trial: TrialRecord) -> str | None:
    """Why a trial's phonemes cannot be its sentence's; None if they can."""
    assert trial.phoneme_ids is not None and trial.sentence_label is not None
    ids = trial.phoneme_ids.tolist()
    ends = [position for position, phoneme in enumerate(ids) if phoneme == SILENCE]
    spoken = [tuple(ids[a:b]) for a, b in zip([0, *(e + 1 for e in ends)], ends, strict=False)]
    words = normalise_text(trial.sentence_label).split()
    if len(spoken) == len(" ".join(words).replace("-", " ").split()) > len(words):
        words = " ".join(words).replace("-", " ").split()
    if len(spoken) != len(words):
        return f"{len(spoken)} silences for the {len(words)} words of {trial.sentence_label!r}"
    known = [(word, ids) for word, ids in zip(words, spoken, strict=True) if _ways(word)]
    wrong = [word for word, ids in known if ids not in _ways(word)]
    if len(wrong) > len(known) / 2:
        return f"{wrong[0]!r} of {trial.sentence_label!r} is not pronounced so"
    return None


def _manifest_state(
    store: ObjectStore, found: TrialManifest, listing: Mapping[str, ObjectInfo]
) -> Iterator[Finding]:
    again = f"type {dataset_command('index', store.url)}"
    try:
        stored = load_manifest(store, listing)
        if stored is None:
            reason = f"is not there, so that every job would index first: {again}"
            yield Finding(MANIFEST_NAME, None, reason, "manifest", "warning")
            return
        stored.check_fresh(listing, store.url)
        if stored.fingerprint() == found.fingerprint():
            return
        reason = f"does not describe the trials that are there: {again}"
    except DataError as error:
        reason = str(error).rstrip(".")
    yield Finding(MANIFEST_NAME, None, reason, "manifest")


def _shared_sentences(trials: Sequence[TrialRecord]) -> int:
    train, val = (
        {t.sentence_label.strip().lower() for t in trials if t.split == split and t.sentence_label}
        for split in ("train", "val")
    )
    return len(train & val)
