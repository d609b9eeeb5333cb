"""Who follows a run beside its log: a TensorBoard event file always, an MLflow run if asked for.

TensorBoard's records are written by tensorboardX, without which a run trains as well.

MLflow is spoken to in one thread, from the import on: a server that is slow, absent or broken costs
a run one warning and no step. (MLflow's own asynchronous logging loses what it could not send, and
keeps the process from ending while a server does not answer.) mlflow is imported here only; images
without it train as well.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import leaves
from ..redaction import redact
from .log_files import Follower, RunLog, scalars
from .run import RunPaths

LOGGER = logging.getLogger("brain_to_text")
SEND_SECONDS = 5.0
RETRY_SECONDS = 60.0
# How long the end of a run waits. A finished one uploads its model; a failed one has to tell the
# other processes, a stopped one is killed after 120 s, in which its checkpoint is copied too.
PATIENCE_SECONDS, HURRY_SECONDS = 600.0, 30.0
METRICS_PER_REQUEST, PARAMS_PER_REQUEST, PARAM_LENGTH = 1000, 100, 6000  # the tracking API's limits
RESULT_FILES = ("report.html", "summary.json", "trials.csv", "metrics.jsonl")
# Said before mlflow is imported; what the user sets himself stays.
_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
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

    def close(self, error: BaseException | None, finished: bool, hurry: Callable[[], bool]) -> None:
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
        self._entries: deque[Mapping[str, Any]] = deque()
        self._run_id = ""
        self._known_step: dict[str, int] = {}
        self._outcome, self._reason = "KILLED", ""  # the first as MLflow names it
        self._closing = threading.Event()
        self._complete = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def record(self, entry: Mapping[str, Any]) -> None:
        """Take one entry of metrics.jsonl; it is sent within seconds, by the thread."""
        self._entries.append(entry)

    def close(self, error: BaseException | None, finished: bool, hurry: Callable[[], bool]) -> None:
        """Send what is left, the results of a finished run too, and end the MLflow run.

        Waits a bounded time. `hurry` is asked meanwhile whether there is less time after all. A run
        that is not finished without an error was stopped.
        """
        if error is not None:
            self._reason = redact(f"{type(error).__name__}: {' '.join(str(error).split())}")
            self._outcome = "FAILED"
        elif finished:
            self._outcome = "FINISHED"
        self._closing.set()
        started, patient = time.monotonic(), self._outcome == "FINISHED"
        while self._thread.is_alive():
            patience = PATIENCE_SECONDS if patient and not hurry() else HURRY_SECONDS
            if time.monotonic() - started > patience:
                break
            self._thread.join(timeout=0.2)
        if not self._complete:
            LOGGER.warning(
                "MLflow did not get all of this run: its numbers are in metrics.jsonl, its model "
                "in model.tar.gz"
            )

    # --- in the thread ----------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            from boto3.exceptions import Boto3Error
            from botocore.exceptions import BotoCoreError, ClientError
            from mlflow.exceptions import MlflowException
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            LOGGER.warning("mlflow cannot be imported (%s): nothing is logged there", error)
            return

        # SageMaker's plugin warns of every request to a server that is not SageMaker's
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        client = MlflowClient(self._uri, self._uri)
        closing = troubled = False
        while not closing:
            closing = self._closing.wait(RETRY_SECONDS if troubled else SEND_SECONDS)
            try:
                self._send(client)
                if closing:
                    self._end(client)
                    self._complete = True
                if troubled:
                    LOGGER.info("MLflow answers again")
                troubled = False
            # OSError is requests' exceptions, too
            except (MlflowException, OSError, BotoCoreError, ClientError, Boto3Error) as error:
                if not troubled:
                    said = " ".join(redact(str(error)).split())[:300]
                    LOGGER.warning(
                        "MLflow does not answer as it should, training goes on: %s", said
                    )
                troubled = True

    def _send(self, client: Any) -> None:
        """Open the run, send every waiting entry; an entry leaves the list once it has arrived.

        Entries of steps that an earlier job already sent are dropped: a resumed job shows its
        whole history again.
        """
        from mlflow.entities import Metric

        self._run_id = self._run_id or self._open_run(client)
        while self._entries:
            waiting = [self._entries[i] for i in range(min(len(self._entries), 100))]
            metrics = [
                Metric(name, value, int(1000 * entry["time"]), entry["step"])
                for entry in waiting
                if entry["step"] > self._known_step.get(entry["kind"], -1)
                for name, value in scalars(entry)
            ]
            for part in _parts(metrics, METRICS_PER_REQUEST):
                client.log_batch(self._run_id, metrics=part)
            for _ in waiting:
                self._entries.popleft()

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
        from mlflow.exceptions import MlflowException

        known = self._id_file.read_text(encoding="utf-8").strip() if self._id_file.exists() else ""
        try:
            run = client.get_run(known) if known else None
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None  # deleted, or of another server
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


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
