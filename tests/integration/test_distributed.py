"""Any number of processes computes the same run: torchrun, gloo, on the CPU."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest
import torch
from brain_to_text.dataset.indexing import index_dataset
from brain_to_text.storage.store import open_store
from integration.kill_harness import SETTINGS
from support.training_examples import newest_state

CODE = Path(__file__).parents[2] / "code"
WITHOUT_NOISE = {
    "rnn_dropout": 0,
    "input_layer_dropout": 0,
    "white_noise_std": 0,
    "constant_offset_std": 0,
    "random_cut": 0,
    "time_mask_share": 0,
    "num_training_batches": 30,
    "batches_per_val_step": 10,
    # batches that are prepared together share the reads of trials they both need
    "cache_gb": 0,
    "prefetch_batches": 1,
}


def start(data: Path, run: Path, processes: int, **settings: object) -> subprocess.Popen[str]:
    (run / "output").mkdir(parents=True, exist_ok=True)
    options = {**SETTINGS, **WITHOUT_NOISE, **settings}
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes)),
            *(str(CODE / "train_model_sagemaker.py"), "--data-dir", str(data)),
            *(word for name, value in options.items() for word in (f"--{name}", str(value))),
        ],
        env={**os.environ, "SAGEMAKER_BASE_DIR": str(run), "OMP_NUM_THREADS": "1"},
        stdout=(run / "said").open("a"),
        stderr=subprocess.STDOUT,
        text=True,
    )


def train(data: Path, run: Path, processes: int, **settings: object) -> dict:
    process = start(data, run, processes, **settings)
    assert process.wait(300) == 0, (run / "said").read_text()[-3000:]
    return newest_state(run / "checkpoints")[1]


def wait_for(run: Path, process: subprocess.Popen[str], text: str) -> None:
    deadline = time.monotonic() + 300
    while text not in (run / "said").read_text():
        assert process.poll() is None and time.monotonic() < deadline, (run / "said").read_text()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone")
    return train(data, run, 1), reads(run)


def reads(run: Path) -> int:
    """GETs of the whole run, from its closing line."""
    return int(re.search(r"Streaming: (\d+) GETs", (run / "said").read_text()).group(1))


def assert_same_run(expected: dict, found: dict) -> None:
    """Weights within float32 summation error; scores equal."""
    for name, value in expected["model"].items():
        assert torch.allclose(value, found["model"][name], rtol=1e-5, atol=1e-6), name
    for one, other in zip(expected["run"]["validations"], found["run"]["validations"], strict=True):
        assert one["step"] == other["step"] and one["n_trials"] == other["n_trials"]
        assert one["counts"] == other["counts"]
        assert one["ctc_loss"] == pytest.approx(other["ctc_loss"], rel=1e-6)


def losses(state: dict) -> list[tuple[float, ...]]:
    """The diphone and the phoneme loss on every log line."""
    entries = [json.loads(line) for line in state["log"]["metrics"].splitlines()]
    names = ("loss", "phoneme_loss")
    return [tuple(entry[n] for n in names) for entry in entries if entry["kind"] == "train"]


def test_more_processes_compute_the_same_run(data, alone, tmp_path):
    found = train(data, tmp_path, 3)
    assert_same_run(alone[0], found)
    for one, other in zip(losses(alone[0]), losses(found), strict=True):
        assert one == pytest.approx(other, rel=1e-4), "of the whole batch, not of rank 0's share"
    # without a cache every distinct trial of a batch is one read, on whichever rank needs it
    assert reads(tmp_path) == alone[1]


def test_a_run_continues_on_fewer_processes(data, alone, tmp_path):
    process = start(data, tmp_path, 2, batches_per_train_log=1)
    wait_for(tmp_path, process, "Train batch 10:")
    for pid in ranks_of(process.pid):
        os.kill(pid, signal.SIGTERM)
    assert process.wait(300) == 0, (tmp_path / "said").read_text()[-3000:]
    found = train(data, tmp_path, 1, batches_per_train_log=1)
    assert_same_run(alone[0], found)
    said = (tmp_path / "said").read_text()
    assert "The run had 2 processes and has 1: its batches stay the same" in said


def ranks_of(launcher: int) -> list[int]:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children]


def test_a_killed_rank_ends_the_whole_job(data, tmp_path):
    process = start(data, tmp_path, 2, num_training_batches=100_000, batches_per_val_step=50_000)
    wait_for(tmp_path, process, "Train batch 10:")
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    assert process.wait(300) != 0
    assert list((tmp_path / "checkpoints").glob("state-*.pt"))
    assert (
        (tmp_path / "output" / "failure")
        .read_text()
        .startswith(
            "Lost contact with another process of this job, which gave no reason: it was killed"
        )
    )


def test_a_rank_that_stands_still_ends_the_run_after_the_limit(data, tmp_path):
    endless = {"num_training_batches": 100_000, "batches_per_val_step": 50_000}
    limits = {"rank_timeout_seconds": 15, "retry_budget_seconds": 5}
    process = start(data, tmp_path, 2, **endless, **limits)
    wait_for(tmp_path, process, "Train batch 10:")
    stopped = ranks_of(process.pid)[1]
    os.kill(stopped, signal.SIGSTOP)
    failure = tmp_path / "output" / "failure"
    deadline = time.monotonic() + 300
    while not failure.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(stopped, signal.SIGCONT)
    assert process.wait(300) != 0
    assert failure.read_text().startswith("Rank 1 on ") and "did not answer for" in (
        failure.read_text()
    )


def test_one_ranks_reason_is_what_the_others_fail_with(data, tmp_path):
    own = tmp_path / "data"
    shutil.copytree(data, own)
    sound = index_dataset(open_store(own))
    for file in own.glob("*/data_train.hdf5"):
        with h5py.File(file, "r+") as content:
            content["trial_0003/input_features"][5, 5] += 1
    # the files as they are, their trials' sums as they were: damage that only a read can see
    manifest = dataclasses.replace(index_dataset(open_store(own)), trials=sound.trials)
    (own / "trial_manifest.json.gz").write_bytes(manifest.to_bytes())
    process = start(own, tmp_path / "run", 2, on_damaged_trial="stop")
    assert process.wait(300) != 0
    said = (tmp_path / "run" / "said").read_text()
    reason = re.search(r"ERROR: (Cannot read trial_0003 .*)", said)[1]
    assert re.search(rf"ERROR: Rank [01] on \S+ failed: {re.escape(reason)}", said), said
    assert reason in (tmp_path / "run" / "output" / "failure").read_text()


def test_an_error_of_the_main_rank_is_everyones_reason(data, tmp_path):
    process = start(data, tmp_path, 2, sessions="[t15.1999.01.01]")
    assert process.wait(300) != 0
    failure = (tmp_path / "output" / "failure").read_text()
    assert "t15.1999.01.01" in failure
