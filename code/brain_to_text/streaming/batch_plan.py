"""Which trials make up which batch: pure functions of (seed, step), the same on every machine.

Nothing here has state, reads data or knows how many workers there are. The draws use only the raw
64-bit words of a counter-based generator (Philox), whose stream numpy promises never to change;
the derived methods of `numpy.random.Generator` carry no such promise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..dataset.selection import Indices

_WORD = 2**64


class BatchPlan:
    """Training batches: a few sessions per batch, their trials drawn evenly with replacement.

    Args:
        trials_by_session: trial indices of each session, one at least, in the order of the day
            layers.
        batch_size: trials per batch, over all ranks.
        sessions_per_batch: sessions drawn without replacement per batch; all of them where there
            are fewer. Trials divide evenly; a remainder goes one each to the first ones drawn.
        seed: 0 … 2**64 - 1.
        must_include: positions in `trials_by_session` that every batch contains.
        n_time_steps: bins of every trial, by index; needed for more than one group.
        length_groups: a step draws from one of so many equal parts of each session's trials, by
            length; the part is drawn per step, so that every trial is as likely as with one.
    """

    def __init__(
        self,
        trials_by_session: Sequence[Indices],
        batch_size: int,
        sessions_per_batch: int,
        seed: int,
        must_include: Sequence[int] = (),
        *,
        n_time_steps: np.ndarray | None = None,
        length_groups: int = 1,
    ) -> None:
        self._trials = [np.asarray(trials, dtype=np.int64) for trials in trials_by_session]
        self._groups, self._bins = length_groups, n_time_steps
        if n_time_steps is not None and length_groups > 1:
            self._trials = [t[np.argsort(n_time_steps[t], kind="stable")] for t in self._trials]
        self.batch_size = batch_size
        self.seed = seed % _WORD
        self._always = np.unique(np.asarray(must_include, dtype=np.int64))
        self._optional = np.setdiff1d(np.arange(len(self._trials)), self._always)
        wanted = max(sessions_per_batch, len(self._always))
        self.sessions_per_batch = min(wanted, len(self._trials), batch_size)

    def trials(self, step: int) -> np.ndarray:
        """The batch at `step`: [batch_size] int64 trial indices, each session's contiguous."""
        bits = np.random.Philox(key=np.array([self.seed, step], dtype=np.uint64))
        order = np.argsort(bits.random_raw(len(self._optional)), kind="stable")
        drawn = np.concatenate([self._always, self._optional[order]])[: self.sessions_per_batch]
        words = bits.random_raw(self.batch_size)
        group = (int(bits.random_raw()) * self._groups) >> 64

        least, remainder = divmod(self.batch_size, len(drawn))
        counts = {int(s): least + (place < remainder) for place, s in enumerate(drawn)}
        batch: list[np.ndarray] = []
        start = 0
        for session in sorted(counts):
            stop = start + counts[session]
            batch.append(_draw(self._trials[session], words[start:stop], group, self._groups))
            start = stop
        return np.concatenate(batch)

    def bins_over_mean(self, step: int) -> float:
        """Bins of the batch at `step` over those of a mean batch; 1 where lengths are not grouped.

        The gradient of a loss that is summed over frames grows with it, and so must the norm at
        which it is clipped: else a frame of a long trial counts less than one of a short trial.
        """
        if self._bins is None or self._groups == 1:
            return 1.0
        mean = np.mean([self._bins[trials].mean() for trials in self._trials])
        return float(self._bins[self.trials(step)].mean() / mean)


def _draw(trials: np.ndarray, words: np.ndarray, group: int, groups: int) -> np.ndarray:
    """Uniform draws with replacement by multiply and shift; bias below groups x n / 2**32.

    From the `group`-th of `groups` equal parts of `trials`, which may part a trial in two.
    """
    part = (words >> np.uint64(32)) + np.uint64(group << 32)
    places = (part * np.uint64(len(trials)) // np.uint64(groups)) >> np.uint64(32)
    return trials[places.astype(np.int64)]


def evaluation_batches(
    indices: np.ndarray, n_time_steps: np.ndarray, batch_size: int
) -> list[np.ndarray]:
    """Every trial once, in batches of similar length so that little is padded.

    Args:
        indices: [n] int64 trial indices.
        n_time_steps: [n] bins of each.
        batch_size: largest batch.

    Returns:
        Batches of trial indices, longest trials first (so that memory needs show at once), in an
        order that depends on nothing else.
    """
    indices = np.asarray(indices, dtype=np.int64)
    order = np.lexsort((indices, -np.asarray(n_time_steps)))
    return [indices[order[i : i + batch_size]] for i in range(0, len(order), batch_size)]


def shard(trials: np.ndarray, n_time_steps: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The part of one global batch that belongs to one rank.

    The ranks' parts are disjoint, their union is the batch, and their sizes differ by at most one.
    A trial drawn twice stays on one rank (one read serves both), and the longest trials are dealt
    out first, each to the rank with the fewest bins, so that ranks finish together.

    Args:
        trials: [n] trial indices of the global batch.
        n_time_steps: [n] bins of each.
        rank, world_size: 0 <= rank < world_size.

    Returns:
        The rank's trial indices in the order of the global batch.
    """
    if world_size == 1:
        return trials
    least, remainder = divmod(len(trials), world_size)
    room = [least + (r < remainder) for r in range(world_size)]
    bins = [0] * world_size
    owner = np.empty(len(trials), dtype=np.int64)
    for places in _repeats_longest_first(trials, n_time_steps):
        while len(places):
            whole = [r for r in range(world_size) if room[r] >= len(places)]
            open_ranks = whole or [r for r in range(world_size) if room[r]]
            chosen = min(open_ranks, key=lambda r: (bins[r], r))
            taken, places = places[: room[chosen]], places[room[chosen] :]
            owner[taken] = chosen
            room[chosen] -= len(taken)
            bins[chosen] += int(np.asarray(n_time_steps)[taken].sum())
    return trials[owner == rank]


def _repeats_longest_first(trials: np.ndarray, n_time_steps: np.ndarray) -> list[np.ndarray]:
    """Places of each distinct trial in the batch, most repeated first, then longest first."""
    distinct, inverse = np.unique(trials, return_inverse=True)
    places = [np.flatnonzero(inverse == i) for i in range(len(distinct))]
    return sorted(places, key=lambda p: (-len(p), -int(n_time_steps[p[0]]), int(p[0])))
