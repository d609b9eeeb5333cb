"""How recordings change from one session to the next, channel by channel.

Three things are compared. Means and standard deviations per channel: in z-scored data they should
hardly move. And the correlations between channels, which z-scoring leaves alone: they show
electrodes that moved or took on other neurons, which is what a decoder's day layers make up for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .hdf5_reader import DATA_FILE, ChannelSums, FileInspection

MEAN_MOVED = 0.25  # standard deviations by which a mean must move to count
STD_MOVED = 1.5  # factor by which a standard deviation must change to count
SURE = 4.5  # standard errors: by chance, one of 150,000 channels moves as far
SILENT = 1e-3  # standard deviation of z-scored features below which a channel says nothing
MUCH_DRIFT = 0.2  # share of channels that may move before a warning


@dataclass(frozen=True)
class SessionDrift:
    """One session against the one before it.

    Attributes:
        before, session: their names.
        mean_shift: root mean square over channels of the means' differences, in deviations.
        mean_moved: channels whose mean moved by MEAN_MOVED and by SURE standard errors, which come
            from the spread of the trials' means (bins of one trial depend on each other).
        std_shift: root mean square over channels of log2 of the ratio of standard deviations.
        std_moved: channels whose standard deviation changed by the factor STD_MOVED.
        likeness: Pearson correlation of the two sessions' correlations between channels; 1 when
            channels go together as before, near 0 for unrelated recordings; NaN for one channel.
        furthest: the channels whose means moved most: (channel, difference in deviations).
    """

    before: str
    session: str
    mean_shift: float
    mean_moved: int
    std_shift: float
    std_moved: int
    likeness: float
    furthest: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class SilentChannels:
    """Channels of a session that never change."""

    session: str
    channels: tuple[int, ...]


def sums_by_session(inspections: Sequence[FileInspection], width: int) -> dict[str, ChannelSums]:
    """Sums over all files of each session, of its trials with `width` channels, by date."""
    found: dict[str, ChannelSums] = {}
    for inspection in inspections:
        match = DATA_FILE.fullmatch(inspection.key)
        sums = inspection.channels.get(width)
        if match is None or sums is None:
            continue
        found.setdefault(match["session"], ChannelSums.none(width)).add(sums)
    return dict(sorted(found.items()))


def drift_between(sessions: Mapping[str, ChannelSums]) -> list[SessionDrift]:
    """Each session against the one before, in the order of `sessions`."""
    names = list(sessions)
    likes = {name: _correlations(sums) for name, sums in sessions.items()}
    return [
        _drift(before, after, sessions[before], sessions[after], likes[before], likes[after])
        for before, after in pairwise(names)
    ]


def silent_channels(sessions: Mapping[str, ChannelSums]) -> list[SilentChannels]:
    """Sessions with channels that never change, though others of the session do."""
    found = []
    for name, sums in sessions.items():
        _, std = _mean_and_std(sums)
        silent = np.flatnonzero(std < SILENT)
        if silent.size:
            found.append(SilentChannels(name, tuple(silent.tolist())))
    return found


def _drift(
    before: str,
    session: str,
    old: ChannelSums,
    new: ChannelSums,
    old_likes: np.ndarray,
    new_likes: np.ndarray,
) -> SessionDrift:
    (old_mean, old_std), (new_mean, new_std) = _mean_and_std(old), _mean_and_std(new)
    pooled = np.maximum(np.sqrt((old_std**2 + new_std**2) / 2), SILENT)
    shift = (new_mean - old_mean) / pooled
    error = np.sqrt(_variance_of_mean(old) + _variance_of_mean(new)) / pooled
    ratio = np.log2(np.maximum(new_std, SILENT) / np.maximum(old_std, SILENT))
    order = np.argsort(-np.abs(shift), kind="stable")[:3]
    return SessionDrift(
        before,
        session,
        mean_shift=_root_mean_square(shift),
        mean_moved=int(((np.abs(shift) > MEAN_MOVED) & (np.abs(shift) > SURE * error)).sum()),
        std_shift=_root_mean_square(ratio),
        std_moved=int((np.abs(ratio) > math.log2(STD_MOVED)).sum()),
        likeness=_likeness(old_likes, new_likes),
        furthest=tuple((int(c), float(shift[c])) for c in order),
    )


def _mean_and_std(sums: ChannelSums) -> tuple[np.ndarray, np.ndarray]:
    mean = sums.of_bins / sums.bins
    return mean, np.sqrt(np.maximum(sums.of_bins_squared / sums.bins - mean**2, 0))


def _variance_of_mean(sums: ChannelSums) -> np.ndarray:
    """[C] of the mean of trial means; infinite for one trial, which says nothing about spread."""
    n = sums.trials
    if n < 2:
        return np.full(len(sums.of_trials), np.inf)
    mean = sums.of_trials / n
    return np.maximum(sums.of_trials_squared / n - mean**2, 0) / (n - 1)


def _correlations(sums: ChannelSums) -> np.ndarray:
    """[C (C - 1) / 2] between channels about zero, the mean of z-scored data; 0 for silent ones."""
    scale = np.sqrt(np.diag(sums.products).astype(np.float64))
    scale[scale == 0] = np.inf
    matrix = sums.products / np.outer(scale, scale)
    return matrix[np.triu_indices(len(matrix), 1)].astype(np.float32)


def _likeness(one: np.ndarray, other: np.ndarray) -> float:
    if one.size < 2 or one.std() == 0 or other.std() == 0:
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])


def _root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))
