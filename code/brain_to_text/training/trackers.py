"""Who follows a run beside its log: a TensorBoard event file always, an MLflow run if asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..log_lines import scrub
from .mlflow_run import MlflowRun, MlflowSettings
from .run import RunPaths
from .run_log import RunLog
from .tensorboard import EventFile, open_event_file


@dataclass
class Trackers:
    """The followers of one run, on its main process.

    Attributes:
        event_file: None where tensorboardX is not installed.
        mlflow_run: None where MLflow was not asked for or is not installed.
    """

    event_file: EventFile | None
    mlflow_run: MlflowRun | None

    def copies(self) -> dict[str, Path]:
        """Files worth copying while they grow, by their key in the logs' folder."""
        if self.event_file is None:
            return {}
        return {f"tensorboard/{self.event_file.path.name}": self.event_file.path}

    def close(self, error: BaseException | None, finished: bool, hurry: Callable[[], bool]) -> None:
        """Write and send what is left. An unfinished run without an error was stopped."""
        if self.event_file is not None:
            self.event_file.close()
        if self.mlflow_run is None:
            return
        if error is not None:
            reason = scrub(f"{type(error).__name__}: {' '.join(str(error).split())}")
            self.mlflow_run.close("FAILED", reason, hurry)
        else:
            self.mlflow_run.close("FINISHED" if finished else "KILLED", "", hurry)


def announce(log: RunLog) -> None:
    """At the start of a job: say at once that MLflow was asked for in vain."""
    settings = MlflowSettings.from_variables()
    problem = settings.problem() if settings else None
    if problem:
        log.warning(problem)


def open_trackers(
    log: RunLog,
    paths: RunPaths,
    *,
    params: dict[str, Any],
    tags: dict[str, str],
    already_finished: bool = False,
) -> Trackers:
    """Open what follows this run and show it the history of a resumed one.

    Args:
        params: the configuration as nested dicts; tags: facts about data and job.
        already_finished: nothing will happen any more; what MLflow lacks is still sent.
    """
    events = open_event_file(paths.tensorboard_dir or paths.output_data_dir / "tensorboard")
    if events is not None:
        log.follow(events)
    settings = MlflowSettings.from_variables()
    if settings is None or settings.problem():
        return Trackers(events, None)
    tags = {
        "job": os.environ.get("TRAINING_JOB_NAME", ""),
        "revision": os.environ.get("BRAIN_TO_TEXT_REVISION", ""),
        "instance_type": os.environ.get("SM_CURRENT_INSTANCE_TYPE", ""),
        **tags,
    }
    run = MlflowRun(
        settings,
        params,
        {name: value for name, value in tags.items() if value},
        id_file=paths.checkpoint_dir / "mlflow_run_id",
        model_dir=paths.model_dir,
        output_data_dir=paths.output_data_dir,
        already_finished=already_finished,
    )
    log.follow(run)
    return Trackers(events, run)
