"""What a decoder got wrong, and how sure one may be of it: alignment, intervals, paired tests.

Everything works on counts per trial. An error rate is token-weighted (all errors over all reference
tokens) and its uncertainty comes from resampling trials, the unit in which the data was recorded.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein

from ..labels.phonemes import BLANK, N_PHONEMES

LEVEL = 0.95  # coverage of intervals
N_RESAMPLES = 10_000
_BLOCK = 4_000_000  # random numbers drawn at once


@dataclass
class ErrorCounts:
    """Edits summed over trials; `rate` is edits per reference label (above 1 is possible)."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference_labels: int = 0

    @classmethod
    def between(cls, reference: Sequence[Any], hypothesis: Sequence[Any]) -> ErrorCounts:
        """The edits of one cheapest alignment of two label sequences."""
        counts = {"replace": 0, "delete": 0, "insert": 0}
        for operation in Levenshtein.editops(reference, hypothesis):
            counts[operation.tag] += 1
        return cls(counts["replace"], counts["delete"], counts["insert"], len(reference))

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(*(getattr(self, n) + getattr(other, n) for n in vars(self)))

    @property
    def edits(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        return self.edits / self.reference_labels if self.reference_labels else float("nan")


# --- alignment ------------------------------------------------------------------------------------


def align(
    reference: Sequence[Hashable], hypothesis: Sequence[Hashable]
) -> list[tuple[Any | None, Any | None]]:
    """A minimum-edit alignment as (reference token, hypothesis token); None for a missing side."""
    return [
        pair
        for block in Levenshtein.opcodes(reference, hypothesis)
        for pair in itertools.zip_longest(
            reference[block.src_start : block.src_end],
            hypothesis[block.dest_start : block.dest_end],
        )
    ]


# --- uncertainty ----------------------------------------------------------------------------------


def bootstrap_interval(
    errors: Sequence[int] | np.ndarray,
    tokens: Sequence[int] | np.ndarray,
    *,
    resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> dict[str, float]:
    """Token-weighted rate (value) and its interval (low, high) over trials drawn with replacement.

    Where resampling says nothing there is a bound instead. Without any error it is the exact
    binomial bound on trials with an error (Clopper & Pearson 1934), at one error in each of them.
    Of one trial every rate up to 1 is possible.

    Args:
        errors, tokens: [n_trials] counts.
        resamples: draws of n_trials trials.
        seed: of the draws; equal seeds give equal intervals.
    """
    error_counts, token_counts = np.asarray(errors), np.asarray(tokens)
    n, value = len(error_counts), float(error_counts.sum() / token_counts.sum())
    if not error_counts.any():
        trials_with_an_error = 1 - ((1 - LEVEL) / 2) ** (1 / n)
        return _interval(value, 0.0, float(trials_with_an_error / token_counts.mean()))
    if n == 1:
        return _interval(value, 0.0, max(value, 1.0))
    return _interval(value, *_resampled(error_counts, token_counts, resamples, seed))


def compare_paired(
    errors_a: Sequence[int] | np.ndarray,
    errors_b: Sequence[int] | np.ndarray,
    tokens: Sequence[int] | np.ndarray,
    *,
    resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Is model B better than model A, given both models' errors on the same trials?

    Under the null hypothesis the two models are exchangeable on every trial: the p-value is the
    share of random sign patterns of the per-trial differences that give at least the observed
    difference, the observed pattern counted among them.

    Returns:
        rate_a, rate_b; difference: rate B minus rate A as value, low and high, negative where B is
        better; p_value, two-sided; trials_better, trials_worse: where B makes fewer, or more,
        errors than A; n_trials.
    """
    a, b, token_counts = np.asarray(errors_a), np.asarray(errors_b), np.asarray(tokens)
    difference, total = b - a, int(token_counts.sum())
    value = float(difference.sum() / total)
    low, high = min(value, -1.0), max(value, 1.0)
    if len(a) > 1:
        low, high = _resampled(difference, token_counts, resamples, seed)
    return {
        "rate_a": float(a.sum() / total),
        "rate_b": float(b.sum() / total),
        "difference": _interval(value, low, high),
        "p_value": _sign_flip_p_value(difference, resamples, seed),
        "trials_better": int((difference < 0).sum()),
        "trials_worse": int((difference > 0).sum()),
        "n_trials": len(a),
    }


def _interval(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


def _resampled(
    errors: np.ndarray, tokens: np.ndarray, resamples: int, seed: int
) -> tuple[float, float]:
    """Percentiles of the rate over trials drawn with replacement, of at least two trials.

    They are taken a little further out than 2.5 and 97.5, so that few trials do not give too narrow
    an interval: the expanded percentile interval of Hesterberg, "What Teachers Should Know About
    the Bootstrap" (2015), section 3.3.
    """
    random, n, rates = np.random.default_rng(seed), len(errors), []
    for rows in _blocks(resamples, n):
        drawn = random.integers(0, n, size=(rows, n))
        totals = tokens[drawn].sum(axis=1)
        some = totals > 0
        rates.append(errors[drawn].sum(axis=1)[some] / totals[some])
    widened = _t_quantile((1 + LEVEL) / 2, n - 1) * (n / (n - 1)) ** 0.5
    tail = 1 - NormalDist().cdf(widened)
    low, high = np.quantile(np.concatenate(rates), [tail, 1 - tail])
    return float(low), float(high)


def _t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t: Abramowitz & Stegun 26.7.5, 3 digits from 5 degrees of freedom."""
    z, v = NormalDist().inv_cdf(probability), degrees
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


def _sign_flip_p_value(difference: np.ndarray, resamples: int, seed: int) -> float:
    changed = difference[difference != 0]
    observed = abs(int(changed.sum()))
    random, extreme = np.random.default_rng([seed, 1]), 0
    for rows in _blocks(resamples, changed.size):
        signs = random.integers(0, 2, size=(rows, changed.size), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ changed) >= observed).sum())
    return (extreme + 1) / (resamples + 1)


def _blocks(resamples: int, n: int) -> list[int]:
    """Sizes of the blocks in which `resamples` rows of `n` random numbers are drawn."""
    rows = _BLOCK // max(n, 1) or 1
    return [min(rows, resamples - start) for start in range(0, resamples, rows)]


# --- where the errors are -------------------------------------------------------------------------


def rates_by(
    keys: Sequence[str], errors: Sequence[int], tokens: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Per group of trials: its rate with interval, trials, tokens and errors; groups sorted."""
    names, errors_of, tokens_of = np.asarray(keys), np.asarray(errors), np.asarray(tokens)
    table = {}
    for name in sorted(set(keys)):
        group = names == name
        table[name] = {
            **bootstrap_interval(errors_of[group], tokens_of[group], resamples=2000),
            "n_trials": int(group.sum()),
            "tokens": int(tokens_of[group].sum()),
            "errors": int(errors_of[group].sum()),
        }
    return table


def length_group(tokens: int) -> str:
    """The bucket of a sentence by its reference phonemes, in tens: "01–10", "11–20", …"""
    first = 10 * max((tokens - 1) // 10, 0) + 1
    return f"{first:02d}–{first + 9:02d}"


def confusion_matrix(pairs: Iterable[tuple[int | None, int | None]]) -> np.ndarray:
    """[41, 41] int64 counts, reference by hypothesis, of aligned phonemes.

    The blank is never a label, so row 0 holds insertions and column 0 deletions.
    """
    matrix = np.zeros((N_PHONEMES, N_PHONEMES), dtype=np.int64)
    for reference, hypothesis in pairs:
        matrix[reference or BLANK, hypothesis or BLANK] += 1
    return matrix


def worst_diphones(
    alignments: Iterable[Sequence[tuple[int | None, int | None]]],
    *,
    at_least: int = 5,
    most: int = 20,
) -> list[tuple[tuple[int, int], int, int]]:
    """((previous, current) phoneme, errors, occurrences) of the highest error rates, worst first.

    `previous` is the reference phoneme before, 0 at the start; insertions belong to no diphone.
    """
    errors: Counter[tuple[int, int]] = Counter()
    tokens: Counter[tuple[int, int]] = Counter()
    for pairs in alignments:
        previous = BLANK
        for reference, hypothesis in pairs:
            if reference is not None:
                tokens[previous, reference] += 1
                errors[previous, reference] += reference != hypothesis
                previous = reference
    frequent = [diphone for diphone in tokens if tokens[diphone] >= at_least and errors[diphone]]
    frequent.sort(key=lambda d: (-errors[d] / tokens[d], -tokens[d], d))
    return [(diphone, errors[diphone], tokens[diphone]) for diphone in frequent[:most]]
