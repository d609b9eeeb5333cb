"""Who follows a run beside its log: a TensorBoard event file always, an MLflow run if asked for.

Neither stops a run or makes it wait. TensorBoard's records are written by tensorboardX's
`RecordWriter` (its `SummaryWriter` stands still for ever on a full volume). MLflow is spoken to in
a thread, from the import on, with short time-outs; what did not arrive goes along with the next
entry. (MLflow's own asynchronous logging opens a run synchronously, and loses what it could not
send.) Images without either package train as well.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import leaves
from ..redaction import redact
from .log_files import Follower, RunLog, scalars
from .run import RunPaths

LOGGER = logging.getLogger("brain_to_text")
# How long the end of a run waits. A finished one uploads its model; a failed one has to tell the
# other processes, a stopped one is killed after 120 s, in which its checkpoint is copied too.
MODEL_SECONDS, LAST_SECONDS = 600.0, 30.0
METRICS_PER_REQUEST, PARAMS_PER_REQUEST, PARAM_LENGTH = 1000, 100, 6000  # the tracking API's limits
RESULT_FILES = ("report.html", "summary.json", "trials.csv", "metrics.jsonl")
# Set before mlflow is imported; what the user sets himself stays.
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


def open_trackers(
    log: RunLog, paths: RunPaths, params: Mapping[str, Any], tags: Mapping[str, str]
) -> list[Follower]:
    """What follows this run from now on; it sees the history of a resumed one.

    Args:
        params: the configuration as nested dicts.
        tags: facts about the data.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    modules = ("mlflow", "sagemaker_mlflow") if uri.startswith("arn:") else ("mlflow",)
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if uri and missing:
        log.warning(
            f"MLFLOW_TRACKING_URI is set but this image has no module {missing[0]}, so nothing is "
            "logged there: push an image with ./build_and_push.sh --mlflow."
        )
    trackers: list[Follower] = []
    try:
        trackers.append(EventFile(paths.event_file))
    except ImportError as error:
        log.info(f"No TensorBoard events are written: no module {error.name}")
    if uri and not missing:
        trackers.append(MlflowRun(uri, paths, params, tags))
    for tracker in trackers:
        log.follow(tracker)
    return trackers


class EventFile:
    """Writes each entry's numbers as one event at its step and time.

    Trouble with the file (a full disk) is one warning and the end of the file, not of the run.

    Args:
        path: made with the first entry.

    Raises:
        ImportError: tensorboardX is not installed.
    """

    def __init__(self, path: Path) -> None:
        from tensorboardX import RecordWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        self.path = path
        self._Event, self._Summary, self._RecordWriter = Event, Summary, RecordWriter
        self._writer: Any = None
        self._broken = False

    def record(self, entry: Mapping[str, Any]) -> None:
        """Append one entry of metrics.jsonl."""
        if self._broken:
            return
        try:
            if self._writer is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._writer = self._RecordWriter(str(self.path))
                self._write(wall_time=entry["time"], file_version="brain.Event:2")
            values = [self._Summary.Value(tag=tag, simple_value=v) for tag, v in scalars(entry)]
            summary = self._Summary(value=values)
            self._write(wall_time=entry["time"], step=entry["step"], summary=summary)
            self._writer.flush()
        except OSError as error:
            self._broken = True
            LOGGER.warning("No more TensorBoard events are written to %s: %s", self.path, error)

    def close(self, error: BaseException | None, finished: bool) -> None:
        """Write what is left, however the run ended."""
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as trouble:
            LOGGER.warning("The end of %s is missing: %s", self.path, trouble)

    def _write(self, **event: Any) -> None:
        self._writer.write(self._Event(**event).SerializeToString())


class MlflowRun:
    """Follows a `RunLog`; a resumed training run goes on in the MLflow run that it began.

    MLFLOW_EXPERIMENT_NAME and MLFLOW_RUN_NAME say how both are called there.

    Args:
        uri: a server's address, or the ARN of SageMaker's.
        paths: where results are taken from; the MLflow run's id lies beside the checkpoints.
        params, tags: as those of `open_trackers`; facts about the job are added.
    """

    def __init__(
        self, uri: str, paths: RunPaths, params: Mapping[str, Any], tags: Mapping[str, str]
    ) -> None:
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        self._uri, self._paths = uri, paths
        self._params = {name: str(value)[:PARAM_LENGTH] for name, value in leaves(params)}
        job = {tag: os.environ[name] for tag, name in _JOB_TAGS.items() if os.environ.get(name)}
        self._tags = {**job, **tags}
        self._id_file = paths.checkpoint_dir / "mlflow_run_id"
        self._entries: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._run_id = ""
        self._known_step: dict[str, int] = {}
        self._outcome, self._reason = "KILLED", ""  # the first as MLflow names it
        self._complete = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def record(self, entry: Mapping[str, Any]) -> None:
        """Take one entry of metrics.jsonl; the thread sends it."""
        self._entries.put(entry)

    def close(self, error: BaseException | None, finished: bool) -> None:
        """Send what is left, the results of a finished run too, and end the MLflow run.

        Waits a bounded time. A run that is not finished without an error was stopped.
        """
        if error is not None:
            self._reason = redact(f"{type(error).__name__}: {' '.join(str(error).split())}")
            self._outcome = "FAILED"
        elif finished:
            self._outcome = "FINISHED"
        self._entries.put(None)
        self._thread.join(MODEL_SECONDS if self._outcome == "FINISHED" else LAST_SECONDS)
        if not self._complete:
            LOGGER.warning(
                "MLflow did not get all of this run: its numbers are in metrics.jsonl, its model "
                "in model.tar.gz"
            )

    # --- in the thread ----------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            from mlflow.tracking import MlflowClient

            # SageMaker's plugin warns of every request to a server that is not SageMaker's
            logging.getLogger("mlflow").setLevel(logging.ERROR)
            client = MlflowClient(self._uri, self._uri)
        except Exception as error:  # noqa: BLE001 - whatever a broken installation raises
            LOGGER.warning("mlflow cannot be used (%s): nothing is logged there", _words(error))
            return
        waiting: list[Mapping[str, Any]] = []
        troubled = ended = False
        while not ended:
            entry = self._entries.get()
            if entry is None:
                ended = True
            else:
                waiting.append(entry)
            try:
                self._run_id = self._run_id or self._open_run(client)
                if self._entries.empty():  # at the start, a resumed run's history comes at once
                    self._send(client, waiting)
                if ended:
                    self._end(client)
                    self._complete = True
                if troubled:
                    LOGGER.info("MLflow answers again")
                troubled = False
            except Exception as error:  # noqa: BLE001 - the client's, and those of what it uses
                if not troubled:
                    LOGGER.warning(
                        "MLflow does not answer as it should, training goes on: %s", _words(error)
                    )
                troubled = True

    def _send(self, client: Any, waiting: list[Mapping[str, Any]]) -> None:
        """Send entries and forget them, but for those of steps that an earlier job already sent: a
        resumed job shows its whole history again.
        """
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, int(1000 * entry["time"]), entry["step"])
            for entry in waiting
            if entry["step"] > self._known_step.get(entry["kind"], -1)
            for name, value in scalars(entry)
        ]
        for part in _parts(metrics, METRICS_PER_REQUEST):
            client.log_batch(self._run_id, metrics=part)
        waiting.clear()

    def _open_run(self, client: Any) -> str:
        """The id of the run to log into: the one an earlier job began, else a new one."""
        from mlflow.entities import Param, RunTag

        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "brain-to-text"
        run = self._earlier_run(client)
        if run is None:
            found = client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else client.create_experiment(experiment)
            run = client.create_run(number, run_name=os.environ.get("MLFLOW_RUN_NAME") or None)
            self._id_file.write_text(run.info.run_id, encoding="utf-8")
        else:
            client.update_run(run.info.run_id, status="RUNNING")
            for kind, metric in (("train", "train/loss"), ("validation", "validation/per")):
                history = client.get_metric_history(run.info.run_id, metric)
                self._known_step[kind] = max((point.step for point in history), default=-1)
        run_id = str(run.info.run_id)
        client.log_batch(run_id, tags=[RunTag(*tag) for tag in self._tags.items()])
        # a parameter is written once: of a resumed run, only what is new
        params = [Param(*item) for item in self._params.items() if item[0] not in run.data.params]
        for part in _parts(params, PARAMS_PER_REQUEST):
            client.log_batch(run_id, params=part)
        LOGGER.info("MLflow run %s in experiment %s", run_id, experiment)
        return run_id

    def _earlier_run(self, client: Any) -> Any:
        """The MLflow run that an earlier job began; None if there is none, or it was deleted."""
        known = self._id_file.read_text(encoding="utf-8").strip() if self._id_file.exists() else ""
        try:
            run = client.get_run(known) if known else None
        except Exception:  # noqa: BLE001 - of another server; one that is away refuses a new run too
            return None
        return run if run is not None and run.info.lifecycle_stage == "active" else None

    def _end(self, client: Any) -> None:
        """Log what the outcome calls for; the run's state is set even if a file does not arrive."""
        if self._reason:
            client.set_tag(self._run_id, "failure", self._reason[:1024])
        try:
            files = [self._paths.model_dir / "training_log"]
            if self._outcome == "FINISHED":
                files += [self._paths.output_data_dir / name for name in RESULT_FILES]
                client.log_artifacts(self._run_id, str(self._paths.model_dir), "model")
            for file in files:
                if file.exists():
                    client.log_artifact(self._run_id, str(file))
        finally:
            client.set_terminated(self._run_id, self._outcome)


def _words(error: BaseException) -> str:
    return " ".join(redact(str(error)).split())[:300]


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
