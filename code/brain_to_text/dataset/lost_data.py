"""Recordings that were lost while they were made: what no sound recording looks like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import Finding
from ..storage.locations import dataset_command, shortened

LOST = "lost data"  # kind of these findings
# Neighbouring bins of sound features, z-scored or counted, differ in some channel.
_STUCK_BINS = 25  # half a second
_LARGEST = 1e4  # standard deviations; z-scored features stay below a hundred


class LostData:
    """Looks at the trials of one file, one after the other.

    Args:
        key: of the file.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._first: np.ndarray | None = None
        self._constant = np.zeros(0, bool)
        self._n_bins = 0

    def in_trial(self, trial: str, features: np.ndarray) -> list[Finding]:
        """What was lost in a trial's features [T, C], if anything."""
        reason = _lost(features)
        if reason is not None:
            return [Finding(self._key, trial, reason, LOST, "warning")]
        if self._first is None:
            self._first, self._constant = features[0], np.ones(features.shape[1], bool)
        if self._constant.shape == features[0].shape:
            self._constant &= (features == self._first).all(axis=0)
            self._n_bins += len(features)
        return []

    def in_file(self) -> list[Finding]:
        """What was lost in all of its trials: channels that never change."""
        dead = np.flatnonzero(self._constant).tolist()
        if not dead or self._n_bins < _STUCK_BINS:
            return []
        which = shortened([str(channel) for channel in dead])
        reason = f"{len(dead)} of {self._constant.size} features never change: {which}"
        return [Finding(self._key, None, reason, LOST, "warning")]


def lost_sentence(findings: Sequence[Finding], url: str) -> str:
    """One line that names what was lost in a dataset."""
    return (
        f"Warning: data seems to be lost in {shortened([str(f) for f in findings])}; see all with "
        f"{dataset_command('validate', url)}, leave trials out by dataset.bad_trials_dict"
    )


def _lost(features: np.ndarray) -> str | None:
    largest = max(float(features.max()), -float(features.min()))
    if largest == 0:
        return "all its features are zero"
    if largest > _LARGEST:
        return f"its features reach {largest:.3g}: are they z-scored?"
    changes = np.flatnonzero((features[1:] != features[:-1]).any(axis=1)) + 1
    starts, ends = np.append(0, changes), np.append(changes, len(features))
    longest = int(np.argmax(ends - starts))
    first, last = int(starts[longest]), int(ends[longest]) - 1
    if last - first + 1 < min(_STUCK_BINS, max(len(features), 2)):
        return None
    return f"bins {first} to {last} of {len(features)} are all the same"
