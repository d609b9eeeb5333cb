"""Interruption is a non-event: killed, stopped and resumed runs end as if left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from integration.kill_harness import run_harness, unequal
from support.tiny_data import write_dataset

CODE = Path(__file__).parents[2] / "code"
SETTINGS = {
    "neural_dim": 16,
    "n_input_features": 16,
    "input_layer_sizes": "[16]",
    "n_units": 16,
    "n_layers": 2,
    "n_classes": 1681,
    "batch_size": 4,
    "days_per_batch": 2,
    "lr_warmup_steps": 5,
    "batches_per_train_log": 5,
    "batches_per_val_step": 1000,
}


def test_runs_killed_at_random_instants_end_bit_identical(tmp_path):
    # the long form: python tests/integration/kill_harness.py --kills 50
    report = run_harness(kills=10, seed=1, folder=tmp_path)
    assert report.differences == [], report.describe()
    assert sum(report.kills.values()) == 10
    assert report.resumed_steps, "no kill came late enough to resume from"


def test_the_harness_sees_a_single_flipped_bit():
    weights = torch.ones(3)
    flipped = weights.clone()
    flipped.view(torch.int32)[1] ^= 1
    assert unequal({"a": [weights]}, {"a": [flipped]}) == ["/a/0"]
    assert unequal({"a": 1}, {"b": 1}) == ["/a", "/b"]


class RunningJob:
    """A training process whose log can be waited for."""

    def __init__(self, folder: Path, *options: str, data: Path) -> None:
        (folder / "output").mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(CODE / "train_model_sagemaker.py"),
                *("--data-dir", str(data)),
                *(word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))),
                *options,
            ],
            env={**os.environ, "SAGEMAKER_BASE_DIR": str(folder), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said: list[str] = []

    def wait_for(self, text: str) -> None:
        for line in self.process.stdout:
            self.said.append(line)
            if text in line:
                return
        pytest.fail(f"the job ended without saying {text!r}:\n{''.join(self.said)}")

    def end(self) -> str:
        self.said += self.process.communicate(timeout=120)[0].splitlines(keepends=True)
        return "".join(self.said)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, n_features=16, bins=(80, 140))
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_job_leaves_a_state_a_model_and_exit_code_zero(data, tmp_path, number):
    job = RunningJob(tmp_path, "--num-training-batches", "100000", data=data)
    job.wait_for("Train batch 10:")
    started = time.monotonic()
    job.process.send_signal(number)
    said = job.end()
    assert time.monotonic() - started < 30  # the promise; in fact well under a second
    assert job.process.returncode == 0, said
    assert f"Stopped by {number.name}" in said
    assert list((tmp_path / "checkpoints").glob("state-*.pt"))
    assert (tmp_path / "model" / "checkpoint" / "best_checkpoint").exists()
    assert not (tmp_path / "output" / "failure").exists()


def test_a_second_signal_does_not_spoil_the_checkpoint(data, tmp_path):
    job = RunningJob(tmp_path, "--num-training-batches", "100000", data=data)
    job.wait_for("Train batch 10:")
    job.process.send_signal(signal.SIGTERM)
    job.process.send_signal(signal.SIGTERM)
    assert job.process.wait(60) == 0
    (state,) = (tmp_path / "checkpoints").glob("state-*.pt")
    assert torch.load(state, weights_only=True)["run"]["step"] > 10


def test_a_run_that_is_stopped_before_validation_still_leaves_a_usable_model(data, tmp_path):
    options = ("--num-training-batches", "100000", "--batches_per_train_log", "1")
    job = RunningJob(tmp_path, *options, data=data)
    job.wait_for("Train batch 0:")
    job.process.send_signal(signal.SIGTERM)
    assert job.process.wait(60) == 0
    best = torch.load(tmp_path / "model/checkpoint/best_checkpoint", weights_only=True)
    assert best["model_state_dict"]["out.weight"].shape[0] == 1681


def run_to_end(folder: Path, *options: str, data: Path) -> tuple[int, str]:
    job = RunningJob(folder, "--num-training-batches", "6", *options, data=data)
    said = job.end()
    return job.process.returncode, said


def test_a_finished_run_is_not_run_again_and_leaves_its_model_again(data, tmp_path):
    assert run_to_end(tmp_path, data=data)[0] == 0
    best = tmp_path / "model" / "checkpoint" / "best_checkpoint"
    best.unlink()
    code, said = run_to_end(tmp_path, data=data)
    assert code == 0 and "already finished at step 6" in said
    assert best.exists()


def test_changes_are_named_and_refused_unless_accepted(data, tmp_path):
    assert run_to_end(tmp_path, data=data)[0] == 0
    code, said = run_to_end(tmp_path, "--lr_max", "0.001", "--cache_gb", "0", data=data)
    assert code == 1
    assert "lr_max: 0.005 -> 0.001" in said and "--accept-changes true" in said
    assert "cache_gb" not in said.splitlines()[-1]
    failure = (tmp_path / "output" / "failure").read_text()
    assert "lr_max: 0.005 -> 0.001" in failure
    code, said = run_to_end(
        tmp_path,
        "--lr_max",
        "0.001",
        "--accept-changes",
        "true",
        "--num-training-batches",
        "8",
        data=data,
    )
    assert code == 0 and "Resuming although changed: lr_max" in said
    assert "Finished at step 8" in said


def test_changed_data_is_refused(data, tmp_path):
    other = tmp_path / "other"
    write_dataset(other, n_features=16, bins=(80, 140), seed=7)
    assert run_to_end(tmp_path / "run", data=data)[0] == 0
    code, said = run_to_end(tmp_path / "run", data=other)
    assert code == 1 and "the trials or their bytes changed" in said


def test_two_jobs_do_not_share_a_checkpoint_folder(data, tmp_path):
    first = RunningJob(tmp_path, "--num-training-batches", "100000", data=data)
    first.wait_for("Train batch 0:")
    code, said = run_to_end(tmp_path, data=data)
    first.process.send_signal(signal.SIGTERM)
    first.end()
    assert code == 1 and "in use by another run" in said
