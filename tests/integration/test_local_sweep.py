"""`--tune` on this machine: four small jobs end to end, without a container, and a dry run."""

import json

import launch_sagemaker_job as front_door
import pytest
from brain_to_text.cloud import local_process, local_sweep
from integration.kill_harness import SETTINGS
from support.tiny_data import write_dataset

SPEC = """
metric: validation:best_DER
max_jobs: 4
parameters:
  lr_max: {min: 0.0005, max: 0.05, scaling: Logarithmic}
  model.n_units: {values: [8, 16]}
"""
CHANGES = {**SETTINGS, "num_training_batches": 20, "batches_per_val_step": 10}


@pytest.fixture
def sweep(s3_environment, s3_bucket, upload, tmp_path, monkeypatch):
    """Runs the launcher on a sweep around a small job; everything it leaves is in tmp_path."""
    monkeypatch.setattr(local_sweep, "SWEEPS_FOLDER", tmp_path / "sweeps")
    monkeypatch.setattr(local_process, "RUNS_FOLDER", tmp_path / "runs")
    write_dataset(tmp_path / "data", n_features=16, bins=(80, 140))
    upload(tmp_path / "data", f"s3://{s3_bucket}/data")
    spec = tmp_path / "sweep.yaml"
    spec.write_text(SPEC)

    def run(*more, **changes):
        options = ["--s3-bucket", s3_bucket, "--s3-data-prefix", "data", "--job-name", "four"]
        options += [f"--{key}={value}" for key, value in {**CHANGES, **changes}.items()]
        return front_door.main([*options, "--tune", str(spec), *more])

    run.bucket = s3_environment.root / s3_bucket
    return run


def test_a_sweep_of_four_jobs_runs_to_a_table_that_names_the_best(sweep, capfd, tmp_path):
    assert sweep("--instance-type", "local_process", "--skip-checks") == 0
    said = capfd.readouterr().out
    rows = [line.split() for line in said.splitlines() if "  Completed  " in line]
    assert sorted(row[2] for row in rows) == [f"four-{number:03d}" for number in (1, 2, 3, 4)]
    values = [float(row[0]) for row in rows]
    assert values == sorted(values)
    assert len({row[3] for row in rows}) == 4  # lr_max
    assert f"Best: {rows[0][2]}, validation:best_DER {values[0]:.4f}" in said
    outputs = sweep.bucket / "sagemaker-outputs"
    for number in (1, 2, 3, 4):
        job = outputs / f"four-{number:03d}"
        assert (job / "output" / "model.tar.gz").is_file()
        assert "Finished at step 20" in (job / "logs" / "training_log").read_text()
    assert front_door.main(["--sweep", "four"]) == 0
    assert [line for line in capfd.readouterr().out.splitlines() if "Completed" in line] == [
        line for line in said.splitlines() if "  Completed  " in line
    ]


def test_a_dry_run_shows_the_request_and_the_price(sweep, capsys):
    assert sweep("--dry-run", "--role", "arn:aws:iam::123456789012:role/r") == 0
    shown = capsys.readouterr()
    request = json.loads(shown.out)
    assert request["HyperParameterTuningJobName"] == "four"
    limits = request["HyperParameterTuningJobConfig"]["ResourceLimits"]
    assert limits["MaxNumberOfTrainingJobs"] == 4
    assert "Sweep: 4 jobs" in shown.err and " on demand" in shown.err


def test_a_range_that_cannot_be_is_refused_before_anything_runs(sweep, capsys, tmp_path):
    (tmp_path / "sweep.yaml").write_text("parameters: {rnn_dropout: {min: 0.1, max: 1.5}}")
    assert sweep("--instance-type", "local_process", "--skip-checks") == 1
    assert "rnn_dropout" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
