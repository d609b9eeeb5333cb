"""Recordings that were lost are named; sound ones, however they were made, are silent."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from brain_to_text.dataset.indexing import index_dataset, load_or_build_manifest
from brain_to_text.dataset.lost_data import LostData
from brain_to_text.dataset.validation import validate_dataset
from brain_to_text.storage.store import open_store
from support.small_data import SESSIONS, write_small_dataset

KEY = f"{SESSIONS[0]}/data_train.hdf5"


def test_lost_trials_are_warnings_of_validate_and_a_line_when_training_starts(
    tmp_path: Path,
) -> None:
    write_small_dataset(tmp_path)
    with h5py.File(tmp_path / KEY, "r+") as file:
        zeros, stuck, huge = (trial["input_features"] for trial in file.values())
        zeros[:] = 0
        stuck[60:] = stuck[59]
        huge[40, 3] = -1e38
    report = validate_dataset(open_store(tmp_path))
    lost = [finding for finding in report.findings if finding.kind == "lost data"]
    assert all(finding.severity == "warning" for finding in lost)
    assert [str(finding) for finding in lost] == [
        f"{KEY}:trial_0000: all its features are zero",
        f"{KEY}:trial_0001: bins 59 to 96 of 97 are all the same",
        f"{KEY}:trial_0002: its features reach 1e+38: are they z-scored?",
    ]
    lines: list[str] = []
    built = load_or_build_manifest(open_store(tmp_path), lines.append)
    assert f"Warning: data seems to be lost in {lost[0]}, {lost[1]}" in lines[-1]
    assert load_or_build_manifest(open_store(tmp_path), lines.append).lost == built.lost
    assert lines[-1] == lines[-2], "from the manifest, too"


def test_channels_that_never_change_in_a_file_are_named(tmp_path: Path) -> None:
    write_small_dataset(tmp_path)
    with h5py.File(tmp_path / KEY, "r+") as file:
        for trial in file.values():
            trial["input_features"][:, 4] = 0.25
        file["trial_0000/input_features"][:] = 0  # a trial of zeros tells nothing about channels
    lost = [str(finding) for finding in index_dataset(open_store(tmp_path)).lost]
    assert lost == [
        f"{KEY}:trial_0000: all its features are zero",
        f"{KEY}: 1 of 6 features never change: 4",
    ]


@pytest.mark.parametrize(("channels", "dtype"), [(16, np.float32), (512, np.float16)])
def test_sound_recordings_are_silent(channels: int, dtype: type) -> None:
    """Sparse counts, counts and power, artefacts of a movement, each z-scored; padding of 0.4 s."""
    rng = np.random.default_rng(0)
    look = LostData(KEY)
    for number in range(10):
        counts = rng.poisson(rng.uniform(0.05, 1, channels), (400, channels)).astype(float)
        counts[:, ::2] += rng.gamma(2, 900, (400, channels // 2))
        features = (counts - counts.mean(0)) / (counts.std(0) + 1e-8)
        features[100:105] *= 40
        features[-20:] = 0
        assert look.in_trial(f"trial_{number:04d}", features.astype(dtype)) == []
    assert look.in_file() == []
