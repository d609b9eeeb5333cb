"""A sweep on this machine: what is drawn, what is found in a log, what is told."""

import json
import math

import pytest
from brain_to_text.errors import JobError
from brain_to_text.launch import local_sweep
from brain_to_text.launch.job_tuning import Sweep, SweptParameter
from brain_to_text.launch.local_sweep import draw, last_value, local_table, run_sweep, value_at
from brain_to_text.launch.request import JobSettings
from hypothesis import given
from hypothesis import strategies as st

JOB = JobSettings(
    s3_bucket="speech-data", job_name="sweep", image_uri="none", role="r", instance_type="local"
)


def sweep_of(*parameters, strategy="Random", max_jobs=8):
    return Sweep(parameters, "validation:DER", max_jobs, 1, strategy, False)


@given(
    st.floats(0, 0.999999, exclude_max=True),
    st.sampled_from(["Auto", "Linear", "Logarithmic", "ReverseLogarithmic"]),
)
def test_values_stay_in_their_range(share, scaling):
    value = value_at(SweptParameter("lr_max", low=0.001, high=0.5, scaling=scaling), share)
    assert 0.001 <= value <= 0.5
    if scaling != "ReverseLogarithmic":
        whole = value_at(SweptParameter("n", low=3, high=7, scaling=scaling, whole=True), share)
        assert whole in (3, 4, 5, 6, 7)


def test_scaling_decides_where_the_middle_is():
    def middle(scaling, low=0.001, high=0.1):
        return value_at(SweptParameter("x", low=low, high=high, scaling=scaling), 0.5)

    assert middle("Linear") == pytest.approx(0.0505)
    assert middle("Logarithmic") == pytest.approx(0.01)
    assert middle("Auto") == pytest.approx(0.01)
    assert middle("Auto", low=0.01) == pytest.approx(0.055)
    assert middle("ReverseLogarithmic", low=0.9, high=0.999) == pytest.approx(0.99)


def test_few_jobs_cover_each_range_evenly_and_repeatably():
    sweep = sweep_of(
        SweptParameter("lr_max", low=0.0, high=1.0, scaling="Linear"),
        SweptParameter("model.n_units", values=(8, 16)),
    )
    drawn = draw(sweep)
    assert draw(sweep) == drawn != draw(sweep, seed=1)
    assert sorted(math.floor(values["lr_max"] * 8) for values in drawn) == list(range(8))
    assert [values["model.n_units"] for values in drawn].count(8) == 4


def test_a_grid_is_every_combination():
    grid = sweep_of(
        SweptParameter("seed", values=(1, 2)),
        SweptParameter("model.n_units", values=(8, 16)),
        strategy="Grid",
        max_jobs=4,
    )
    assert [tuple(values.values()) for values in draw(grid)] == [(1, 8), (1, 16), (2, 8), (2, 16)]


def test_the_last_value_counts_as_it_does_in_the_service():
    log = (
        "t: Val batch 0: DER (avg): 0.9000 CTC Loss (avg): 4.0 time: 1.0 PER (avg): 0.8000\n"
        "t: New best test DER inf --> 0.9000\n"
        "t: Val batch 5: DER (avg): 0.9500 CTC Loss (avg): 4.0 time: 1.0 PER (avg): 0.7000\n"
    )
    assert last_value("validation:DER", log) == 0.95
    assert last_value("validation:best_DER", log) == 0.9
    assert last_value("validation:PER", log) == 0.7
    assert last_value("validation:best_PER", log) is None


class Logs:
    """An account whose bucket holds the training logs of jobs that ran."""

    def __init__(self):
        self.logs = {}

    def client(self, _):
        return self

    def get_object(self, Bucket, Key):
        return {"Body": self}

    def read(self):
        return self.logs["latest"].encode()


@pytest.fixture(autouse=True)
def sweeps(tmp_path, monkeypatch):
    monkeypatch.setattr(local_sweep, "SWEEPS_FOLDER", tmp_path)


def test_jobs_run_in_turn_and_a_failed_one_does_not_end_the_sweep(tmp_path):
    account, said, launched = Logs(), [], []

    def launch(job, _):
        launched.append((job.job_name, dict(job.overrides)))
        if job.overrides["seed"] == 2:
            raise JobError("The local run broke: out of paper.")
        der = 0.1 * job.overrides["seed"]
        account.logs["latest"] = f"Val batch 5: DER (avg): {der:.4f} CTC Loss (avg): 4.0 time: 1"

    grid = sweep_of(SweptParameter("seed", values=(3, 2, 1)), strategy="Grid", max_jobs=3)
    run_sweep(grid, JOB, account, launch, said.append)
    assert launched == [
        ("sweep-001", {"seed": 3}),
        ("sweep-002", {"seed": 2}),
        ("sweep-003", {"seed": 1}),
    ]
    assert "Job 2 failed: The local run broke: out of paper." in said
    table = local_table("sweep")
    assert [line.split()[2] for line in table[1:4]] == ["sweep-003", "sweep-001", "sweep-002"]
    assert table[1] == "    0.1000  Completed   sweep-003  seed=1"
    assert "Failed" in table[3]
    assert table[4] == "Best: sweep-003, validation:DER 0.1000"
    kept = json.loads((tmp_path / "sweep.json").read_text())
    assert kept["jobs"][1]["reason"] == "The local run broke: out of paper."


def test_what_was_never_run_has_no_table(tmp_path):
    assert local_table("sweep") is None
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(JobError, match="damaged"):
        local_table("sweep")
