"""Interruption is a non-event: killed, stopped and resumed runs end as if left alone."""

import os
import signal
import time

import pytest
import torch
from integration.kill_harness import JOB_SECONDS, Job, run_harness
from support.fault_proxy import FaultProxy, Faults
from support.tiny_data import write_dataset
from support.training_examples import newest_state

ENDLESS = {"num_training_batches": 100_000, "batches_per_val_step": 50_000}
SHORT = {"num_training_batches": 6}


def stop(job: Job, number: int = signal.SIGTERM) -> int | None:
    os.kill(job.process.pid, number)
    job.process.join(JOB_SECONDS)
    return job.process.exitcode


def end(job: Job) -> tuple[int | None, str]:
    """Exit code and what this job said."""
    before = len(job.said())
    job.start().process.join(JOB_SECONDS)
    return job.process.exitcode, job.said()[before:]


def test_runs_killed_at_random_instants_end_bit_identical(tmp_path):
    # the long form: python tests/integration/kill_harness.py --kills 50
    report = run_harness(kills=6, seed=1, folder=tmp_path)
    assert report.differences == [], report.describe()
    assert sum(report.kills.values()) == 6
    assert report.resumed_steps, "no kill came late enough to resume from"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_job_leaves_a_state_a_model_and_exit_code_zero(data, tmp_path, number):
    job = Job(data, tmp_path, **ENDLESS).start()
    job.wait_for("Train batch 10:")
    os.kill(job.process.pid, number)
    assert stop(job, number) == 0, job.said()  # a second signal changes nothing
    assert f"Stopped by {number.name}" in job.said()
    assert newest_state(tmp_path / "checkpoints")[1]["step"] > 10
    assert (tmp_path / "model" / "checkpoint" / "best_checkpoint").exists()
    assert not (tmp_path / "output" / "failure").exists()


def test_a_run_that_is_stopped_before_validation_still_leaves_a_usable_model(data, tmp_path):
    job = Job(data, tmp_path, **ENDLESS, batches_per_train_log=1).start()
    job.wait_for("Train batch 0:")
    assert stop(job) == 0, job.said()
    best = torch.load(tmp_path / "model/checkpoint/best_checkpoint", weights_only=True)
    assert best["model_state_dict"]["out.weight"].shape[0] == 1681


def test_a_second_job_in_the_same_place_is_refused_and_leaves_the_first_ones_log(data, tmp_path):
    first = Job(data, tmp_path / "first", **ENDLESS).start()
    first.wait_for("Train batch 0:")
    (tmp_path / "second").mkdir()
    for name in ("checkpoints", "model"):
        (tmp_path / "second" / name).symlink_to(tmp_path / "first" / name)
    code, said = end(Job(data, tmp_path / "second", **SHORT))
    assert stop(first) == 0
    assert code == 1 and "in use by another run" in said and "Cause:" not in said
    assert not (tmp_path / "second" / "output" / "failure").exists(), "it may be the first one's"
    log = (tmp_path / "first" / "model" / "training_log").read_text()
    assert "\0" not in log and "Train batch 0:" in log and "Stopped by SIGTERM" in log


@pytest.mark.parametrize("damage", ["state", "best"])
def test_a_damaged_checkpoint_is_reported_and_passed_over(data, tmp_path, damage):
    job = Job(data, tmp_path, num_training_batches=40, batches_per_val_step=10).start()
    job.wait_for("Train batch 25:")
    stop(job, signal.SIGKILL)
    checkpoints = tmp_path / "checkpoints"
    newest, _ = newest_state(checkpoints)
    victim = newest if damage == "state" else checkpoints / "best_checkpoint"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    code, said = end(job)
    assert code == 0, said
    assert victim.name in said and "fails its checksum" in said
    assert "Finished at step 40" in said


@pytest.mark.parametrize("phase", ["indexing", "data wait"])
def test_a_job_that_waits_for_s3_stops(tmp_path, s3_prefix, upload, fault_proxy: FaultProxy, phase):
    write_dataset(tmp_path / "data", n_features=16, bins=(80, 140))  # not yet indexed
    upload(tmp_path / "data", s3_prefix)
    job = Job(s3_prefix, tmp_path / "run", **ENDLESS, cache_gb=0, read_timeout_seconds=3)
    if phase == "indexing":
        fault_proxy.faults = Faults(stall=1.0)
        job.start().wait_for("indexing")
    else:
        job.start().wait_for("Train batch 10:")
        fault_proxy.faults = Faults(stall=1.0)
        time.sleep(2)  # every batch that was prepared ahead is used up
    assert stop(job) == 0, job.said()  # a read that is under way may last one time-out more
    assert "Stopped by SIGTERM" in job.said()
    states = list((tmp_path / "run" / "checkpoints").glob("state-*.pt"))
    assert bool(states) == (phase == "data wait")


def test_a_validation_is_left_at_once_and_made_up_for(data, tmp_path):
    job = Job(data, tmp_path, num_training_batches=12, batches_per_val_step=6).start()
    job.wait_for("Running test after training batch: 6")
    stop(job)
    assert job.process.exitcode == 0, job.said()
    code, _ = end(job)
    assert code == 0
    log = (tmp_path / "model" / "training_log").read_text()
    assert [n for n in (0, 6, 11) if f"Val batch {n}: DER" in log] == [0, 6, 11]
