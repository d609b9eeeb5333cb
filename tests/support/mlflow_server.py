"""A real MLflow server on this machine, and the client that images have, both outside of .venv.

The server, of the client's version, needs pandas, scikit-learn and more: 0.9 GB in .local/mlflow.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.processes import stop

REPOSITORY = Path(__file__).resolve().parents[2]
HOME = REPOSITORY / ".local" / "mlflow"
CLIENT = REPOSITORY / ".local" / "mlflow-client"
LOCK = REPOSITORY / "docker" / "requirements_sagemaker_mlflow.txt"
START_SECONDS = 180


def provide_client() -> Path:
    """A folder with the packages that --mlflow adds to an image, for the end of a module path.

    Raises:
        RuntimeError: they cannot be installed here, with pip's last line.
    """
    wanted = LOCK.read_text()
    if not _is_there(CLIENT, wanted):
        shutil.rmtree(CLIENT, ignore_errors=True)
        locked = ["--no-deps", "--require-hashes", "-r", str(LOCK), "--target", str(CLIENT)]
        _install(sys.executable, *locked)
        (CLIENT / "installed").write_text(wanted)
    return CLIENT


def provide_server() -> Path:
    """The `mlflow` command; installed on first use (about two minutes).

    Raises:
        RuntimeError: it cannot be installed here, with pip's last line.
    """
    found = re.search(r"^mlflow-skinny==(\S+)", LOCK.read_text(), re.M)
    assert found is not None
    if not _is_there(HOME, found[1]):
        venv.create(HOME, with_pip=True, symlinks=True, clear=True)
        _install(str(HOME / "bin" / "python"), f"mlflow=={found[1]}")
        (HOME / "installed").write_text(found[1])
    return HOME / "bin" / "mlflow"


def _is_there(folder: Path, wanted: str) -> bool:
    stamp = folder / "installed"
    return stamp.exists() and stamp.read_text() == wanted


def _install(python: str, *what: str) -> None:
    command = [python, "-m", "pip", "install", "--quiet", *what]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise RuntimeError(f"MLflow cannot be installed here: {done.stderr.strip()[-300:]}")


@contextlib.contextmanager
def serve_mlflow(folder: Path, host: str = "127.0.0.1") -> Iterator[str]:
    """The address of a server whose runs and artefacts lie in `folder`.

    Raises:
        RuntimeError: it cannot be installed, or does not start.
    """
    program = provide_server()
    with socket.socket() as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    log = folder / "mlflow.log"
    command = [
        *(str(program), "server", "--host", host, "--port", str(port)),
        *("--backend-store-uri", f"sqlite:///{folder / 'runs.db'}", "--workers", "1"),
        *("--artifacts-destination", str(folder / "artefacts"), "--allowed-hosts", "*"),
    ]
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={
                **os.environ,
                "MLFLOW_DISABLE_TELEMETRY": "true",
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            },
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,  # it has workers, which end with it
        )
    url = f"http://{host}:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"MLflow's server did not start: {log.read_text()[-500:]}")
            time.sleep(0.2)
        yield url
    finally:
        stop(process, 10, group=True)


class MlflowRest:
    """What tests ask a server, without MLflow's own client."""

    def __init__(self, url: str) -> None:
        self.url = url

    def runs(self, experiment: str) -> list[dict[str, Any]]:
        """Every run of an experiment, with params and tags as dicts."""
        found = self._get("mlflow/experiments/get-by-name", experiment_name=experiment)
        number = found["experiment"]["experiment_id"]
        runs = self._post("mlflow/runs/search", experiment_ids=[number]).get("runs", [])
        for run in runs:
            for kind in ("params", "tags"):
                run[kind] = {e["key"]: e["value"] for e in run["data"].get(kind, [])}
        return runs

    def history(self, run: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
        """(step, value) by metric."""
        found = {}
        for metric in run["data"]["metrics"]:
            place = {"run_id": run["info"]["run_id"], "metric_key": metric["key"]}
            points = self._get("mlflow/metrics/get-history", **place)["metrics"]
            found[metric["key"]] = [(int(p["step"]), float(p["value"])) for p in points]
        return found

    def artefacts(self, run: dict[str, Any]) -> set[str]:
        """Paths at the top of the run's artefacts."""
        found = self._get("mlflow/artifacts/list", run_id=run["info"]["run_id"])
        return {entry["path"] for entry in found.get("files", [])}

    def download(self, run: dict[str, Any], path: str) -> bytes:
        root = run["info"]["artifact_uri"].removeprefix("mlflow-artifacts:/")
        url = f"{self.url}/api/2.0/mlflow-artifacts/artifacts/{root.strip('/')}/{path}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            return bytes(answer.read())

    def _get(self, path: str, **query: str) -> Any:
        url = f"{self.url}/api/2.0/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            return json.load(answer)

    def _post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(f"{self.url}/api/2.0/{path}", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
