"""A training job in a container, run as SageMaker runs it."""

from __future__ import annotations

import json
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .engine import docker
from .local_s3 import LocalS3

BUCKET = "tiny"
PREFIX = "data/hdf5_data_diphone_encoded"
SESSIONS = ("t15.2023.08.11", "t15.2023.08.13")

# A decoder for the tiny data: seconds, not minutes.
TINY_JOB = {
    "s3-bucket": BUCKET,
    "config-file": "rnn_args_diphone_sagemaker.yaml",
    "model.n_units": 16,
    "model.n_layers": 1,
    "dataset.batch_size": 4,
    "dataset.days_per_batch": 2,
    "num_training_batches": 6,
    "batches_per_train_log": 1,
    "batches_per_val_step": 3,
    "lr_warmup_steps": 2,
    "lr_warmup_steps_day": 2,
}


@dataclass
class Result:
    """What a container left.

    Attributes:
        exit_code: of `train`.
        log: stdout and stderr.
        failure: output/failure, stripped; "" when there is none.
        base: the folder that was /opt/ml (without code).
    """

    exit_code: int
    log: str
    failure: str
    base: Path

    @property
    def model_files(self) -> set[str]:
        model = self.base / "model"
        return {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}


def write_configuration(
    base: Path, hyperparameters: Mapping[str, Any], hosts: Sequence[str], host: str
) -> None:
    """Make `base` a folder like /opt/ml, with what SageMaker says of a job in input/config."""
    for folder in ("input/config", "output/data", "model", "checkpoints"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    config = {
        "hyperparameters.json": {k: json.dumps(v) for k, v in hyperparameters.items()},
        "resourceconfig.json": {
            "current_host": host,
            "hosts": list(hosts),
            "network_interface_name": "lo" if host == "localhost" else "eth0",
        },
        "inputdataconfig.json": {},
    }
    for name, content in config.items():
        (base / "input" / "config" / name).write_text(json.dumps(content))


@dataclass
class Job:
    """One training job: its /opt/ml folder outlives its containers, as on SageMaker."""

    image: str
    base: Path
    s3: LocalS3
    hyperparameters: dict[str, Any]
    variables: dict[str, str] = field(default_factory=dict)
    name: str = field(default_factory=lambda: f"b2t-test-{uuid.uuid4().hex[:8]}")
    options: list[str] = field(default_factory=list)
    hosts: tuple[str, ...] = ("algo-1",)
    host: str = "algo-1"

    def __post_init__(self) -> None:
        write_configuration(self.base, self.hyperparameters, self.hosts, self.host)

    def start(self) -> None:
        """`docker run --detach IMAGE train`, with the mounts and variables of SageMaker."""
        variables = {
            name: value
            for name, value in self.s3.environment().items()
            if not name.endswith("_FILE")
        }
        variables |= {"TRAINING_JOB_NAME": self.name, "OMP_NUM_THREADS": "1", **self.variables}
        command = ["run", "--detach", "--name", self.name, "--hostname", self.host]
        for folder in ("input", "output", "model", "checkpoints"):
            command += ["--volume", f"{self.base / folder}:/opt/ml/{folder}"]
        for name, value in variables.items():
            command += ["--env", f"{name}={value}"]
        docker(*command, *self.options, self.image, "train")

    def log(self) -> str:
        done = subprocess.run(
            ["docker", "logs", self.name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
        return done.stdout

    def wait(self, seconds: float = 600) -> Result:
        """Wait for the end; the container is kept until `remove`."""
        deadline = time.monotonic() + seconds
        while docker("inspect", "--format", "{{.State.Running}}", self.name) == "true":
            assert time.monotonic() < deadline, f"still running:\n{self.log()[-3000:]}"
            time.sleep(0.2)
        failure = self.base / "output" / "failure"
        return Result(
            exit_code=int(docker("inspect", "--format", "{{.State.ExitCode}}", self.name)),
            log=self.log(),
            failure=failure.read_text().strip() if failure.exists() else "",
            base=self.base,
        )

    def wait_for_line(self, text: str) -> None:
        """Wait until `text` stands in the log of the running container."""
        deadline = time.monotonic() + 600
        while text not in self.log():
            running = docker("inspect", "--format", "{{.State.Running}}", self.name) == "true"
            assert running and time.monotonic() < deadline, self.log()[-3000:]
            time.sleep(0.2)

    def stop(self, seconds: int = 120) -> None:
        """What SageMaker does to stop a job: SIGTERM, then SIGKILL after `seconds`."""
        docker("stop", "--time", str(seconds), self.name)

    def run(self, seconds: float = 600) -> Result:
        """Start, wait, remove."""
        self.start()
        try:
            return self.wait(seconds)
        finally:
            self.remove()

    def remove(self) -> None:
        docker("rm", "--force", "--volumes", self.name, check=False)


class Cluster:
    """One job on two hosts of two processes: a container each, on a network of their own.

    Each host has its own /opt/ml, as on SageMaker; `base` holds one folder per host.
    """

    def __init__(
        self,
        image: str,
        base: Path,
        s3: LocalS3,
        hyperparameters: dict[str, Any],
    ) -> None:
        hosts = ("algo-1", "algo-2")
        self.name = f"b2t-test-{uuid.uuid4().hex[:8]}"
        self.jobs = [
            Job(
                image,
                base / host,
                s3,
                hyperparameters,
                variables={"BRAIN_TO_TEXT_PROCESSES_PER_HOST": "2"},
                name=f"{self.name}-{host}",
                options=["--network", self.name, "--network-alias", host],
                hosts=hosts,
                host=host,
            )
            for host in hosts
        ]

    def start(self) -> None:
        """Make the network and start every host's container."""
        docker("network", "create", self.name)
        for job in self.jobs:
            job.start()

    def stop(self) -> None:
        """SIGTERM to all hosts at once."""
        docker("stop", "--time", "120", *(job.name for job in self.jobs))

    def wait(self) -> list[Result]:
        """Wait for the end of every host."""
        return [job.wait() for job in self.jobs]

    def remove(self) -> None:
        for job in self.jobs:
            job.remove()
        docker("network", "rm", self.name, check=False)
