"""`docker run IMAGE train`, as SageMaker runs it: success, ways to fail, a stop, no copied data."""

import json

import pytest
from support.container_job import BUCKET, PREFIX
from support.engine import docker

pytestmark = pytest.mark.docker

PROMISED = {
    "checkpoint/best_checkpoint",
    "checkpoint/args.yaml",
    "checkpoint/val_metrics.pkl",
    "training_log",
}


def test_a_job_streams_trains_and_leaves_what_is_promised(make_job, container_s3):
    job = make_job()
    job.start()
    result = job.wait()
    assert result.exit_code == 0, result.log
    assert result.failure == ""
    assert result.model_files >= PROMISED
    for line in (
        "Using device: cpu",
        f"Loading data from: {BUCKET}/{PREFIX}",
        "Successfully initialized S3-backed datasets",
        "Train batch 5: loss:",
        "Val batch 3: DER (avg):",
        "Checkpointing model",
    ):
        assert line in result.log
    assert "secretsecretsecret" not in result.log
    assert_no_dataset_on_disk(job, container_s3)


def assert_no_dataset_on_disk(job, server):
    """Nothing the container wrote beside logs and checkpoints is as large as one trial."""
    smallest_trial = 40 * 32 * 4  # bins x features x bytes
    changed = [
        line.split(maxsplit=1)
        for line in docker("diff", job.name).splitlines()
        if not line.endswith((".pyc", "__pycache__"))
    ]
    written = [path for kind, path in changed if kind == "A"]
    assert [path for path in written if path.endswith((".hdf5", ".h5", ".npy"))] == []
    size = int(json.loads(docker("inspect", "--size", job.name))[0]["SizeRw"])
    assert size < smallest_trial, written
    mounted = [path for path in job.base.rglob("*") if path.suffix in (".hdf5", ".h5", ".npy")]
    assert mounted == []


def test_it_trains_on_a_read_only_root(make_job):
    # only memory to write to, outside SageMaker's own folders
    job = make_job({"num_training_batches": 2}, options=["--read-only", "--tmpfs", "/tmp:size=8m"])
    result = job.run()
    assert result.exit_code == 0, result.log
    assert result.model_files >= PROMISED


@pytest.mark.parametrize(
    ("changes", "variables", "words"),
    [
        ({"model.n_unitz": 8}, {}, ["n_unitz", "n_units"]),
        ({}, {"AWS_SECRET_ACCESS_KEY": "wrongwrongwrong"}, [BUCKET]),
        ({}, {"BRAIN_TO_TEXT_EXPECT_GPU": "1"}, ["A GPU was expected"]),
    ],
    ids=["unknown key", "denied bucket", "no GPU"],
)
def test_what_cannot_train_leaves_one_clear_sentence(make_job, changes, variables, words):
    result = make_job(changes, variables=variables).run()
    assert result.exit_code != 0
    assert_one_sentence(result.failure, *words)
    assert "Train batch" not in result.log
    assert "wrongwrongwrong" not in result.log + result.failure


def assert_one_sentence(failure, *words):
    assert failure, "no failure text"
    assert "Traceback" not in failure
    assert len(failure.splitlines()[0]) <= 1024
    for word in words:
        assert word in failure


def test_a_stopped_job_is_continued_by_the_next_one(make_job):
    endless = {"num_training_batches": 100_000, "batches_per_val_step": 100_000}
    first = make_job(endless)
    first.start()
    first.wait_for_line("Train batch 3: loss:")
    first.stop()
    stopped = first.wait()
    assert stopped.exit_code == 0, stopped.log
    assert stopped.failure == ""
    last = last_step(stopped.log)
    assert any((first.base / "checkpoints").iterdir())

    second = make_job(endless, base=first.base)
    second.start()
    second.wait_for_line(f"Train batch {last + 2}: loss:")
    second.stop()
    continued = second.wait()
    assert continued.exit_code == 0, continued.log
    steps = logged_steps(continued.log)
    assert steps[:2] == [last + 1, last + 2], "a step was done twice or left out"


@pytest.mark.slow
def test_sigterm_stops_both_processes_under_torchrun(make_job):
    job = make_job(
        {"num_training_batches": 100_000, "batches_per_val_step": 100_000},
        variables={"BRAIN_TO_TEXT_PROCESSES_PER_HOST": "2"},
    )
    job.start()
    job.wait_for_line("Train batch 2: loss:")
    job.stop()
    result = job.wait()
    assert result.exit_code == 0, result.log
    assert result.failure == ""
    assert any((job.base / "checkpoints").iterdir())


def logged_steps(log):
    return [
        int(line.split("Train batch ")[1].split(":")[0])
        for line in log.splitlines()
        if "Train batch " in line and "loss:" in line
    ]


def last_step(log):
    return logged_steps(log)[-1]
