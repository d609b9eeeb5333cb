"""A job of the kill harness in a process with other modules and variables than this one has."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from integration.kill_harness import Job, train


class AlteredJob(Job):
    """Trains where `missing` modules cannot be imported and those in `packages` can.

    Args:
        packages: a folder that goes to the end of the module path.
        variables: environment variables of the job alone.
    """

    def __init__(
        self,
        data: Path | str,
        run: Path,
        *,
        missing: tuple[str, ...] = (),
        packages: Path | None = None,
        variables: dict[str, str] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(data, run, **settings)
        self.missing, self.packages, self.variables = missing, packages, variables or {}

    def start(self) -> AlteredJob:
        for name in ("model", "output"):
            shutil.rmtree(self.run / name, ignore_errors=True)
        (self.run / "output").mkdir(parents=True)
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["brain_to_text.training.rnn_trainer_s3", "torch._dynamo"])
        environment = {**os.environ, **self.variables}
        job = (self.data, self.run, self.settings, environment)
        self.process = context.Process(
            target=_train_altered, args=(self.missing, self.packages, *job)
        )
        self.process.start()
        return self


def _train_altered(missing: tuple[str, ...], packages: Path | None, *job: Any) -> None:
    """In the child, which has imported torch and nothing that a test would hide."""
    sys.modules.update(dict.fromkeys(missing))  # type: ignore[arg-type]
    if packages is not None:
        sys.path.append(str(packages))
    train(*job)
