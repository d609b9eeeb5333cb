"""Following a run into MLflow by a scripted client, and into a file that cannot be written."""

import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import pytest
from brain_to_text.errors import TrainingError
from brain_to_text.training import trackers
from brain_to_text.training.run import RunPaths
from brain_to_text.training.trackers import EventFile, MlflowRun


class MlflowException(Exception):  # noqa: N818 -- MLflow's name
    def __init__(self, message, code="INTERNAL_ERROR"):
        super().__init__(message)
        self.error_code = code


class Server:
    """What MLflow keeps, and a client of it that fails while `away` is set."""

    def __init__(self):
        self.away = threading.Event()
        self.runs, self.metrics, self.batches = {}, {}, []
        self.artefacts, self.failure = [], None

    def __call__(self, *uris):
        return self

    def asked(self):
        if self.away.is_set():
            raise MlflowException("nobody is at https://me:hidden@host")

    def get_experiment_by_name(self, name):
        self.asked()

    def create_experiment(self, name):
        return "1"

    def create_run(self, experiment, run_name):
        run_id = f"run{len(self.runs)}"
        info = SimpleNamespace(run_id=run_id, lifecycle_stage="active", status="RUNNING")
        self.runs[run_id] = SimpleNamespace(info=info, data=SimpleNamespace(params={}))
        return self.runs[run_id]

    def get_run(self, run_id):
        self.asked()
        if run_id not in self.runs:
            raise MlflowException("unknown", "RESOURCE_DOES_NOT_EXIST")
        return self.runs[run_id]

    def update_run(self, run_id, status):
        self.runs[run_id].info.status = status

    def get_metric_history(self, run_id, name):
        return [SimpleNamespace(step=step) for step, _ in self.metrics.get(name, [])]

    def log_batch(self, run_id, metrics=(), params=(), tags=()):
        self.asked()
        self.batches.append(len(metrics))
        for name, value, _, step in metrics:
            self.metrics.setdefault(name, []).append((step, value))
        self.runs[run_id].data.params |= dict(params)

    def set_tag(self, run_id, name, value):
        self.failure = value

    def log_artifact(self, run_id, path, folder=""):
        self.artefacts.append((folder, path.rsplit("/", 1)[-1]))

    log_artifacts = log_artifact

    def set_terminated(self, run_id, status):
        self.asked()
        self.runs[run_id].info.status = status


@pytest.fixture
def server(monkeypatch):
    made = Server()
    names = ("mlflow", "mlflow.exceptions", "mlflow.tracking", "mlflow.entities")
    modules = {name: ModuleType(name) for name in names}
    modules["mlflow.exceptions"].MlflowException = MlflowException
    modules["mlflow.tracking"].MlflowClient = made
    for kind in ("Metric", "Param", "RunTag"):
        setattr(modules["mlflow.entities"], kind, lambda *values: values)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


@pytest.fixture
def follow(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "speech")
    paths = RunPaths(*(tmp_path / name for name in ("model", "output", "checkpoints")))
    for folder in (paths.model_dir, paths.checkpoint_dir):
        folder.mkdir()
    (paths.model_dir / "training_log").write_text("Finished\n")

    def start(params=None):
        given = params or {"model": {"n_units": 16}, "seed": 1}
        return MlflowRun("http://host", paths, given, {"data": "s3://b/p"})

    return start


def entry(step, kind="train", **values):
    return {"kind": kind, "time": 1.8e9 + step, "step": step, "loss": 7.0 - step, **values}


def end(run, finished=True, *, error=None):
    run.close(error, finished)


def until(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_an_absent_server_missed_is_sent_when_it_answers(server, follow, caplog):
    server.away.set()
    run = follow()
    run.record(entry(0))
    until(lambda: "MLflow does not answer as it should" in caplog.text)
    run.record(entry(2))
    server.away.clear()
    run.record(entry(4))
    end(run)
    assert server.metrics["train/loss"] == [(0, 7.0), (2, 5.0), (4, 3.0)]
    assert server.runs["run0"].info.status == "FINISHED"
    assert server.runs["run0"].data.params == {"model.n_units": "16", "seed": "1"}
    assert caplog.text.count("does not answer") == 1
    assert "hidden" not in caplog.text and "did not get all" not in caplog.text


def test_a_server_that_stays_away_is_waited_for_a_bounded_time(server, follow, caplog):
    server.away.set()
    run = follow()
    run.record(entry(0))
    end(run)
    assert caplog.text.count("MLflow did not get all of this run") == 1


def test_a_server_that_hangs_does_not_hold_the_end_of_a_stopped_run(
    server, follow, caplog, monkeypatch
):
    hanging = threading.Event()
    monkeypatch.setattr(server, "get_experiment_by_name", lambda _: hanging.wait(300) and None)
    monkeypatch.setattr(trackers, "LAST_SECONDS", 0.2)
    run = follow()
    run.record(entry(0))
    end(run, finished=False)
    assert caplog.text.count("MLflow did not get all of this run") == 1
    hanging.set()


def test_a_resumed_run_goes_on_where_it_was(server, follow):
    first = follow()
    for step in (0, 2):
        first.record(entry(step))
    until(lambda: len(server.metrics.get("train/loss", [])) == 2)
    end(first, finished=False)
    resumed = follow(params={"seed": 2, "lr_max": 0.1})
    for step in (0, 2, 4):
        resumed.record(entry(step))
    resumed.record(entry(4, kind="validation", per=0.5))
    end(resumed, error=TrainingError("it diverged"))
    assert server.metrics["train/loss"] == [(0, 7.0), (2, 5.0), (4, 3.0)]
    assert server.metrics["validation/per"] == [(4, 0.5)]
    assert list(server.runs) == ["run0"]
    assert (server.runs["run0"].info.status, server.failure) == (
        "FAILED",
        "TrainingError: it diverged",
    )
    # a parameter is never overwritten
    assert server.runs["run0"].data.params == {"model.n_units": "16", "seed": "1", "lr_max": "0.1"}


def test_a_finished_run_that_is_started_again_tells_what_is_missing(server, follow):
    first = follow()
    first.record(entry(0))
    until(lambda: "train/loss" in server.metrics)
    end(first, finished=False)  # killed while its model went up
    assert server.artefacts == [("", "training_log")]
    again = follow()
    for step in (0, 2):
        again.record(entry(step))
    end(again)
    assert server.runs["run0"].info.status == "FINISHED"
    assert server.metrics["train/loss"] == [(0, 7.0), (2, 5.0)]
    assert ("model", "model") in server.artefacts


def test_a_run_that_was_deleted_is_made_anew(server, follow, tmp_path):
    end(follow(), finished=False)
    server.runs["run0"].info.lifecycle_stage = "deleted"
    end(follow(), finished=False)
    assert (tmp_path / "checkpoints" / "mlflow_run_id").read_text() == "run1"


def test_requests_stay_within_the_api_s_limit(server, follow, monkeypatch):
    monkeypatch.setattr(trackers, "METRICS_PER_REQUEST", 2)
    run = follow()
    run.record(entry(0, grad_norm=1.0, learning_rate=0.1))
    end(run, finished=False)
    assert [size for size in server.batches if size] == [2, 1]


def test_a_run_goes_on_where_no_event_can_be_written(tmp_path, caplog):
    (tmp_path / "a-file").write_text("")
    events = EventFile(tmp_path / "a-file" / "events")
    for step in (0, 2):
        events.record(entry(step))
    end(events)
    assert caplog.text.count("No more TensorBoard events are written") == 1


def test_a_broken_client_costs_one_line_and_no_traceback(follow, monkeypatch, caplog, capfd):
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    end(follow())
    assert "mlflow cannot be used" in caplog.text
    assert "Traceback" not in capfd.readouterr().err
