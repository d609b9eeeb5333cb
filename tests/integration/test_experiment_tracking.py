"""TensorBoard events and MLflow runs: complete, each step once, and never a reason to fail."""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
from brain_to_text.model.trained_model import open_model
from brain_to_text.training.log_files import scalars
from brain_to_text.training.run import RunPaths
from integration.kill_harness import JOB_SECONDS, Job
from support.mlflow_server import MlflowRest, provide_client, serve_mlflow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SHORT = {"num_training_batches": 12, "batches_per_train_log": 2, "batches_per_val_step": 5}
LONGER = {**SHORT, "num_training_batches": 60, "batches_per_save": 3}
FILE_NAME = RunPaths(Path(), Path(), Path()).event_file.name
EVENTS = f"tensorboard/{FILE_NAME}"


def finish(job: Job, code: int = 0) -> str:
    """Run to the end; what this job said."""
    before = len(job.said())
    job.start().process.join(JOB_SECONDS)
    assert job.process.exitcode == code, job.said()
    return job.said()[before:]


def kill_at(job: Job, line: str) -> None:
    job.start().wait_for(line)
    os.kill(job.process.pid, signal.SIGKILL)
    job.process.join(JOB_SECONDS)


def expected_points(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by name, as metrics.jsonl has them."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in (run / "output/data/metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        for name, value in scalars(entry):
            points.setdefault(name, []).append((entry["step"], value))
    return points


def events(file: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag, as TensorBoard reads the file."""
    read = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def assert_same_points(found, expected):
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert steps(found[name]) == steps(points), name
        values = [value for _, value in found[name]]
        assert values == pytest.approx([v for _, v in points], rel=1e-6, nan_ok=True), name


def steps(points):
    return [step for step, _ in points]


# --- TensorBoard


def test_the_event_file_holds_every_number_of_the_run(data, tmp_path):
    finish(Job(data, tmp_path, **SHORT))
    found = events(tmp_path / "output/data" / EVENTS)
    assert_same_points(found, expected_points(tmp_path))
    assert steps(found["train/loss"]) == [0, 2, 4, 6, 8, 10]
    assert steps(found["validation/der"]) == [0, 5, 10, 11]
    assert "sessions/t15.2023.08.11/PER" in found
    (only,) = (tmp_path / "output/data/tensorboard").iterdir()
    assert only.name == FILE_NAME


def test_a_killed_and_resumed_run_shows_each_step_once(data, tmp_path):
    job = Job(data, tmp_path, **LONGER)
    kill_at(job, "Train batch 40:")
    assert "Resuming after step" in finish(job)
    found = events(tmp_path / "output/data" / EVENTS)
    assert steps(found["train/loss"]) == list(range(0, 60, 2))
    assert_same_points(found, expected_points(tmp_path))


def test_a_copy_of_the_file_goes_to_s3(data, tmp_path, s3_prefix, s3_environment):
    finish(Job(data, tmp_path, **SHORT, **{"output-s3-uri": f"{s3_prefix}/job"}))
    written = (tmp_path / "output/data" / EVENTS).read_bytes()
    logs = s3_environment.root / s3_prefix.removeprefix("s3://") / "job/logs"
    assert (logs / EVENTS).read_bytes() == written
    assert (logs / "training_log").exists()


def test_without_tensorboardx_a_run_says_so_in_one_line(data, tmp_path):
    said = finish(Job(data, tmp_path, missing=("tensorboardX",), **SHORT))
    assert said.count("No TensorBoard events are written: no module tensorboardX") == 1
    assert "Finished at step 12" in said


# --- MLflow


@pytest.fixture(scope="session")
def mlflow_packages():
    try:
        return provide_client()
    except RuntimeError as problem:
        pytest.skip(str(problem))


@pytest.fixture(scope="module")
def server(mlflow_packages, tmp_path_factory):
    with contextlib.ExitStack() as stack:
        try:
            url = stack.enter_context(serve_mlflow(tmp_path_factory.mktemp("mlflow")))
        except RuntimeError as problem:
            pytest.skip(str(problem))
        yield url


@pytest.fixture(scope="module")
def client(server):
    return MlflowRest(server)


@pytest.fixture
def tracked(data, tmp_path, server, mlflow_packages, request):
    """tracked(**settings) -> a job that logs into an experiment named like the test."""

    def make(variables=None, **settings):
        given = {
            "MLFLOW_TRACKING_URI": server,
            "MLFLOW_EXPERIMENT_NAME": request.node.name,
            "MLFLOW_RUN_NAME": "b2t-1",
            **(variables or {}),
        }
        settings = {**SHORT, **settings}
        return Job(data, tmp_path, packages=mlflow_packages, variables=given, **settings)

    return make


def runs(client, request):
    return client.runs(request.node.name)


@pytest.mark.slow
def test_mlflow_gets_params_metrics_results_and_the_model(tracked, client, request, tmp_path):
    said = finish(tracked())
    (run,) = runs(client, request)
    assert f"MLflow run {run['info']['run_id']} in experiment" in said
    assert "WARNING" not in said
    assert (run["info"]["status"], run["info"]["run_name"]) == ("FINISHED", "b2t-1")
    assert run["params"]["dataset.batch_size"] == "4"
    assert run["params"]["model.input_network.input_layer_sizes"] == "[16]"
    assert run["tags"]["data"].startswith("/") and run["tags"]["dataset"]
    assert_same_points(client.history(run), expected_points(tmp_path))

    results = {"report.html", "summary.json", "metrics.jsonl", "training_log", "model"}
    assert client.artefacts(run) >= results
    got = tmp_path / "downloaded" / "checkpoint"
    got.mkdir(parents=True)
    for name in ("best_checkpoint", "args.yaml"):
        (got / name).write_bytes(client.download(run, f"model/checkpoint/{name}"))
        assert (got / name).read_bytes() == (tmp_path / "model/checkpoint" / name).read_bytes()
    assert open_model(got.parent).config.dataset.batch_size == 4


@pytest.mark.slow
def test_a_killed_and_resumed_run_is_one_mlflow_run(tracked, client, request, tmp_path):
    job = tracked(**LONGER)
    job.start().wait_for("MLflow run")
    job.wait_for("Val batch 40:")
    os.kill(job.process.pid, signal.SIGKILL)
    job.process.join(JOB_SECONDS)
    assert "Resuming after step" in finish(job)
    (run,) = runs(client, request)
    assert run["info"]["status"] == "FINISHED"
    found = client.history(run)
    assert steps(found["train/loss"]) == list(range(0, 60, 2))
    assert found.keys() == expected_points(tmp_path).keys()
    assert "already finished" in finish(job)
    (run,) = runs(client, request)
    assert run["info"]["status"] == "FINISHED"


@pytest.mark.parametrize(
    "uri, module",
    [("http://127.0.0.1:9", "mlflow"), ("arn:aws:sagemaker:x", "sagemaker_mlflow")],
)
def test_a_missing_client_is_said_before_the_first_step(
    data, tmp_path, mlflow_packages, uri, module
):
    job = Job(
        data,
        tmp_path,
        missing=(module,),
        packages=mlflow_packages,
        variables={"MLFLOW_TRACKING_URI": uri},
        **SHORT,
    )
    said = finish(job)
    before, _, after = said.partition(f"this image has no module {module}")
    assert "Train batch 0:" in after and "Train batch 0:" not in before
    assert "./build_and_push.sh --mlflow" in after
    assert "MLflow run" not in said
