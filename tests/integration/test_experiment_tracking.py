"""TensorBoard events and MLflow runs: complete, each step once, and never a reason to fail.

MLflow is the client that images have, installed outside of .venv, on a folder of its own file
store.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from brain_to_text.errors import TrainingError
from brain_to_text.model.trained_model import open_model
from brain_to_text.training import trackers
from brain_to_text.training.log_files import scalars
from brain_to_text.training.run import RunPaths
from brain_to_text.training.trackers import EventFile, MlflowRun
from integration.kill_harness import JOB_SECONDS, Job
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

REPOSITORY = Path(__file__).resolve().parents[2]
CLIENT = REPOSITORY / ".local" / "mlflow-client"
LOCK = REPOSITORY / "docker" / "requirements_sagemaker_mlflow.txt"
EVENTS = f"tensorboard/{RunPaths(Path(), Path(), Path()).event_file.name}"
SETTINGS = {"batches_per_train_log": 2, "batches_per_val_step": 5}


@pytest.fixture(scope="session")
def client_folder():
    """The packages that --mlflow adds to an image, for the end of a module path."""
    stamp, wanted = CLIENT / "installed", LOCK.read_text()
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(CLIENT, ignore_errors=True)
        command = [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps"),
            *("--require-hashes", "-r", str(LOCK), "--target", str(CLIENT)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        if done.returncode:
            pytest.skip(f"MLflow cannot be installed here: {done.stderr.strip()[-300:]}")
        stamp.write_text(wanted)
    return CLIENT


@pytest.fixture(scope="session")
def client_class(client_folder):
    """MLflow's client in this process."""
    sys.path.append(str(client_folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
    return MlflowClient


@pytest.fixture(autouse=True)
def file_store(monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def history(client, run):
    """(step, value) by name, as MLflow has them."""
    return {
        name: [(point.step, point.value) for point in client.get_metric_history(run, name)]
        for name in client.get_run(run).data.metrics
    }


# --- whole runs


@pytest.fixture(scope="module")
def resumed(data, tmp_path_factory, s3_server, request):
    """The folder of a run that was killed and resumed, its logs on S3, and what it said."""
    try:
        packages = request.getfixturevalue("client_folder")
    except pytest.skip.Exception:
        packages = None  # TensorBoard's part is tested all the same
    folder = tmp_path_factory.mktemp("resumed")
    s3_server.make_bucket("tracked")
    job = Job(
        data,
        folder / "run",
        packages=packages,
        variables={
            **s3_server.environment(),
            "MLFLOW_TRACKING_URI": (folder / "mlflow").as_uri() if packages else "",
            "MLFLOW_ALLOW_FILE_STORE": "true",  # this fixture comes before those of a test
            "MLFLOW_RUN_NAME": "b2t-1",
        },
        **SETTINGS,
        num_training_batches=40,
        batches_per_save=3,
        **{"output-s3-uri": "s3://tracked/job"},
    )
    job.start().wait_for("Val batch 25:")
    os.kill(job.process.pid, signal.SIGKILL)
    job.process.join(JOB_SECONDS)
    job.start().join_successfully()
    assert "Resuming after step" in job.said()
    return job, s3_server.root / "tracked/job/logs"


def expected_points(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by name, as metrics.jsonl has them."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in (run / "output/data/metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        for name, value in scalars(entry):
            points.setdefault(name, []).append((entry["step"], value))
    return points


def steps(points):
    return [step for step, _ in points]


def test_the_event_file_holds_every_number_of_the_run_once(resumed):
    job, logs = resumed
    (file,) = (job.run / "output/data/tensorboard").iterdir()
    read = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
    found = {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    expected = expected_points(job.run)
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert steps(found[name]) == steps(points), name
        values = [value for _, value in points]
        assert [v for _, v in found[name]] == pytest.approx(values, rel=1e-6, nan_ok=True), name
    assert steps(found["train/loss"]) == list(range(0, 40, 2))
    assert "sessions/t15.2023.08.11/PER" in found
    assert (logs / EVENTS).read_bytes() == file.read_bytes()
    assert (logs / "training_log").exists()


def test_a_killed_and_resumed_run_is_one_mlflow_run(resumed, client_class, tmp_path):
    job, _ = resumed
    client = client_class((job.run.parent / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("brain-to-text")
    (run,) = client.search_runs([experiment.experiment_id])
    assert f"MLflow run {run.info.run_id} in experiment brain-to-text" in job.said()
    assert "WARNING" not in job.said()
    assert (run.info.status, run.info.run_name) == ("FINISHED", "b2t-1")
    assert run.data.params["dataset.batch_size"] == "4"
    assert run.data.params["model.input_network.input_layer_sizes"] == "[16]"
    assert run.data.tags["data"].startswith("/") and run.data.tags["dataset"]

    found = history(client, run.info.run_id)
    assert steps(found["train/loss"]) == list(range(0, 40, 2))
    assert steps(found["validation/per"]) == [0, 5, 10, 15, 20, 25, 30, 35, 39]
    assert found.keys() == expected_points(job.run).keys()

    results = {entry.path for entry in client.list_artifacts(run.info.run_id)}
    assert results >= {"report.html", "summary.json", "metrics.jsonl", "training_log", "model"}
    model = client.download_artifacts(run.info.run_id, "model", str(tmp_path))
    assert open_model(Path(model)).config.dataset.batch_size == 4


@pytest.mark.parametrize(
    ("uri", "module"),
    [("http://127.0.0.1:9", "mlflow"), ("arn:aws:sagemaker:x", "sagemaker_mlflow")],
)
def test_a_missing_package_is_said_before_the_first_step(
    data, tmp_path, client_folder, uri, module
):
    job = Job(
        data,
        tmp_path,
        missing=(module, "tensorboardX"),
        packages=client_folder,
        variables={"MLFLOW_TRACKING_URI": uri},
        num_training_batches=2,
    )
    job.start().join_successfully()
    before, _, after = job.said().partition(f"this image has no module {module}")
    assert "Train batch 0:" in after and "Train batch 0:" not in before
    assert "./build_and_push.sh --mlflow" in after and "MLflow run" not in job.said()
    assert job.said().count("No TensorBoard events are written: no module tensorboardX") == 1


# --- MLflow's run, by itself


@dataclasses.dataclass
class Tracking:
    """A run's folders, and a client of the store that it is followed into."""

    client: object
    uri: str
    paths: RunPaths

    def follow(self, **params):
        return MlflowRun(self.uri, self.paths, params, {"data": "s3://b/p"})

    @property
    def run(self):
        """The run that the folder of checkpoints knows."""
        known = self.paths.checkpoint_dir / "mlflow_run_id"
        return self.client.get_run(known.read_text())

    def history(self):
        return history(self.client, self.run.info.run_id)


@pytest.fixture
def tracking(client_class, tmp_path):
    paths = RunPaths(*(tmp_path / name for name in ("model", "output", "checkpoints")))
    for folder in (paths.model_dir, paths.checkpoint_dir):
        folder.mkdir()
    (paths.model_dir / "training_log").write_text("Finished\n")
    uri = (tmp_path / "mlflow").as_uri()
    return Tracking(client_class(uri), uri, paths)


@pytest.fixture
def absent(client_class, monkeypatch):
    """Set while the store does not answer."""
    event = threading.Event()
    real = client_class.get_experiment_by_name

    def answer(client, name):
        if event.is_set():
            raise ConnectionError("nobody is at https://me:hidden@host")
        return real(client, name)

    monkeypatch.setattr(client_class, "get_experiment_by_name", answer)
    return event


def entry(step, kind="train", **values):
    return {"kind": kind, "time": 1.8e9 + step, "step": step, "loss": 7.0 - step, **values}


def test_what_an_absent_server_missed_is_sent_when_it_answers(tracking, absent, caplog):
    absent.set()
    run = tracking.follow(model={"n_units": 16}, seed=1)
    run.record(entry(0))
    deadline = time.monotonic() + 300
    while "MLflow does not answer" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.record(entry(2))
    absent.clear()
    run.record(entry(4))
    run.close(None, True)
    assert tracking.history() == {"train/loss": [(0, 7.0), (2, 5.0), (4, 3.0)]}
    assert tracking.run.info.status == "FINISHED"
    assert tracking.run.data.params == {"model.n_units": "16", "seed": "1"}
    assert caplog.text.count("does not answer") == 1
    assert "hidden" not in caplog.text and "did not get all" not in caplog.text


@pytest.mark.parametrize("hangs", [False, True])
def test_a_server_that_stays_away_is_waited_for_a_bounded_time(
    tracking, absent, client_class, caplog, monkeypatch, hangs
):
    absent.set()
    answer = threading.Event()
    if hangs:
        monkeypatch.setattr(trackers, "LAST_SECONDS", 0.2)
        monkeypatch.setattr(client_class, "get_experiment_by_name", lambda *_: answer.wait(300))
    run = tracking.follow()
    run.record(entry(0))
    run.close(None, finished=False)
    assert caplog.text.count("MLflow did not get all of this run") == 1
    answer.set()


def test_a_resumed_run_continues_where_it_was(tracking):
    first = tracking.follow(seed=1)
    for step in (0, 2):
        first.record(entry(step))
    first.close(None, finished=False)
    known = tracking.run
    assert known.info.status == "KILLED"
    resumed = tracking.follow(seed=2, lr_max=0.1)
    for step in (0, 2, 4):
        resumed.record(entry(step, grad_norm=1.0))
    resumed.record(entry(4, kind="validation", per=0.5))
    resumed.close(TrainingError("it diverged"), finished=False)
    assert tracking.run.info.run_id == known.info.run_id
    assert tracking.history()["train/loss"] == [(0, 7.0), (2, 5.0), (4, 3.0)]
    assert tracking.history()["validation/per"] == [(4, 0.5)]
    assert tracking.run.info.status == "FAILED"
    assert tracking.run.data.tags["failure"] == "TrainingError: it diverged"
    # a parameter is never overwritten
    assert tracking.run.data.params == {"seed": "1", "lr_max": "0.1"}


def test_a_run_that_was_deleted_is_made_anew(tracking):
    tracking.follow().close(None, finished=False)
    deleted = tracking.run.info.run_id
    tracking.client.delete_run(deleted)
    tracking.follow().close(None, finished=False)
    assert tracking.run.info.run_id != deleted


def test_a_broken_client_costs_one_line_and_no_traceback(tracking, monkeypatch, caplog, capfd):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    tracking.follow().close(None, finished=True)
    assert "mlflow cannot be used" in caplog.text
    assert "Traceback" not in capfd.readouterr().err


def test_a_run_continues_where_no_event_can_be_written(tmp_path, caplog):
    (tmp_path / "a-file").write_text("")
    events = EventFile(RunPaths(tmp_path, tmp_path / "a-file", tmp_path))
    for step in (0, 2):
        events.record(entry(step))
    assert caplog.text.count("No more TensorBoard events are written") == 1
