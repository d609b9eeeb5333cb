"""Tables keep their columns, results appear whole, and every test trial keeps its row."""

from __future__ import annotations

import csv
import resource
from dataclasses import replace

import numpy as np
import pytest
from brain_to_text.errors import DataError, InUseError, StorageError
from brain_to_text.labels.diphones import N_DIPHONES
from brain_to_text.labels.phonemes import N_PHONEMES, phoneme_ids
from brain_to_text.scoring.output_files import example, result_folder, writing_to
from brain_to_text.scoring.tables import (
    rescored_sentences,
    submission_remark,
    trial_row,
    write_logits,
    write_submission,
    write_table,
)
from support.decoded_trials import decoded, manifest_of, record

FIRST, SECOND = "t15.2023.08.11", "t15.2023.08.13"


# --- tables ---------------------------------------------------------------------------------------


def test_columns_do_not_depend_on_the_first_trial(tmp_path):
    trials = [
        decoded(0, [1], [1]),
        decoded(1, [1, 2], [1], of=record(trial=1, sentence="hello world")),
    ]
    rows = [trial_row(replace(trial, sentence="hello")) for trial in trials]
    write_table(tmp_path / "table.csv", rows)
    with (tmp_path / "table.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first) == list(rows[1]), "in the fullest row's order"
    assert (first["words"], first["word_errors"]) == ("", "")
    assert (second["words"], second["word_errors"]) == ("2", "1")
    assert (first["phonemes"], second["errors"]) == ("1", "1")


def test_text_that_begins_like_a_formula_is_text(tmp_path):
    cells = ["=HYPERLINK(1)", "+1", "-x", "@a", "\tb", "'quoted", "plain", "'=not a formula"]
    write_table(tmp_path / "table.csv", [{"text": cell, "number": -1.5} for cell in cells])
    with (tmp_path / "table.csv").open(newline="") as file:
        raw = list(csv.DictReader(file))
    assert all(row["text"][0] not in "=+-@\t\r" for row in raw)
    assert {row["number"] for row in raw} == {"-1.5"}


# --- whole or not at all --------------------------------------------------------------------------


def test_results_appear_when_all_are_written_and_stale_ones_go(tmp_path):
    out = tmp_path / "new" / "out"
    for name in ("a.csv", "b.csv"):
        with result_folder(out, ["a.csv", "b.csv"]) as folder:
            (folder / name).write_text("a")
            assert not (out / name).exists()
        assert [path.name for path in out.iterdir()] == [name]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match=r"give a writable folder with --output-dir"):
            with result_folder(path):
                raise AssertionError("this shows before anything is decoded")


def test_two_evaluations_at_once_do_not_mix(tmp_path):
    with result_folder(tmp_path) as folder:
        (folder / "a.csv").write_text("first")
        with pytest.raises(InUseError, match="Another evaluation is writing"):
            with result_folder(tmp_path):
                pass
    assert (tmp_path / "a.csv").read_text() == "first"


def test_an_error_leaves_what_was_there_before(tmp_path):
    (tmp_path / "a.csv").write_text("of an earlier run")
    with pytest.raises(ValueError, match="half way"):
        with result_folder(tmp_path) as folder:
            (folder / "a.csv").write_text("half")
            raise ValueError("half way")
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    assert (tmp_path / "a.csv").read_text() == "of an earlier run"


def test_a_volume_that_fills_while_logits_are_written_is_one_sentence(tmp_path):
    """HDF5 crashes the process where it writes to the file itself."""
    trial = decoded(0, [1], [1])
    trial = replace(trial, phoneme_log_probs=np.zeros((1000, N_PHONEMES), np.float32))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, before[1]))
    try:
        with pytest.raises(StorageError, match=r"File too large\): give a writable folder"):
            with writing_to(tmp_path):
                write_logits(tmp_path / "phoneme_logits.hdf5", [trial])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- the competition's file -----------------------------------------------------------------------


def test_every_test_trial_keeps_its_row_in_the_public_order(tmp_path):
    records = [
        record(FIRST, 0, split="train"),
        record(FIRST, 0, split="test"),
        record(FIRST, 3, split="test"),  # was not decoded
        record(SECOND, 0, split="val"),
        record(SECOND, 0, split="test"),  # gave no word
        record(SECOND, 1, split="test"),
    ]
    manifest, text = manifest_of(records), {1: "one", 4: "", 5: "four"}
    trials = [replace(decoded(i, None, []), sentence=sentence) for i, sentence in text.items()]
    write_submission(tmp_path / "submission.csv", manifest, "test", trials)
    assert (tmp_path / "submission.csv").read_text() == "id,text\n0,one\n1,\n2,\n3,four\n"
    said = submission_remark(manifest, "test", trials)
    assert said.startswith("WARNING: submission.csv has 4 rows, 2 of them without text")
    assert f"{FIRST}/data_test.hdf5:trial_0003, {SECOND}/data_test.hdf5:trial_0000" in said


# --- rescored hypotheses --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("", "has no columns named 'file'"),
        ("file,hypothesis\nNAME,hi\n", "has no columns named 'score'"),
        ("file,hypothesis,score,score\nNAME,hi,1,2\n", "has 2 columns named 'score'"),
        ("file,hypothesis,score\nnobody,hi,1\n", "row 2 is about 'nobody', which is none of the 4"),
        ("file,hypothesis,score\nNAME,hi,nan\n", "row 2 has 'nan' as its score"),
        ("file,hypothesis,score\nNAME,hi,best\n", "row 2 has 'best' as its score"),
        ("file,hypothesis,score\nNAME,hi,1\n", "has no row for 3 of 4 decoded trials"),
        ('file,hypothesis,score\n"NAME,hi,1\n', "is no CSV table in UTF-8"),
        (b"file,hypothesis,score\nNAME,\xff,1\n", "is no CSV table in UTF-8"),
        ("file,hypothesis,score\nNAME,well, hi,1\n", "row 2 has more cells than columns"),
    ],
)
def test_a_table_that_cannot_be_scored_is_one_sentence(table, sentence, tmp_path):
    trials = {record(trial=i).name: i for i in range(4)}
    table = table.encode() if isinstance(table, str) else table
    path = tmp_path / "mine.csv"
    path.write_bytes(table.replace(b"NAME", record(trial=0).name.encode()))
    with pytest.raises(DataError) as caught:
        rescored_sentences(path, trials)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(StorageError, match="cannot be read"):
        rescored_sentences(tmp_path / "absent.csv", trials)


def test_the_best_score_of_each_trial_is_its_sentence(tmp_path):
    trials = {record(trial=i).name: i for i in range(2)}
    first, second = trials
    rows = [(first, "No.", -3), (second, "", -1), (first, "-Yes, it is!", -2), (first, "no", -2)]
    path = tmp_path / "mine.csv"
    write_table(path, [{"score": s, "hypothesis": h, "file": f} for f, h, s in rows])
    assert rescored_sentences(path, trials) == {0: "-yes it is", 1: ""}


# --- examples -------------------------------------------------------------------------------------


def test_an_example_shows_the_probabilities_of_its_classes_in_order_of_time():
    probabilities = np.full((6, N_DIPHONES), 1e-6)
    k, ae = phoneme_ids(["K", "AE"]).tolist()
    early, late = k, N_PHONEMES * k + ae  # #→K and K→AE
    probabilities[1, early], probabilities[4, late] = 0.7, 0.9
    probabilities[:, 0] = 1 - probabilities[:, 1:].sum(axis=1)
    trial = replace(decoded(0, [k, ae], [k]), sentence="a word")
    shown = example(trial, np.log(probabilities), 0.08)
    assert shown["labels"] == ["#→K", "K→AE"]
    assert shown["posteriors"].shape == (2, 6)
    np.testing.assert_allclose(shown["posteriors"][0], probabilities[:, early], atol=1e-6)
    np.testing.assert_allclose(shown["posteriors"][1], probabilities[:, late], atol=1e-6)
    assert shown["alignment"] == [("K", "K"), ("AE", None)]
    assert (shown["kind"], shown["decoded"]) == ("diphones", "a word")
    plain = np.full((3, N_PHONEMES), 0.01)
    plain[1, 8] = 0.6
    shown = example(decoded(0, None, [8]), np.log(plain), 0.08)
    assert (shown["labels"], shown["kind"]) == (["CH"], "phonemes")
    assert shown["alignment"] == [("CH", "CH")], "without labels nothing is marked as wrong"
