"""An MLflow run that follows a training run: parameters, metrics, results, the model.

MLflow is spoken to in a thread, from the import on: a server that is slow, absent or broken costs
a run one warning and no step. mlflow is imported here only; images without it train as well.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..log_lines import scrub
from .run_log import scalars

LOGGER = logging.getLogger("brain_to_text")
Outcome = Literal["FINISHED", "FAILED", "KILLED"]  # as MLflow names them

SEND_SECONDS = 5.0
RETRY_SECONDS = 60.0
# How long the end of a run waits. A finished one uploads its model; a failed one has to tell the
# other processes, a stopped one is killed after 120 s, in which its checkpoint is copied too.
PATIENCE_SECONDS: dict[Outcome, float] = {"FINISHED": 600.0, "FAILED": 30.0, "KILLED": 30.0}
METRICS_PER_REQUEST = 1000  # the tracking API's limit
PARAMS_PER_REQUEST = 100  # likewise
RESULT_FILES = ("report.html", "summary.json", "trials.csv", "metrics.jsonl")
# Said before mlflow is imported; what the user sets himself stays.
_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "GIT_PYTHON_REFRESH": "quiet",
}


@dataclass(frozen=True)
class MlflowSettings:
    """Where a run shall be tracked, from MLflow's own variables.

    Attributes:
        tracking_uri: a server's address, or the ARN of SageMaker's.
        experiment: made if it does not exist.
        run_name: None lets MLflow make one up.
    """

    tracking_uri: str
    experiment: str
    run_name: str | None

    @classmethod
    def from_variables(cls, variables: Mapping[str, str] | None = None) -> MlflowSettings | None:
        """What MLFLOW_TRACKING_URI and its companions ask for; None when nothing is asked."""
        env = os.environ if variables is None else variables
        uri = env.get("MLFLOW_TRACKING_URI", "").strip()
        if not uri:
            return None
        experiment = env.get("MLFLOW_EXPERIMENT_NAME") or "brain-to-text"
        return cls(uri, experiment, env.get("MLFLOW_RUN_NAME") or None)

    def problem(self) -> str | None:
        """Why nothing can be logged from here, in one sentence; None when it can."""
        plugin = ("sagemaker_mlflow",) if self.tracking_uri.startswith("arn:") else ()
        for module in ("mlflow", *plugin):
            if importlib.util.find_spec(module) is None:
                return (
                    f"MLFLOW_TRACKING_URI is set but this image has no module {module}, so nothing "
                    "is logged there: push an image with ./build_and_push.sh --mlflow."
                )
        return None


class MlflowRun:
    """Follows a `RunLog`; a resumed training run goes on in the MLflow run that it began.

    Args:
        settings: where to.
        params: the configuration as nested dicts; logged by dotted key.
        tags: facts about the run.
        id_file: keeps the MLflow run's id from job to job, beside the checkpoints.
        model_dir, output_data_dir: what to log when the run has finished.
        already_finished: an earlier job did all the training, and perhaps all the telling.
    """

    def __init__(
        self,
        settings: MlflowSettings,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        *,
        id_file: Path,
        model_dir: Path,
        output_data_dir: Path,
        already_finished: bool = False,
    ) -> None:
        self._settings = settings
        self._params = dict(_flat(params))
        self._tags = dict(tags)
        self._id_file = id_file
        self._model_dir = model_dir
        self._output_data_dir = output_data_dir
        self._already_finished = already_finished
        self._nothing_to_tell = False
        self._entries: queue.SimpleQueue[Mapping[str, Any]] = queue.SimpleQueue()
        self._unsent: list[Mapping[str, Any]] = []
        self._run_id = ""
        self._known_step: dict[str, int] = {}
        self._outcome: Outcome = "KILLED"
        self._reason = ""
        self._closing = threading.Event()
        self._troubled = False
        self._complete = False
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def record(self, entry: Mapping[str, Any]) -> None:
        """Take one entry of metrics.jsonl; it is sent within seconds, by the thread."""
        self._entries.put(entry)

    def close(
        self, outcome: Outcome, reason: str = "", hurry: Callable[[], bool] = lambda: False
    ) -> None:
        """Send what is left, the results of a finished run too, and end the MLflow run.

        Waits a bounded time. `hurry` is asked meanwhile whether there is less time after all.
        """
        self._outcome, self._reason = outcome, reason
        self._closing.set()
        started = time.monotonic()
        while self._thread.is_alive():
            patience = PATIENCE_SECONDS["KILLED" if hurry() else outcome]
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
            client, troubles = self._connect()
        except ImportError as error:
            LOGGER.warning("mlflow cannot be imported (%s): nothing is logged there", error)
            return
        closing = False
        while not closing:
            closing = self._closing.wait(RETRY_SECONDS if self._troubled else SEND_SECONDS)
            try:
                self._send(client)
                if closing:
                    self._end(client)
                    self._complete = True
                if self._troubled:
                    LOGGER.info("MLflow answers again")
                self._troubled = False
            except troubles as error:
                self._report(error)

    def _connect(self) -> tuple[Any, tuple[type[Exception], ...]]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        # SageMaker's plugin warns of every request to a server that is not SageMaker's
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        uri = self._settings.tracking_uri
        # OSError is requests' exceptions, too
        return MlflowClient(uri, uri), (
            MlflowException,
            OSError,
            BotoCoreError,
            ClientError,
            Boto3Error,
        )

    def _report(self, error: Exception) -> None:
        if not self._troubled:
            said = " ".join(scrub(str(error)).split())[:300]
            LOGGER.warning("MLflow does not answer as it should, training goes on: %s", said)
        self._troubled = True

    def _send(self, client: Any) -> None:
        """Open the run, send every waiting entry; an entry leaves the list once it has arrived.

        Entries of steps that an earlier job already sent are dropped: a resumed job shows its
        whole history again.
        """
        from mlflow.entities import Metric

        if not self._run_id:
            self._run_id = self._open_run(client)
        if self._nothing_to_tell:
            return
        while not self._entries.empty():
            entry = self._entries.get()
            if entry["step"] > self._known_step.get(entry["kind"], -1):
                self._unsent.append(entry)
        while self._unsent:
            metrics: list[Any] = []
            n_entries = 0
            for entry in self._unsent:
                moment = int(1000 * entry.get("time", 0.0))
                more = [Metric(k, v, moment, entry["step"]) for k, v in scalars(entry)]
                if metrics and len(metrics) + len(more) > METRICS_PER_REQUEST:
                    break
                metrics += more[:METRICS_PER_REQUEST]
                n_entries += 1
            client.log_batch(self._run_id, metrics=metrics)
            del self._unsent[:n_entries]

    def _open_run(self, client: Any) -> str:
        """The id of the run to log into: the one an earlier job began, else a new one."""
        from mlflow.entities import Param, RunTag

        run = self._earlier_run(client)
        if run is None:
            experiment = self._experiment(client)
            run = client.create_run(experiment, run_name=self._settings.run_name)
            self._id_file.parent.mkdir(parents=True, exist_ok=True)
            self._id_file.write_text(run.info.run_id, encoding="utf-8")
        elif self._already_finished and run.info.status == "FINISHED":
            self._nothing_to_tell = True
            return str(run.info.run_id)
        else:
            client.update_run(run.info.run_id, status="RUNNING")
            for kind, metric in (("train", "train/loss"), ("validation", "validation/per")):
                history = client.get_metric_history(run.info.run_id, metric)
                self._known_step[kind] = max((point.step for point in history), default=-1)
        run_id = str(run.info.run_id)
        client.log_batch(run_id, tags=[RunTag(*tag) for tag in self._tags.items()])
        # a parameter is written once: of a resumed run, only what is new
        params = [Param(*item) for item in self._params.items() if item[0] not in run.data.params]
        for start in range(0, len(params), PARAMS_PER_REQUEST):
            client.log_batch(run_id, params=params[start : start + PARAMS_PER_REQUEST])
        LOGGER.info("MLflow run %s in experiment %s", run_id, self._settings.experiment)
        return run_id

    def _earlier_run(self, client: Any) -> Any:
        from mlflow.exceptions import MlflowException

        known = self._id_file.read_text(encoding="utf-8").strip() if self._id_file.exists() else ""
        if not known:
            return None
        try:
            run = client.get_run(known)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None  # deleted, or of another server
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def _experiment(self, client: Any) -> str:
        from mlflow.exceptions import MlflowException

        name = self._settings.experiment
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(client.create_experiment(name))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(name)  # another job made it just now
        return str(found.experiment_id)

    def _end(self, client: Any) -> None:
        """Log what the outcome calls for; the run's state is set even if a file does not arrive."""
        if self._nothing_to_tell:
            return
        if self._reason:
            client.set_tag(self._run_id, "failure", self._reason[:1024])
        try:
            log = self._model_dir / "training_log"
            if log.exists():
                client.log_artifact(self._run_id, str(log))
            if self._outcome == "FINISHED":
                self._log_results(client)
        finally:
            client.set_terminated(self._run_id, self._outcome)

    def _log_results(self, client: Any) -> None:
        """Reports as artefacts; the model folder as an MLflow model that can be registered.

        The model has a flavour of its own: evaluate_model.py reads the downloaded folder. MLflow's
        flavour for torch would pickle the module, and run that pickle on loading.
        """
        for name in RESULT_FILES:
            if (self._output_data_dir / name).exists():
                client.log_artifact(self._run_id, str(self._output_data_dir / name))
        if not (self._model_dir / "checkpoint" / "best_checkpoint").exists():
            return
        from mlflow.models import Model

        client.log_artifacts(self._run_id, str(self._model_dir), "model")
        with tempfile.TemporaryDirectory() as folder:
            model = Model(run_id=self._run_id, artifact_path="model")
            model.add_flavor(
                "brain_to_text",
                checkpoint="checkpoint/best_checkpoint",
                config="checkpoint/args.yaml",
            )
            model.save(str(Path(folder) / "MLmodel"))
            client.log_artifact(self._run_id, str(Path(folder) / "MLmodel"), "model")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)
