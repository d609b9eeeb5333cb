"""Check a whole dataset, every trial of every file, before anything is trained on it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from ..log_lines import one_line
from ..storage.locations import MANIFEST_NAME, data_files
from ..storage.store import ObjectInfo, ObjectStore
from ..storage.targets import RECORD_NAME
from .copies import repeated_features, repeated_numbers, sketch_of
from .hdf5_reader import DATA_FILE, FileInspection
from .indexing import inspect_dataset, manifest_from_inspections
from .label_check import labels_against_sentences
from .manifest import TrialManifest
from .manifest_format import SPLITS
from .selection import ctc_problem
from .trial_record import Finding, TrialRecord

PATCH_SIZE, PATCH_STRIDE, RANDOM_CUT = 14, 4, 3  # of the reference recipe
_EXTREME_VALUE = 100.0  # z-scored features stay far below
_STD_RANGE = (0.5, 2.0)  # of z-scored features over a whole file
_ODD_PACE = 5.0  # times slower or faster per phoneme than the median trial
_SCATTERED = 1.05  # bytes of a span per byte of its chunks; HDF5's index between them takes less
_KNOWN_COMPANION = re.compile(rf"{re.escape(RECORD_NAME)}|.*\.(md|txt|csv|json|html)")


@dataclass(frozen=True)
class ValueStatistics:
    """Sums over features, from which means and deviations are combined."""

    count: int = 0
    total: float = 0.0
    total_of_squares: float = 0.0
    minimum: float = np.inf
    maximum: float = -np.inf

    @staticmethod
    def of(features: np.ndarray) -> ValueStatistics:
        """Of one trial [T, C]."""
        flat = features.reshape(-1).astype(np.float32, copy=False)
        return ValueStatistics(
            flat.size,
            float(flat.sum(dtype=np.float64)),
            float(np.dot(flat, flat)),
            float(flat.min()),
            float(flat.max()),
        )

    @staticmethod
    def merged(parts: Sequence[ValueStatistics]) -> ValueStatistics:
        """Of all parts together."""
        return ValueStatistics(
            sum(p.count for p in parts),
            sum(p.total for p in parts),
            sum(p.total_of_squares for p in parts),
            min((p.minimum for p in parts), default=np.inf),
            max((p.maximum for p in parts), default=-np.inf),
        )

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else np.nan

    @property
    def std(self) -> float:
        if not self.count:
            return np.nan
        return float(np.sqrt(max(self.total_of_squares / self.count - self.mean**2, 0.0)))


def look_at(features: np.ndarray) -> tuple[ValueStatistics, np.ndarray]:
    """A trial's [T, C] value statistics, and how it looks from afar."""
    return ValueStatistics.of(features), sketch_of(features)


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
    notes: list[str] = field(default_factory=list)

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
            "splits": [_json_numbers(asdict(row)) for row in self.rows],
            "errors": [asdict(finding) for finding in self.errors],
            "warnings": [asdict(finding) for finding in self.warnings],
            "notes": self.notes,
        }

    def to_text(self, most: int = 20) -> str:
        """A table of sessions and splits, then at most `most` findings of each kind."""
        lines = [
            f"{self.url}: {len(self.manifest.sessions)} sessions, "
            f"{len(self.manifest.trials):,} sound trials, {self.manifest.n_features} features, "
            f"{self.manifest.n_classes} classes, {self.manifest.label_form} labels",
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
        for note in self.notes:
            lines.append(one_line(f"Note: {note}"))
        for title, findings in (("ERROR", self.errors), ("Warning", self.warnings)):
            by_kind: dict[str, list[Finding]] = defaultdict(list)
            for finding in findings:
                by_kind[finding.kind].append(finding)
            for kind, group in by_kind.items():
                lines += [one_line(f"{title} ({kind}): {finding}") for finding in group[:most]]
                if len(group) > most:
                    lines.append(f"{title} ({kind}): and {len(group) - most} more; see --json")
        verdict = "nothing to repair" if not self.errors else "repair these, or exclude them"
        lines.append(f"{len(self.errors)} errors, {len(self.warnings)} warnings: {verdict}")
        return "\n".join(lines)


def validate_dataset(
    store: ObjectStore,
    *,
    patch_size: int = PATCH_SIZE,
    patch_stride: int = PATCH_STRIDE,
    random_cut: int = RANDOM_CUT,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ValidationReport:
    """Read every file whole and check everything that a training run relies on.

    Schema and types, finite values, labels against phonemes and label form, room for CTC at the
    given patching, labels against sentences, repeated trials within and between splits, missing
    files, the manifest.

    Args:
        processes: worker processes; None decides by size.
        progress: called with (files done, files in all).

    Raises:
        StorageError: the place cannot be read. DataError: there are no data files.
        ConfigError: patches of no bins.
    """
    for option, bins in (("--patch-size", patch_size), ("--patch-stride", patch_stride)):
        if bins < 1:
            raise ConfigError(f"{option} is {bins}: give at least 1 bin.")
    listing = store.list()
    files = data_files(listing, store.url)
    inspections = inspect_dataset(store, files, processes, look=look_at, progress=progress)
    manifest = manifest_from_inspections(files, inspections)
    findings = list(manifest.damaged)
    findings += [f for i in inspections for f in i.findings if f.severity != "error"]
    findings += _infeasible(manifest.trials, patch_size, patch_stride, random_cut)
    looks = (
        (r.name, look) for i in inspections for r, look in zip(i.records, i.looks, strict=True)
    )
    findings += repeated_features(manifest.trials, {name: sketch for name, (_, sketch) in looks})
    findings += repeated_numbers(manifest.trials)
    findings += _missing_files(files)
    findings += _unknown_files(listing)
    findings += scattered_chunks(manifest.trials)
    findings += _odd_values(inspections)
    findings += _odd_pace(manifest.trials)
    findings += labels_against_sentences(manifest.trials)
    findings += _manifest_state(store, manifest, listing)
    findings.sort(key=lambda f: (f.severity != "error", f.key, f.trial or ""))
    shared, notes = _shared_sentences(manifest.trials)
    return ValidationReport(
        store.url, manifest, _summaries(manifest, inspections), findings, shared, notes
    )


def _summaries(
    manifest: TrialManifest, inspections: Sequence[FileInspection]
) -> list[SplitSummary]:
    by_file: dict[str, list[TrialRecord]] = defaultdict(list)
    for trial in manifest.trials:
        by_file[trial.key].append(trial)
    rows = []
    for inspection in inspections:
        match = DATA_FILE.fullmatch(inspection.key)
        assert match is not None  # keys come from data_files
        trials = by_file[inspection.key]
        bins = [trial.n_time_steps for trial in trials] or [0]
        labels = [0 if t.class_ids is None else len(t.class_ids) for t in trials] or [0]
        values = ValueStatistics.merged([look[0] for look in inspection.looks] if trials else [])
        rows.append(
            SplitSummary(
                match["session"],
                match["split"],
                len(trials),
                len({f.trial for f in manifest.damaged if f.key == inspection.key}),
                (min(bins), float(np.mean(bins)), max(bins)),
                (float(np.mean(labels)), max(labels)),
                values.mean,
                values.std,
                values.minimum,
                values.maximum,
            )
        )
    return sorted(rows, key=lambda row: (row.session, SPLITS.index(row.split)))


def _infeasible(
    trials: Sequence[TrialRecord], patch_size: int, patch_stride: int, random_cut: int
) -> Iterator[Finding]:
    for trial in (trial for trial in trials if trial.class_ids is not None):
        reason = ctc_problem(trial, patch_size, patch_stride, random_cut)
        if reason is not None:
            yield Finding(trial.key, trial.trial, reason, "infeasible for CTC")


def _missing_files(files: Mapping[str, ObjectInfo]) -> Iterator[Finding]:
    splits: dict[str, set[str]] = defaultdict(set)
    for key in files:
        session, _, name = key.partition("/")
        splits[session].add(name.removeprefix("data_").removesuffix(".hdf5"))
    for session, found in sorted(splits.items()):
        if "train" not in found:
            reason = f"is missing, though the session has data_{sorted(found)[0]}.hdf5"
            yield Finding(f"{session}/data_train.hdf5", None, reason, "missing file")
    if not any("val" in found for found in splits.values()):
        reason = "no session has it, so that nothing can be validated"
        yield Finding("data_val.hdf5", None, reason, "missing file")


def _unknown_files(listing: Mapping[str, ObjectInfo]) -> Iterator[Finding]:
    for key in listing:
        if (
            not DATA_FILE.fullmatch(key)
            and key != MANIFEST_NAME
            and not _KNOWN_COMPANION.match(key)
        ):
            reason = "is not SESSION/data_{train,val,test}.hdf5 and is not used"
            yield Finding(key, None, reason, "unknown file", "warning")


def scattered_chunks(trials: Sequence[TrialRecord]) -> Iterator[Finding]:
    """Files whose trials lie between each other, so that the one GET of a trial reads others too.

    Files come to be so when trials are appended to in turns, or when a dataset is rewritten in
    place.
    """
    by_file: dict[str, list[TrialRecord]] = defaultdict(list)
    for trial in trials:
        if trial.length > _SCATTERED * trial.stored_bytes:
            by_file[trial.key].append(trial)
    for key, scattered in by_file.items():
        times = sum(t.length for t in scattered) / sum(t.stored_bytes for t in scattered)
        reason = (
            f"the chunks of {len(scattered)} trials lie apart, so that reading them takes "
            f"{times:.1f} times their bytes: rewrite the files with "
            "'python code/prepare_dataset.py encode'"
        )
        yield Finding(key, None, reason, "scattered chunks", "warning")


def _odd_values(inspections: Sequence[FileInspection]) -> Iterator[Finding]:
    for inspection in inspections:
        values = ValueStatistics.merged([look[0] for look in inspection.looks])
        if not values.count:
            continue
        if not _STD_RANGE[0] <= values.std <= _STD_RANGE[1]:
            reason = (
                f"its features have a standard deviation of {values.std:.3g}: are they z-scored?"
            )
            yield Finding(inspection.key, None, reason, "odd values", "warning")
        elif max(-values.minimum, values.maximum) > _EXTREME_VALUE:
            reason = f"its features range from {values.minimum:.4g} to {values.maximum:.4g}"
            yield Finding(inspection.key, None, reason, "odd values", "warning")


def _odd_pace(trials: Sequence[TrialRecord]) -> Iterator[Finding]:
    """Trials far slower or faster than the rest: a wrong sentence, a pause, a cut-off end."""
    spoken = [t for t in trials if t.phoneme_ids is not None]
    paces = np.array([t.n_time_steps / len(t.phoneme_ids) for t in spoken])  # type: ignore[arg-type]
    median = float(np.median(paces)) if len(paces) else 1.0
    for trial, pace in zip(spoken, paces.tolist(), strict=True):
        if not median / _ODD_PACE <= pace <= median * _ODD_PACE:
            reason = f"has {pace:.1f} bins per phoneme where the median trial has {median:.1f}"
            yield Finding(trial.key, trial.trial, reason, "odd pace", "warning")


def _json_numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """NaN and infinity, which JSON lacks, as None."""
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()}


def _manifest_state(
    store: ObjectStore, found: TrialManifest, listing: Mapping[str, ObjectInfo]
) -> Iterator[Finding]:
    again = f"type 'python code/prepare_dataset.py index {store.url}'"
    if MANIFEST_NAME not in listing:
        reason = f"is not there, so that every job would index first: {again}"
        yield Finding(MANIFEST_NAME, None, reason, "manifest", "warning")
        return
    try:
        kept = TrialManifest.from_bytes(store.read(MANIFEST_NAME))
        kept.check_fresh(listing, store.url)
    except DataError as error:
        yield Finding(MANIFEST_NAME, None, str(error).rstrip("."), "manifest")
        return
    if kept.fingerprint() != found.fingerprint():
        reason = f"does not describe the trials that are there: {again}"
        yield Finding(MANIFEST_NAME, None, reason, "manifest")


def _shared_sentences(trials: Sequence[TrialRecord]) -> tuple[int, list[str]]:
    spoken: dict[str, set[str]] = {split: set() for split in SPLITS}
    for trial in trials:
        if trial.sentence_label:
            spoken[trial.split].add(trial.sentence_label.strip().lower())
    shared = len(spoken["train"] & spoken["val"])
    if not shared:
        return 0, []
    note = f"{shared} of {len(spoken['val'])} validation sentences also occur in training"
    return shared, [note]
