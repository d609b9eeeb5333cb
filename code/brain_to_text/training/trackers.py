"""What follows a run beside its log: a TensorBoard event file, and an MLflow run if asked for.

Neither stops a run or makes it wait. TensorBoard's records are written by tensorboardX's
`RecordWriter`, as its `SummaryWriter` hangs on a full volume. MLflow's client works in a thread,
from its import on, with short time-outs; what did not arrive is sent with the next entry. (MLflow's
asynchronous logging opens a run synchronously, and loses what it could not send.) Images without
either package train as well.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import queue
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from ..config import leaves
from ..redaction import one_line
from .log_files import RunLog, scalars
from .run import RunPaths

LOGGER = logging.getLogger("brain_to_text")
# How long the end of a run waits. A finished one uploads its model; a failed one has to tell the
# other processes, a stopped one is killed after 120 s, in which its checkpoint is copied too.
MODEL_SECONDS, LAST_SECONDS = 600.0, 30.0
RESULT_FILES = ("report.html", "summary.json", "trials.csv", "metrics.jsonl")
# Set before mlflow is imported, unless the user has set them.
_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "GIT_PYTHON_REFRESH": "quiet",
}
_JOB_TAGS = {
    "job": "TRAINING_JOB_NAME",
    "revision": "BRAIN_TO_TEXT_REVISION",
    "instance_type": "SM_CURRENT_INSTANCE_TYPE",
}


def follow(
    log: RunLog, paths: RunPaths, params: Mapping[str, Any], tags: Mapping[str, str]
) -> MlflowRun | None:
    """Write every entry of this run, a resumed one's history too, to TensorBoard and MLflow.

    Args:
        params: the configuration as nested dicts.
        tags: facts about the data.

    Returns:
        MLflow's run, which has to be closed; None where none was asked for, or cannot be.
    """
    try:
        log.follow(EventFile(paths).record)
    except ImportError as error:
        log.info(f"No TensorBoard events are written: no module {error.name}")
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if not uri:
        return None
    for module in ("mlflow", "sagemaker_mlflow") if uri.startswith("arn:") else ("mlflow",):
        if importlib.util.find_spec(module) is None:
            log.warning(
                f"MLFLOW_TRACKING_URI is set but this image has no module {module}, so nothing is "
                "logged there: push an image with ./build_and_push.sh --mlflow."
            )
            return None
    run = MlflowRun(uri, paths, params, tags)
    log.follow(run.record)
    return run


class EventFile:
    """Writes each entry's numbers as one event at its step and time.

    A file that cannot be written (a full disk) costs one warning and the events, not the run.

    Raises:
        ImportError: tensorboardX is not installed.
    """

    def __init__(self, paths: RunPaths) -> None:
        from tensorboardX import RecordWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        self._path = paths.event_file
        self._open, self._event, self._summary = RecordWriter, Event, Summary
        self._writer: Any = None
        self._failed = False

    def record(self, entry: Mapping[str, Any]) -> None:
        """Append one entry of metrics.jsonl."""
        if self._failed:
            return
        values = [self._summary.Value(tag=tag, simple_value=v) for tag, v in scalars(entry)]
        try:
            if self._writer is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._writer = self._open(str(self._path))
                self._write(wall_time=entry["time"], file_version="brain.Event:2")
            summary = self._summary(value=values)
            self._write(wall_time=entry["time"], step=entry["step"], summary=summary)
            self._writer.flush()
        except OSError as error:
            self._failed = True
            LOGGER.warning("No more TensorBoard events are written to %s: %s", self._path, error)

    def _write(self, **event: Any) -> None:
        self._writer.write(self._event(**event).SerializeToString())


class MlflowRun:
    """Sends entries to MLflow; a resumed run continues the MLflow run that it began.

    MLFLOW_EXPERIMENT_NAME and MLFLOW_RUN_NAME say how both are called there.

    Args:
        uri: a server's address, or the ARN of SageMaker's.
        paths: where results are taken from; the MLflow run's id lies beside the checkpoints.
        params, tags: as those of `follow`; facts about the job are added.
    """

    def __init__(
        self, uri: str, paths: RunPaths, params: Mapping[str, Any], tags: Mapping[str, str]
    ) -> None:
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        self._uri, self._paths = uri, paths
        self._params = {name: str(value) for name, value in leaves(params)}
        job = {tag: os.environ.get(name) for tag, name in _JOB_TAGS.items()}
        self._tags = {name: value for name, value in {**job, **tags}.items() if value}
        self._entries: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._status, self._failure = "KILLED", ""
        self._complete = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def record(self, entry: Mapping[str, Any]) -> None:
        """Take one entry of metrics.jsonl; the thread sends it."""
        self._entries.put(entry)

    def close(self, error: BaseException | None, finished: bool) -> None:
        """Send what is left, the results of a finished run too; waits a bounded time.

        Args:
            error: that ended the run; without one, a run that is not `finished` was stopped.
        """
        if error is not None:
            self._status, self._failure = "FAILED", _words(error)
        elif finished:
            self._status = "FINISHED"
        self._entries.put(None)
        self._thread.join(MODEL_SECONDS if self._status == "FINISHED" else LAST_SECONDS)
        if not self._complete:
            LOGGER.warning(
                "MLflow did not get all of this run: its numbers are in metrics.jsonl, its model "
                "in model.tar.gz"
            )

    # --- in the thread ----------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            from mlflow import MlflowClient

            # SageMaker's plugin warns of every request to a server that is not SageMaker's
            logging.getLogger("mlflow").setLevel(logging.ERROR)
            client = MlflowClient(self._uri, self._uri)
        except Exception as error:  # noqa: BLE001 - whatever a broken installation raises
            LOGGER.warning("mlflow cannot be used: %s", _words(error))
            return
        run_id = ""
        sent: dict[str, int] = {}
        unsent: list[Mapping[str, Any]] = []
        warned = ending = False
        while not ending:
            entry = self._entries.get()
            if entry is None:
                ending = True
            else:
                unsent.append(entry)
                if not self._entries.empty():
                    continue  # they are sent together
            try:
                if not run_id:
                    run_id, sent = self._open_run(client)
                client.log_batch(run_id, metrics=_metrics(unsent, sent))
                unsent.clear()
                if ending:
                    self._end(client, run_id)
                    self._complete = True
            except Exception as error:  # noqa: BLE001 - the client's, and those of what it uses
                if not warned:
                    LOGGER.warning("MLflow does not answer, training goes on: %s", _words(error))
                warned = True

    def _open_run(self, client: Any) -> tuple[str, dict[str, int]]:
        """Begin a run, or continue the one that an earlier job began.

        Returns:
            The run's id, and the last step that it has of each kind of entry.
        """
        from mlflow.entities import Param, RunTag

        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "brain-to-text"
        id_file = self._paths.checkpoint_dir / "mlflow_run_id"
        run = _earlier_run(client, id_file.read_text("utf-8") if id_file.exists() else "")
        sent = {}
        if run is None:
            found = client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else client.create_experiment(experiment)
            run = client.create_run(number, run_name=os.environ.get("MLFLOW_RUN_NAME") or None)
            id_file.write_text(run.info.run_id, encoding="utf-8")
        else:
            client.update_run(run.info.run_id, status="RUNNING")
            for kind, metric in (("train", "train/loss"), ("validation", "validation/per")):
                history = client.get_metric_history(run.info.run_id, metric)
                sent[kind] = max((point.step for point in history), default=-1)
        client.log_batch(
            run.info.run_id,
            tags=[RunTag(*tag) for tag in self._tags.items()],
            # a parameter is written once: of a resumed run, only what is new
            params=[Param(*p) for p in self._params.items() if p[0] not in run.data.params],
        )
        LOGGER.info("MLflow run %s in experiment %s", run.info.run_id, experiment)
        return run.info.run_id, sent

    def _end(self, client: Any, run_id: str) -> None:
        """Log what the outcome calls for; the run's state is set even if a file does not arrive."""
        if self._failure:
            client.set_tag(run_id, "failure", self._failure)
        try:
            files = [self._paths.model_dir / "training_log"]
            if self._status == "FINISHED":
                files += [self._paths.output_data_dir / name for name in RESULT_FILES]
                client.log_artifacts(run_id, str(self._paths.model_dir), "model")
            for file in files:
                if file.exists():
                    client.log_artifact(run_id, str(file))
        finally:
            client.set_terminated(run_id, self._status)


def _metrics(entries: Iterable[Mapping[str, Any]], sent: Mapping[str, int]) -> list[Any]:
    """The numbers of all entries but those of steps that an earlier job sent."""
    from mlflow.entities import Metric

    return [
        Metric(name, value, int(1000 * entry["time"]), entry["step"])
        for entry in entries
        if entry["step"] > sent.get(entry["kind"], -1)
        for name, value in scalars(entry)
    ]


def _earlier_run(client: Any, run_id: str) -> Any:
    """The MLflow run that an earlier job began; None if there is none, or it was deleted."""
    try:
        run = client.get_run(run_id) if run_id else None
    except Exception:  # noqa: BLE001 - another server's; one that is away refuses a new run too
        return None
    return run if run is not None and run.info.lifecycle_stage == "active" else None


def _words(error: BaseException) -> str:
    return one_line(f"{type(error).__name__}: {' '.join(str(error).split())}")
