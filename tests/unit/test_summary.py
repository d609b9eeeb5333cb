"""What a summary says about trials made by hand is what one counts by hand."""

from __future__ import annotations

import pytest
from brain_to_text.errors import DataError
from brain_to_text.labels.phonemes import phoneme_ids
from brain_to_text.scoring.error_rates import bootstrap_interval
from brain_to_text.scoring.evaluate import example_trials
from brain_to_text.scoring.summary import compare, describe, summarise
from support.decoded_trials import decoded, record

FIRST, SECOND = "t15.2023.08.11", "t15.2023.08.13"
LONG = [1, 2] * 6  # 12 phonemes: another group of lengths


def trials():
    """Four trials. Errors: PER 1, 0, 2, 1 of 3, 2, 12, 2; DER 1, 0, 3, 0; path 0, 1, 0, 2."""
    rows = [  # phonemes, diphones, path; session, block, corpus
        ([1, 2, 3], [1, 9, 3], ([5, 6, 7], [5, 6]), [1, 2, 3], FIRST, 2, "one"),
        ([1, 2], [1, 2], ([5, 6], [5, 6]), [1], FIRST, 3, "one"),
        (LONG, [9, 9, *LONG[2:]], (LONG, [7, 7, 7, *LONG[3:]]), LONG, SECOND, 2, "two"),
        ([1, 2], [1], ([5], [5]), [], SECOND, 2, "one"),
    ]
    found = []
    for index, (reference, hypothesis, classes, path, session, block, corpus) in enumerate(rows):
        trial = record(session, index, block=block, corpus=corpus)
        found.append(decoded(index, reference, hypothesis, of=trial, classes=classes, path=path))
    return found


def test_rates_counts_and_intervals():
    summary = summarise(trials())
    errors = {"DER": ([1, 0, 3, 0], [3, 2, 12, 1]), "PER": ([1, 0, 2, 1], [3, 2, 12, 2])}
    errors["PER (diphone path)"] = ([0, 1, 0, 2], [3, 2, 12, 2])
    assert list(summary["rates"]) == list(errors)
    for name, (edits, labels) in errors.items():
        assert summary["rates"][name] == bootstrap_interval(edits, labels)
        assert summary["rates"][name]["value"] == sum(edits) / sum(labels)
        assert summary["rates"][name]["low"] < summary["rates"][name]["value"]
        assert summary["rates"][name]["value"] < summary["rates"][name]["high"]
    assert summary["counts"]["PER"] == {
        "substitutions": 3,
        "deletions": 1,
        "insertions": 0,
        "reference_labels": 19,
    }


def test_every_rate_is_grouped_with_intervals():
    groups = summarise(trials())["groups"]
    for rate, kind, expected in (
        ("PER", "session", {FIRST: (1, 5, 2), SECOND: (3, 14, 2)}),
        ("PER", "corpus", {"one": (2, 7, 3), "two": (2, 12, 1)}),
        ("PER", "length", {"01–10": (2, 7, 3), "11–20": (2, 12, 1)}),
        ("DER", "session", {FIRST: (1, 5, 2), SECOND: (3, 13, 2)}),
        ("PER (diphone path)", "length", {"01–10": (3, 7, 3), "11–20": (0, 12, 1)}),
    ):
        rows = groups[rate][kind]
        found = {name: (r["errors"], r["tokens"], r["n_trials"]) for name, r in rows.items()}
        assert found == expected
        for row in rows.values():
            assert row["value"] == row["errors"] / row["tokens"]
            assert row["low"] <= row["value"] <= row["high"]
    assert list(groups["PER"]["block"]) == [
        *(f"{FIRST} block {n}" for n in (2, 3)),
        f"{SECOND} block 2",
    ]


def test_the_worst_diphones_come_first_by_name():
    k, ae, t, s = phoneme_ids(["K", "AE", "T", "S"]).tolist()
    heard = [[k, t], [k, ae, s], [k, ae, s], *[[k, ae, t]] * 3]
    rows = summarise([decoded(i, [k, ae, t], one) for i, one in enumerate(heard)])["worst_diphones"]
    assert rows == [
        {"diphone": "AE→T", "rate": 2 / 6, "errors": 2, "tokens": 6},
        {"diphone": "K→AE", "rate": 1 / 6, "errors": 1, "tokens": 6},
    ]


def test_confusions_are_reference_by_hypothesis():
    matrix = summarise(trials())["confusion"]
    assert matrix[2][9] == 2 and matrix[1][9] == 1
    assert matrix[2][0] == 1, "a deletion"
    assert matrix[9][2] == 0


def test_without_labels_there_are_only_trials():
    assert summarise([decoded(0, None, [1])]) == {"n_trials": 1}


# --- comparison -----------------------------------------------------------------------------------


def test_this_model_is_compared_against_the_other_and_not_the_reverse():
    better = [decoded(i, [1, 2, 3, 4], [1, 2, 3, 4] if i else [1, 2, 3, 5]) for i in range(5)]
    worse = [decoded(i, [1, 2, 3, 4], [1, 9, 9, 4] if i else [1, 2, 3, 4]) for i in range(5)]
    comparison = compare(better, worse, "last week")
    row = comparison["metrics"]["PER"]
    assert comparison["other"] == "last week"
    assert (row["rate_a"], row["rate_b"]) == (8 / 20, 1 / 20)
    assert row["difference"]["value"] == pytest.approx(-7 / 20)
    assert (row["trials_better"], row["trials_worse"]) == (4, 1)
    said = describe({**summarise(better), "comparison": comparison})
    assert said[-1].startswith("PER against last week: 0.0500 vs 0.4000, difference -0.3500 (")
    assert said[-2] == "Compared on the 5 trials that both models decoded"


def test_trials_that_only_one_model_decoded_are_named():
    both = [decoded(0, [1, 2], [1, 2]), decoded(1, [1, 2], [1])]
    mine = [*both, decoded(2, [1], [1]), decoded(5, None, [1])]
    theirs = [*both, decoded(3, [1], [1]), decoded(4, [1], [1])]
    comparison = compare(mine, theirs, "other")
    assert comparison["n_trials"] == 2
    assert comparison["left_out"] == {
        "decoded by this model only": [record(trial=2).name],
        "decoded by the other model only": [record(trial=3).name, record(trial=4).name],
        "without labels": [record(trial=5).name],
    }
    said = "\n".join(describe({**summarise(mine), "comparison": comparison}))
    assert "Compared on the 2 trials that both models decoded; 1 left out" in said
    assert record(trial=4).name in said


def test_nothing_in_common_is_an_error():
    with pytest.raises(DataError, match="share no labelled trial"):
        compare([decoded(0, [1], [1])], [decoded(1, [1], [1])], "other")


# --- what a person reads on the terminal ----------------------------------------------------------


def test_the_terminal_has_every_rate_with_its_interval_and_edits():
    summary = summarise(trials())
    lines = describe(summary)
    per = summary["rates"]["PER"]
    assert lines[1] == (
        f"PER: 0.2105 (95 % interval {per['low']:.4f} to {per['high']:.4f}; 3 substitutions, "
        "1 deletions, 0 insertions in 19 labels)"
    )
    assert [line.split(":")[0] for line in lines] == ["DER", "PER", "PER (diphone path)"]
    assert describe({"n_trials": 3}) == ["3 trials without labels: no error rates"]


def test_the_worst_trials_are_shown_first_then_typical_ones():
    hypotheses = [
        [1, 2, 3, 4],
        [9, 9, 9, 9],
        [1, 2, 9, 9],
        [1, 2, 3, 9],
        [1, 9, 9, 9],
        [1, 2, 3, 9],
    ]
    trials = [decoded(index, [1, 2, 3, 4], hyp) for index, hyp in enumerate(hypotheses)]
    assert example_trials(trials) == [1, 4, 2, 3]
    unlabelled = [decoded(index, None, [1]) for index in range(9)]
    assert example_trials(unlabelled) == [0, 2, 5, 8], "without labels spread over the recording"
