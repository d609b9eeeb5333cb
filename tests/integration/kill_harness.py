"""Kill a small training run at random instants and compare what it ends with to a run left alone.

    .venv/bin/python tests/integration/kill_harness.py --kills 50 --seed 0

Jobs are real processes that get a real SIGTERM or SIGKILL: some time after a line of the log, drawn
at random, while a checkpoint is half-written, or while the end is written (report, tables). A job
that was killed is started again on the same checkpoint folder until the run is finished; then the
next run begins, until all kills are spent. Weights, optimiser, counters, validation history, log
and every file that the run leaves must equal the uninterrupted run's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "code")]

import torch  # noqa: E402
from support.tiny_data import TINY_DECODER, write_dataset  # noqa: E402
from support.training_examples import newest_state  # noqa: E402

SETTINGS: dict[str, Any] = {
    **TINY_DECODER,
    "num_training_batches": 60,
    "lr_warmup_steps": 5,
    "batches_per_train_log": 5,
    "batches_per_val_step": 15,
    "batches_per_save": 4,
    "ema_decay": 0.9,
    "classifier": "factored",
    "objective.schedule": "[[0.1, 1.0], [0.9, 0.2]]",
    "time_mask_share": 0.1,
    "save_all_val_steps": True,
    "save_final_model": True,
    "save_val_logits": True,
}
KINDS = ("SIGTERM", "SIGKILL", "SIGKILL in a save", "SIGKILL at the end")
JOB_SECONDS = 300


@dataclass
class Report:
    """What the harness did and found."""

    kills: Counter = field(default_factory=Counter)
    runs: int = 0
    jobs: int = 0
    resumed_steps: list[int] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    def describe(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kills.items()))
        verdict = "\n".join(self.differences) or "every run ended bit-identical"
        return (
            f"{sum(self.kills.values())} kills ({kinds}) in {self.jobs} jobs of {self.runs} runs; "
            f"resumed {len(self.resumed_steps)} times: {verdict}"
        )


def run_harness(kills: int, seed: int, folder: Path) -> Report:
    """Spend `kills` kills; see the module's description."""
    data = folder / "data"
    write_dataset(data, n_features=16, bins=(80, 140))
    alone = Job(data, folder / "alone").start()
    alone.join_successfully()
    expected = outcome(folder / "alone")
    expected.pop("resumed")

    rng = random.Random(seed)
    report = Report()
    while sum(report.kills.values()) < kills:
        report.runs += 1
        run = folder / f"run-{report.runs}"
        while True:
            job = Job(data, run).start()
            report.jobs += 1
            if sum(report.kills.values()) < kills:
                kind = job.kill_some_time(rng)
                if kind is not None:
                    report.kills[kind] += 1
            if job.finished():
                break
        found = outcome(run)
        report.resumed_steps += found.pop("resumed")
        report.differences += [
            f"run {report.runs}: {name} differs" for name in unequal(expected, found)
        ]
        shutil.rmtree(run)
    return report


class Job:
    """One training process on the run's folder, as SageMaker would start it.

    Args:
        missing: modules that cannot be imported in it.
        packages: a folder that goes to the end of its module path.
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
        self.data, self.run = str(data), run
        self.settings = SETTINGS | settings
        self.missing, self.packages, self.variables = missing, packages, variables or {}
        self.checkpoints = run / "checkpoints"

    def start(self) -> Job:
        for name in ("model", "output"):  # a new job has its checkpoints and nothing else
            shutil.rmtree(self.run / name, ignore_errors=True)
        (self.run / "output").mkdir(parents=True)
        # children are forked from a process that has imported torch and done nothing else
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["brain_to_text.training.rnn_trainer_s3", "torch._dynamo"])
        self.process = context.Process(
            target=train,
            args=(self.data, self.run, self.settings, {**os.environ, **self.variables}),
            kwargs={"missing": self.missing, "packages": self.packages},
        )
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
            self.process.start()
        return self

    def kill_some_time(self, rng: random.Random) -> str | None:
        """Kill the job at a random instant; None when it ended before."""
        kind = rng.choice(KINDS)
        before = len(self.said())
        at_the_end = kind == "SIGKILL at the end"
        step = rng.choice(range(0, SETTINGS["num_training_batches"], 5))
        line = "Finished at step" if at_the_end else f"Train batch {step}:"
        wait = rng.uniform(0.0, 1.0)
        deadline = None if at_the_end or rng.random() < 0.8 else time.monotonic()
        while self.process.is_alive():
            if deadline is None and line in self.said()[before:]:
                deadline = time.monotonic()
            saving = kind != "SIGKILL in a save" or any(self.checkpoints.glob("*.tmp"))
            if deadline is not None and time.monotonic() >= deadline + wait and saving:
                break
            time.sleep(0.001 if kind == "SIGKILL in a save" else 0.01)
        if not self.process.is_alive():
            return None
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
        return kind

    def said(self) -> str:
        """Everything on stdout and stderr, of this job and the ones before it."""
        path = self.run / "said"
        return path.read_text() if path.exists() else ""

    def wait_for(self, text: str) -> None:
        """Return once the job has said `text`."""
        deadline = time.monotonic() + JOB_SECONDS
        while text not in self.said():
            assert self.process.is_alive() and time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def finished(self) -> bool:
        """Wait for the end; True when the run is complete. A failure that nobody caused raises."""
        self.process.join(JOB_SECONDS)
        code = self.process.exitcode
        log = self.run / "model" / "training_log"
        text = log.read_text() if log.exists() else ""
        if code == 0:
            return "Finished at step" in text or "already finished" in text
        if code == -signal.SIGKILL or code == -signal.SIGTERM:  # before the handlers were set
            return False
        raise AssertionError(f"a job ended with {code}:\n{self.said()[-3000:]}")

    def join_successfully(self) -> None:
        assert self.finished(), self.said()[-3000:]


def train(
    data: str,
    run: Path,
    settings: dict[str, Any],
    environment: dict[str, str],
    missing: tuple[str, ...] = (),
    packages: Path | None = None,
) -> None:
    """The job itself, in the child process; `data` is a folder or an s3:// URL."""
    os.environ.update(environment)
    sys.modules.update(dict.fromkeys(missing))  # type: ignore[arg-type]
    if packages is not None:
        sys.path.append(str(packages))
    with (run / "said").open("a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    os.environ["SAGEMAKER_BASE_DIR"] = str(run)
    import train_model_sagemaker

    where = {"data-dir": data}
    if data.startswith("s3://"):
        bucket, prefix = data.removeprefix("s3://").split("/", 1)
        where = {"s3-bucket": bucket, "s3-data-prefix": prefix}
    options = {**where, **settings}.items()
    sys.exit(
        train_model_sagemaker.main(
            [word for name, value in options for word in (f"--{name}", str(value))]
        )
    )


def outcome(run: Path) -> dict[str, Any]:
    """Everything a finished run leaves, without clock readings."""
    _, state = newest_state(run / "checkpoints")
    best = torch.load(run / "model" / "checkpoint" / "best_checkpoint", weights_only=True)
    lines = (run / "model" / "training_log").read_text().splitlines()
    resumed = [int(step) for step in re.findall(r"Resuming after step (\d+)", "\n".join(lines))]
    for validation in state["run"]["validations"]:
        validation.pop("seconds")
    return {
        "state": {k: v for k, v in state.items() if k != "log"},
        "best": best,
        "files": files(run),
        "log": [text for line in lines if (text := without_clock(line))],
        "resumed": resumed,
    }


def files(run: Path) -> dict[str, Any]:
    """What lies in the folders that become model.tar.gz and output.tar.gz, by path.

    Weights and logits as they load, tables as text; of the rest, which holds clock readings, only
    that it is there.
    """
    found: dict[str, Any] = {}
    for folder in (run / "model", run / "output" / "data"):
        for path in sorted(folder.rglob("*")):
            if path.suffix == ".pt" or (path.parent.name == "checkpoint" and not path.suffix):
                content = torch.load(path, weights_only=True)
            elif path.suffix == ".csv":
                content = path.read_text()
            else:
                content = "a folder" if path.is_dir() else "a file"
            found[path.relative_to(run).as_posix()] = content
    return found


def without_clock(line: str) -> str | None:
    """The part of a log line that must be equal between two runs; None for the rest.

    "Running test" is said again when a validation was interrupted, so it is not compared.
    """
    text = line.split(": ", 1)[-1] if line[:2] == "20" else line
    if not text.startswith(("Train batch ", "Val batch ", "New best", "  t15")):
        return None
    return re.sub(r" time: .*", "", text)


def unequal(expected: Any, found: Any, name: str = "") -> list[str]:
    """Paths of values that differ; tensors are compared bit by bit."""
    if isinstance(expected, torch.Tensor):
        same = expected.dtype == found.dtype and torch.equal(
            expected.contiguous().view(torch.uint8) if expected.dim() else expected,
            found.contiguous().view(torch.uint8) if found.dim() else found,
        )
        return [] if same else [name]
    if isinstance(expected, (list, tuple)):
        expected, found = dict(enumerate(expected)), dict(enumerate(found))
    if isinstance(expected, dict):
        differing = [f"{name}/{key}" for key in expected.keys() ^ found.keys()]
        for key in expected.keys() & found.keys():
            differing += unequal(expected[key], found[key], f"{name}/{key}")
        return sorted(differing)
    return [] if expected == found else [f"{name} ({expected!r} != {found!r})"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        report = run_harness(options.kills, options.seed, Path(folder))
    print(f"{report.describe()} ({time.monotonic() - started:.0f} s)")
    return 1 if report.differences else 0


if __name__ == "__main__":
    sys.exit(main())
