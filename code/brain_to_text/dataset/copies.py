"""Find trials that occur twice: by what their features look like, and by their numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .trial_record import Finding, TrialRecord

_SAME_FEATURES = 1e-3  # standard deviations by which copies' means may differ


def sketch_of(features: np.ndarray) -> np.ndarray:
    """How a trial [T, C] looks from afar: [n + 1] float64.

    Means over up to 4 parts of its time × 8 parts of its channels, then the standard deviation:
    copies are found by them, because they hardly feel how features are stored or rounded.
    """
    rows, columns = (
        np.linspace(0, size, min(size, parts) + 1).astype(int)
        for size, parts in zip(features.shape, (4, 8), strict=True)
    )
    sums = np.add.reduceat(features, rows[:-1], axis=0, dtype=np.float64)
    sums = np.add.reduceat(sums, columns[:-1], axis=1)
    means = sums / np.outer(np.diff(rows), np.diff(columns))
    return np.append(means, features.std(dtype=np.float64))


def repeated_features(
    trials: Sequence[TrialRecord], sketches: Mapping[str, np.ndarray]
) -> Iterator[Finding]:
    """Trials whose features are those of a trial before, however both are stored.

    Args:
        sketches: `sketch_of` each trial, by its name.
    """
    alike: dict[tuple[int, int], list[TrialRecord]] = defaultdict(list)
    for trial in trials:
        alike[trial.n_time_steps, trial.n_features].append(trial)
    for group in alike.values():
        table = np.stack([sketches[trial.name] for trial in group])
        for place, trial in enumerate(group):
            near = _SAME_FEATURES * table[place, -1] + 1e-9
            same = np.flatnonzero((np.abs(table[:place] - table[place]) <= near).all(axis=1))
            if not same.size:
                continue
            first = group[int(same[0])]
            stored_alike = (trial.crc32, trial.length) == (first.crc32, first.length)
            reason = f"has the same features as {first.name}"
            if not stored_alike:
                reason += " (stored otherwise, or the same within a thousandth)"
            between = first.split != trial.split
            if between:
                reason += f": {trial.split} is not independent of {first.split}"
            severity = "error" if between else "warning"
            yield Finding(trial.key, trial.trial, reason, "duplicate trial", severity)


def repeated_numbers(trials: Sequence[TrialRecord]) -> Iterator[Finding]:
    """Block and trial numbers used twice in a session."""
    by_number: dict[tuple[Any, ...], TrialRecord] = {}
    for trial in trials:
        number = (trial.session, trial.block_num, trial.trial_num)
        first = by_number.setdefault(number, trial)
        if first is trial:
            continue
        reason = (
            f"is block {trial.block_num} trial {trial.trial_num} of its session, like {first.name}"
        )
        labels, earlier = trial.class_ids, first.class_ids
        if labels is not None and earlier is not None and np.array_equal(labels, earlier):
            reason += ", with the same labels"
        yield Finding(trial.key, trial.trial, reason, "repeated number", "warning")
