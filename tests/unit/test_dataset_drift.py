"""Drift is told where it was put, and only there."""

from __future__ import annotations

import dataclasses
import json

import h5py
import numpy as np
import pytest
from brain_to_text.dataset.drift import drift_between, silent_channels, sums_by_session
from brain_to_text.dataset.hdf5_reader import ChannelSums, FileInspection
from brain_to_text.dataset.store import open_store
from brain_to_text.dataset.synthetic import SyntheticDataset, synthesize
from brain_to_text.dataset.trial_record import Finding
from brain_to_text.dataset.validation import validate_dataset
from brain_to_text.scoring.report import dataset_page

C = 40


def recorded(seed: int, *, trials: int = 60, mixing: np.ndarray | None = None) -> list[np.ndarray]:
    """Trials of correlated channels that wander slowly, as neural features do."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((4, C)) if mixing is None else mixing
    wandering = 0.1 * random.standard_normal((trials, 1, C))
    return [
        (random.standard_normal((50, 4)) @ mixing + random.standard_normal((50, C)) + offset)
        .astype(np.float32)
        for offset in wandering
    ]  # fmt: skip


def summed(trials: list[np.ndarray]) -> ChannelSums:
    sums = ChannelSums.none(C)
    for trial in trials:
        sums.add(ChannelSums.of(trial))
    return sums


def test_two_recordings_of_the_same_kind_do_not_drift():
    (row,) = drift_between({"a": summed(recorded(0)), "b": summed(recorded(1))})
    assert (row.mean_moved, row.std_moved) == (0, 0)
    assert row.likeness > 0.95


def test_channels_that_moved_are_counted_and_named():
    moved = recorded(1)
    for trial in moved:
        trial[:, 7] += 2.0
        trial[:, [3, 9]] *= 3.0
    (row,) = drift_between({"a": summed(recorded(0)), "b": summed(moved)})
    assert (row.mean_moved, row.std_moved) == (1, 2)
    assert row.furthest[0][0] == 7
    old, new = np.concatenate(recorded(0))[:, 7], np.concatenate(moved)[:, 7]
    pooled = np.sqrt((old.var() + new.var()) / 2)
    assert row.furthest[0][1] == pytest.approx((new.mean() - old.mean()) / pooled, rel=1e-4)


def test_a_shift_within_the_spread_of_few_trials_does_not_count():
    few = recorded(1, trials=3)
    few[0][:, 5] += 3.0  # one trial of three: the mean moves by 1, as it might by chance
    (row,) = drift_between({"a": summed(recorded(0)), "b": summed(few)})
    assert row.mean_moved == 0
    (row,) = drift_between({"a": summed(recorded(0)), "b": summed(few[:1])})
    assert row.mean_moved == 0


def test_electrodes_that_change_places_show_in_the_correlations_alone():
    mixing = np.random.default_rng(99).standard_normal((4, C))
    scrambled = recorded(1, mixing=mixing[:, np.random.default_rng(5).permutation(C)])
    first, second = (
        list(np.array(trials) / np.concatenate(trials).std(axis=0))
        for trials in (recorded(0), scrambled)
    )
    (row,) = drift_between({"a": summed(first), "b": summed(second)})
    assert (row.mean_moved, row.std_moved) == (0, 0)
    assert row.likeness < 0.5


def test_sums_are_those_of_the_bins_in_any_order():
    trials = recorded(0, trials=7)
    one, other = summed(trials), summed(trials[::-1])
    everything = np.concatenate(trials).astype(np.float64)
    np.testing.assert_allclose(one.of_bins / one.bins, everything.mean(axis=0), atol=1e-6)
    squares = one.of_bins_squared / one.bins
    np.testing.assert_allclose(squares, (everything**2).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(one.products, other.products, rtol=1e-4)


def test_files_of_a_session_count_together_and_other_widths_not_at_all():
    files = [
        FileInspection(f"t15.2023.08.{day}/data_{split}.hdf5", channels={C: summed(recorded(i))})
        for i, (day, split) in enumerate([("13", "train"), ("11", "train"), ("11", "val")])
    ]
    files[2].channels[3] = ChannelSums.none(3)
    found = sums_by_session(files, C)
    assert list(found) == ["t15.2023.08.11", "t15.2023.08.13"]
    assert found["t15.2023.08.11"].trials == 120
    assert files[1].channels[C].trials == 60, "what was inspected stays as it was"


def test_channels_that_never_change_are_found():
    dead = recorded(0)
    for trial in dead:
        trial[:, [2, 30]] = 0.0
    found = silent_channels({"a": summed(recorded(1)), "b": summed(dead)})
    assert [(row.session, row.channels) for row in found] == [("b", (2, 30))]
    (row,) = drift_between({"a": summed(dead), "b": summed(dead)})
    assert row.mean_shift == 0 and row.likeness == pytest.approx(1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    small = SyntheticDataset(sessions=3, train_trials=8, val_trials=4, test_trials=2, electrodes=8)
    synthesize(open_store(folder), small)
    return folder


def test_the_report_holds_drift_as_text_json_and_page(folder):
    report = validate_dataset(open_store(folder))
    assert not report.errors
    assert [row.session for row in report.drift] == report.manifest.sessions[1:]
    assert "against the session before" in report.to_text()
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["drift"][0]["likeness"] == pytest.approx(report.drift[0].likeness)
    page = dataset_page(report)
    for expected in ("Sessions and splits", "Duplicates", "Seconds per trial", "self_loop"):
        assert expected in page
    assert "http" not in page.replace("http-equiv", "")


def test_sentences_of_training_that_are_validated_too_are_counted(tmp_path):
    synthesize(open_store(tmp_path), SyntheticDataset(sessions=1, electrodes=1, test_trials=0))
    said = {"train": ["Hello you. ", "Good day."], "val": ["hello you.", "GOOD DAY.", "good day."]}
    for split, sentences in said.items():
        with h5py.File(next(tmp_path.rglob(f"data_{split}.hdf5")), "r+") as file:
            for number, trial in enumerate(file.values()):
                trial.attrs["sentence_label"] = (
                    sentences[number] if number < len(sentences) else f"{split} {number}"
                )
            n_trials = len(file)
    report = validate_dataset(open_store(tmp_path))
    assert report.shared_sentences == 2
    distinct = n_trials - 1
    note = f"2 of {distinct} validation sentences also occur in training"
    assert report.notes == [note]
    assert f"Note: {note}" in report.to_text()
    assert report.to_dict()["notes"] == [note] and report.to_dict()["shared_sentences"] == 2
    assert "2 sentences were spoken for training and for validation, too" in dataset_page(report)


def test_findings_reach_the_page_escaped(folder):
    report = validate_dataset(open_store(folder))
    odd = Finding("a/data_train.hdf5", "trial_0001", "<script>&", "duplicate trial")
    page = dataset_page(dataclasses.replace(report, findings=[odd] * 201))
    assert "<script>" not in page
    assert page.count("&lt;script&gt;&amp;") == 200
    assert "And 1 more" in page and "201 trials occur twice" in page


def test_one_session_has_nothing_to_compare(tmp_path):
    small = SyntheticDataset(sessions=1, train_trials=3, val_trials=2, test_trials=0, electrodes=1)
    synthesize(open_store(tmp_path), small)
    report = validate_dataset(open_store(tmp_path))
    assert report.drift == []
    assert "drift" not in report.to_text()


def test_a_session_scaled_otherwise_and_a_silent_channel_are_warned_of(tmp_path):
    small = SyntheticDataset(sessions=3, train_trials=12, val_trials=3, test_trials=0, electrodes=4)
    synthesize(open_store(tmp_path), small)
    second = tmp_path / "t15.2023.08.13"
    for path in second.glob("*.hdf5"):
        with h5py.File(path, "r+") as file:
            for trial in file.values():
                trial["input_features"][:] = 1.9 * trial["input_features"][:]
                trial["input_features"][:, 5] = 0
    warnings = {w.kind: w for w in validate_dataset(open_store(tmp_path)).warnings}
    assert warnings["drift"].key in (second.name, "t15.2023.08.18")
    assert "another standard deviation than in" in warnings["drift"].reason
    assert warnings["silent channels"].key == second.name
    assert warnings["silent channels"].reason == "1 of 8 channels never change (5)"


def test_a_trial_at_an_odd_pace_is_warned_of(tmp_path):
    synthesize(open_store(tmp_path), SyntheticDataset(sessions=1, electrodes=2, train_trials=12))
    path = next(tmp_path.rglob("data_train.hdf5"))
    with h5py.File(path, "r+") as file:
        trial = file["trial_0003"]
        length = 9 * trial.attrs["n_time_steps"]
        del trial["input_features"]
        trial["input_features"] = np.ones((length, 4), np.float32)
        trial.attrs["n_time_steps"] = length
    (odd,) = [w for w in validate_dataset(open_store(tmp_path)).warnings if w.kind == "odd pace"]
    assert (odd.trial, "bins per phoneme where the median" in odd.reason) == ("trial_0003", True)


def test_a_dataset_of_nothing_but_damage_is_still_reported(tmp_path):
    path = tmp_path / "t15.2023.08.11" / "data_train.hdf5"
    path.parent.mkdir()
    path.write_bytes(b"not HDF5")
    report = validate_dataset(open_store(tmp_path))
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["splits"][0]["mean"] is None
    page = dataset_page(report)
    assert "not HDF5" in page and "nan" not in page.lower().replace("manifest", "")
