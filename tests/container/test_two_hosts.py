"""One job on two containers of two processes each: the same result, clear ends, resumable."""

import re
import shutil

import pytest
import torch
from support import local_mode
from support.container_job import BUCKET, TINY_JOB, Cluster, Job
from support.engine import docker
from support.training_examples import newest_state

pytestmark = [pytest.mark.docker, pytest.mark.slow]

# Without noise and dropout, which each rank draws for itself; no cache, so that a step is long
# enough to act on.
JOB = {
    **TINY_JOB,
    "model.rnn_dropout": 0,
    "model.input_network.input_layer_dropout": 0,
    "dataset.data_transforms.white_noise_std": 0,
    "dataset.data_transforms.constant_offset_std": 0,
    "dataset.data_transforms.random_cut": 0,
    "dataset.batch_size": 16,
    "dataset.cache_gb": 0,
    "dataset.prefetch_batches": 1,
    "num_training_batches": 80,
    "batches_per_val_step": 40,
    "batches_per_save": 5,
    "save_final_model": True,
}
FINAL, BEST = "checkpoint/final_checkpoint", "checkpoint/best_checkpoint"


@pytest.fixture(scope="module")
def alone(image, container_s3, tmp_path_factory):
    """The same job as one process: (models by path, what it logged)."""
    result = Job(image, tmp_path_factory.mktemp("alone"), container_s3, JOB).run()
    assert result.exit_code == 0, result.log
    return models_in(result.base / "model"), result.log


def models_in(folder):
    return {
        path: torch.load(folder / path, weights_only=True)["model_state_dict"]
        for path in (FINAL, BEST)
    }


def assert_same_weights(expected, found):
    """Within float32 summation error."""
    for path, weights in expected.items():
        for name, value in weights.items():
            assert torch.allclose(value, found[path][name], rtol=1e-5, atol=1e-6), (path, name)


def validations(log):
    """(step, DER, CTC loss, PER) of every validation line."""
    line = r"Val batch (\d+): DER \(avg\): (\S+) CTC Loss \(avg\): (\S+) .*? PER \(avg\): (\S+)"
    return [tuple(map(float, found)) for found in re.findall(line, log)]


def as_printed(values):
    """Equal but for the last digit of what a line prints; one label more or less is 0.02."""
    return [pytest.approx(value, abs=1.5e-4) for value in values]


def test_local_mode_on_two_hosts_computes_the_same_run(image, container_s3, alone, tmp_path):
    variables = {"BRAIN_TO_TEXT_PROCESSES_PER_HOST": "2", "OMP_NUM_THREADS": "1"}
    scratch = tmp_path / "local-mode"
    scratch.mkdir()
    local_mode.fit(
        *("two-hosts", image, BUCKET, JOB, container_s3, scratch), hosts=2, variables=variables
    )
    outputs = container_s3.root / BUCKET / local_mode.OUTPUT_PREFIX
    archive = outputs / "two-hosts" / "output" / "model.tar.gz"
    shutil.unpack_archive(archive, tmp_path / "model")
    log = (tmp_path / "model" / "training_log").read_text()
    assert "Training on 4 processes" in log
    expected, expected_log = alone
    assert_same_weights(expected, models_in(tmp_path / "model"))
    assert len(validations(log)) == 3
    assert validations(log) == as_printed(validations(expected_log))


def test_a_lost_host_and_a_stop_leave_one_state_to_resume_from(
    image, container_s3, alone, tmp_path
):
    # slower steps than above would need a larger model: the log line of a step is what to act on
    kill_at, stop_at = "Train batch 10: loss:", "Train batch 30: loss:"
    first = Cluster(image, tmp_path, container_s3, JOB)
    try:
        first.start()
        first.jobs[0].wait_for_line(kill_at)
        docker("kill", first.jobs[1].name)
        survivor = first.jobs[0].wait()
    finally:
        first.remove()
    assert survivor.exit_code != 0
    assert survivor.failure.startswith("Lost contact with host algo-2"), survivor.failure
    assert "start the job again with the same checkpoint location" in survivor.failure
    assert "Traceback" not in survivor.failure
    (state,) = newest_states(tmp_path)
    assert state >= 10

    # SageMaker gives every host what the job's checkpoint location holds
    shutil.copytree(
        tmp_path / "algo-1" / "checkpoints", tmp_path / "algo-2" / "checkpoints", dirs_exist_ok=True
    )
    second = Cluster(image, tmp_path, container_s3, JOB)
    try:
        second.start()
        second.jobs[0].wait_for_line(stop_at)
        second.stop()
        results = second.wait()
    finally:
        second.remove()
    for result in results:
        assert result.exit_code == 0, result.log
        assert result.failure == ""
    assert f"Resuming after step {state}" in results[0].log
    stopped = int(re.search(r"Stopped by \w[\w ]* after (\d+) steps", results[0].log)[1])
    assert stopped == max(newest_states(tmp_path)) >= 30

    shutil.rmtree(tmp_path / "algo-1" / "model")
    last = Job(image, tmp_path / "algo-1", container_s3, JOB).run()
    assert last.exit_code == 0, last.log
    assert f"Resuming after step {stopped}" in last.log
    assert_same_weights(alone[0], models_in(last.base / "model"))
    assert validations(last.log)[-1:] == as_printed(validations(alone[1])[-1:])


def newest_states(base):
    """Completed steps of the newest resume state of each host that wrote one."""
    folders = sorted({state.parent for state in base.glob("algo-*/checkpoints/state-*.pt")})
    return [newest_state(folder)[1]["step"] for folder in folders]
