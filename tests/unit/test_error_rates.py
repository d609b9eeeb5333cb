"""Error statistics against independent computations and against simulated truth."""

from __future__ import annotations

import itertools

import jiwer
import numpy as np
from brain_to_text.scoring.error_rates import (
    ErrorCounts,
    align,
    bootstrap_interval,
    compare_paired,
)
from hypothesis import given
from hypothesis import strategies as st

PHONEME_SEQUENCES = st.lists(st.integers(1, 6), max_size=12)


def corrupted(random: np.random.Generator, reference: list[int]) -> list[int]:
    hypothesis = []
    for token in reference:
        draw = random.random()
        if draw < 0.1:
            continue
        hypothesis.append(int(random.integers(1, 41)) if draw < 0.25 else token)
        if draw > 0.95:
            hypothesis.append(int(random.integers(1, 41)))
    return hypothesis


def test_rates_equal_jiwer_exactly():
    random = np.random.default_rng(0)
    references = [random.integers(1, 41, random.integers(1, 40)).tolist() for _ in range(200)]
    hypotheses = [corrupted(random, reference) for reference in references]
    total = sum(
        (ErrorCounts.between(r, h) for r, h in zip(references, hypotheses, strict=True)),
        ErrorCounts(),
    )
    as_words = [" ".join(map(str, sequence)) for sequence in references + hypotheses]
    expected = jiwer.process_words(as_words[:200], as_words[200:])
    assert total.rate == expected.wer
    assert total.edits == expected.substitutions + expected.deletions + expected.insertions


@given(PHONEME_SEQUENCES, PHONEME_SEQUENCES)
def test_alignment_spells_both_sequences_and_costs_the_edit_distance(reference, hypothesis):
    pairs = align(reference, hypothesis)
    assert [r for r, _ in pairs if r is not None] == reference
    assert [h for _, h in pairs if h is not None] == hypothesis
    assert sum(r != h for r, h in pairs) == ErrorCounts.between(reference, hypothesis).edits


def test_intervals_cover_the_truth_at_their_stated_rate():
    random = np.random.default_rng(1)
    truth, covered, repeats = 0.2, 0, 400
    for repeat in range(repeats):
        tokens = random.integers(10, 50, size=40)
        # trials differ in difficulty, so errors are overdispersed as in real sessions
        difficulty = random.beta(2, 8, size=40)
        errors = random.binomial(tokens, difficulty)
        interval = bootstrap_interval(errors, tokens, resamples=800, seed=repeat)
        covered += interval["low"] <= truth <= interval["high"]
    # standard error of the coverage: sqrt(0.95 * 0.05 / 400) = 0.011
    assert 0.915 <= covered / repeats <= 0.985


def test_paired_test_is_uniform_under_the_null_and_finds_a_real_difference():
    random = np.random.default_rng(2)
    p_values = []
    for repeat in range(200):
        tokens = random.integers(10, 50, size=60)
        difficulty = random.beta(2, 8, size=60)
        a, b = random.binomial(tokens, difficulty), random.binomial(tokens, difficulty)
        p_values.append(compare_paired(a, b, tokens, resamples=400, seed=repeat)["p_value"])
    assert 0.01 <= np.mean(np.array(p_values) < 0.05) <= 0.10
    better = random.binomial(tokens, 0.6 * difficulty)
    comparison = compare_paired(a, better, tokens)
    assert comparison["p_value"] < 0.01
    assert comparison["difference"]["high"] < 0
    assert comparison["trials_better"] > comparison["trials_worse"]


def test_few_differing_trials_give_the_share_of_sign_patterns():
    difference = np.array([-3, -2, -1, 2, 0, 0])
    a = np.full(6, 5)
    observed = abs(difference.sum())
    patterns = itertools.product((-1, 1), repeat=4)
    expected = np.mean([abs(np.dot(p, difference[:4])) >= observed for p in patterns])
    p_value = compare_paired(a, a + difference, np.full(6, 20))["p_value"]
    assert abs(p_value - expected) < 0.02, "four standard errors of 10,000 draws"


def test_equal_models_differ_by_nothing():
    comparison = compare_paired([1, 2, 3], [1, 2, 3], [10, 10, 10])
    assert comparison["p_value"] == 1.0
    assert comparison["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
