"""The job behind ./local_run.sh: data into a local S3 server, our image through the SDK's Estimator
in local mode, the model out of the same server.

Everything it makes lies under .local/: `s3/` is what the server serves (data and outputs),
`runs/JOB/` holds one run's logs and its unpacked model.
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY / "code"), str(REPOSITORY / "tests")]

from brain_to_text.command_line import require, run

require()

import argparse
import contextlib
import datetime
import io
import os
import re
import secrets
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TextIO


def parse_arguments(arguments: "list[str] | None") -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="local_run.sh", description="The main job, locally.")
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--cpu", action="store_true", help="train on the CPU")
    device.add_argument("--gpu", action="store_true", help="train on an NVIDIA GPU")
    parser.add_argument("--no-docker", action="store_true", help="without a container")
    parser.add_argument("--steps", type=_positive, help="training steps")
    parser.add_argument("--base-image", default=os.environ.get("BASE_IMAGE") or None)
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of steps")
    return int(text)


def enter_environment() -> int:
    """Understand the options, then go on in .venv, made first if need be; 0 where this is it."""
    parse_arguments(None)
    import set_up

    if Path(sys.prefix).resolve() == set_up.ENVIRONMENT.resolve():
        return 0
    python = str(set_up.ENVIRONMENT / "bin" / "python")
    return set_up.main() or os.execv(python, [python, *sys.argv])


if __name__ == "__main__":
    failed = run(enter_environment)
    if failed:
        sys.exit(failed)

from brain_to_text.launch.fetch import result_table
from brain_to_text.log_lines import best_validation, rows_of_log
from set_up import exclusive
from support import local_mode
from support.container_job import write_configuration
from support.engine import ImageError, build_image, container_host
from support.local_mode import OUTPUT_PREFIX
from support.local_s3 import LocalS3, serve_s3
from support.processes import stop

LOCAL = REPOSITORY / ".local"
BUCKET = "brain-to-text-local"
DATA_PREFIX = "data/hdf5_data_diphone_encoded"
CONFIG = "rnn_args_smoke.yaml"
LEARNED = 0.10  # DER and PER of a decoder that learned the smoke data
STOP_SECONDS = 120  # what SageMaker gives a job between SIGTERM and SIGKILL
PROMISED = {
    "checkpoint/best_checkpoint",
    "checkpoint/args.yaml",
    "checkpoint/val_metrics.pkl",
    "training_log",
}


class LocalRunError(RuntimeError):
    """The run cannot go on; one sentence saying why and what to type."""


@dataclass
class Run:
    """One local job: its name, its folder, the server it reads from and writes to."""

    job: str
    folder: Path
    s3: LocalS3
    steps: int | None
    hyperparameters: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.hyperparameters = {
            "s3-bucket": BUCKET,
            "s3-data-prefix": DATA_PREFIX,
            "config-file": CONFIG,
            "output-s3-uri": f"s3://{BUCKET}/{OUTPUT_PREFIX}/{self.job}",
        }
        if self.steps is not None:
            self.hyperparameters["num-training-batches"] = str(self.steps)

    @property
    def outputs(self) -> Path:
        """Where the S3 server keeps the job's archives."""
        return LOCAL / "s3" / BUCKET / OUTPUT_PREFIX / self.job / "output"


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        return run_everything(options)
    except (RuntimeError, ImageError) as problem:
        print(f"local_run: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        print("\nlocal_run: stopped; everything it started is gone.", file=sys.stderr)
        return 130


_stop_requested: list[int] = []  # signals that came in


def _stop(number: int, _frame: object) -> None:
    _stop_requested.append(number)
    raise KeyboardInterrupt


def run_everything(options: argparse.Namespace) -> int:
    """Data, image, job, model, table; the exit code."""
    gpu = wants_gpu(options)
    now = f"{datetime.datetime.now():%Y%m%d-%H%M%S}"
    job = f"brain-to-text-smoke-{now}-{secrets.token_hex(2)}"
    folder = LOCAL / "runs" / job
    folder.mkdir(parents=True)
    image = None if options.no_docker else provide_image(folder, gpu, options.base_image)
    host = "127.0.0.1" if image is None else container_host()
    with serve_s3(LOCAL / "s3", host, cached=True, log_file=folder / "s3-server.log") as s3:
        os.environ.update(s3.environment())
        s3.make_bucket(BUCKET)
        with exclusive("data"):
            provide_data()
        run = Run(job, folder, s3, options.steps)
        if image is None:
            train_without_docker(run, gpu)
        else:
            train_in_local_mode(run, image, gpu)
        return show_results(run)


def wants_gpu(options: argparse.Namespace) -> bool:
    """The GPU unless --cpu; --gpu without one is an error."""
    if options.cpu:
        return False
    found = _succeeds("nvidia-smi", "--list-gpus")
    if options.gpu and not found:
        raise LocalRunError("--gpu: nvidia-smi finds no GPU on this machine; use --cpu.")
    return found


# --- data


def provide_data() -> None:
    """Synthesise the smoke data straight into the S3 server; kept for the next run."""
    from brain_to_text.dataset.manifest import load_manifest
    from brain_to_text.storage.store import open_store

    url = f"s3://{BUCKET}/{DATA_PREFIX}"
    if (LOCAL / "s3" / BUCKET / DATA_PREFIX).exists() and load_manifest(open_store(url)):
        say(f"Using the smoke data of an earlier run ({url}).")
        return
    say(f"Making the smoke data ({url}).")
    done = subprocess.run(
        [
            sys.executable,
            str(REPOSITORY / "code" / "prepare_dataset.py"),
            "synthesize",
            url,
        ],
        check=False,
    )
    if done.returncode:
        raise LocalRunError("the smoke data could not be made: the line above says why.")


# --- with Docker


def provide_image(folder: Path, gpu: bool, base_image: str | None) -> str | None:
    """Build the image and return its name, None without an engine; the output goes to a file.

    Raises:
        ImageError: there is an engine, and the image cannot be built.
    """
    log = folder / "build.log"
    say(f"Building the image (the first time takes minutes; log: {_short(log)}).")
    options = [] if gpu else ["--cpu"]
    with log.open("w") as file:
        tee = _Tee(file, show=_is_build_step, width=100)
        try:
            return build_image(
                f"local-{'cuda' if gpu else 'cpu'}", *options, base_image=base_image, show=tee.write
            )
        except ImageError as problem:
            if not problem.no_engine:
                raise
            say(f"No container on this machine: {problem} Running the toolkit's train without one.")
            return None


def train_in_local_mode(run: Run, image: str, gpu: bool) -> None:
    """One training job through the SDK's Estimator, exactly as on SageMaker but on this machine."""
    say(f"Training: job {run.job} in SageMaker local mode.")
    log = run.folder / "container.log"
    scratch = run.folder / "local-mode"
    scratch.mkdir()
    variables = {} if gpu else {"BRAIN_TO_TEXT_EXPECT_GPU": "0"}
    try:
        with log.open("w") as file, _shown(file):
            local_mode.fit(
                *(run.job, image, BUCKET, run.hyperparameters, run.s3, scratch),
                gpu=gpu,
                variables=variables,
            )
    except RuntimeError as error:
        if not _stop_requested:
            raise LocalRunError(failure_reason(run, error)) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if _stop_requested:
        raise KeyboardInterrupt  # the SDK's own cleaning up may have swallowed it


def _shown(file: TextIO) -> AbstractContextManager[Any]:
    """What is printed goes to the file; of it, the trainer's lines to the terminal."""
    return contextlib.redirect_stdout(_Tee(file, show=_is_trainer_line, strip=COMPOSE_PREFIX))


def failure_reason(run: Run, error: Exception) -> str:
    """The sentence in output/failure, which local mode packs into output.tar.gz."""
    for failure in unpacked(run, "output").rglob("failure"):
        return f"the job failed: {failure.read_text('utf-8', 'replace').strip()}"
    return f"{error} (log: {_short(run.folder / 'container.log')})"


# --- without Docker


def train_without_docker(run: Run, gpu: bool) -> None:
    """The toolkit's `train` on a folder shaped like /opt/ml; model.tar.gz goes to the S3 server."""
    base = run.folder / "opt" / "ml"
    write_configuration(base, run.hyperparameters, ["localhost"], "localhost")
    (base / "code").symlink_to(REPOSITORY / "code", target_is_directory=True)
    variables = {
        **os.environ,
        "SAGEMAKER_BASE_DIR": str(base),
        "SAGEMAKER_PROGRAM": "train_model_sagemaker.py",
        "SAGEMAKER_TRAINING_MODULE": "toolkit_hook:run_trainer",
        "PYTHONPATH": str(REPOSITORY / "docker"),
        "PYTHONUNBUFFERED": "1",
        "TRAINING_JOB_NAME": run.job,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    if not gpu:
        variables |= {"BRAIN_TO_TEXT_EXPECT_GPU": "0", "CUDA_VISIBLE_DEVICES": ""}
    say(f"Training: job {run.job} by the toolkit's train in {_short(base)}.")
    train = Path(sys.executable).with_name("train")
    with (run.folder / "container.log").open("w") as log:
        tee = _Tee(log, show=_is_trainer_line)
        process = subprocess.Popen(
            [str(train)],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,  # Ctrl-C must reach it once, as the SIGTERM of a SageMaker stop
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                tee.write(line)
            process.wait()
        finally:
            if process.poll() is None:
                stop(process, STOP_SECONDS, group=True)
    if process.returncode:
        failure = base / "output" / "failure"
        reason = failure.read_text().strip() if failure.exists() else "no reason was written"
        raise LocalRunError(f"the job failed: {reason}")
    for name in ("model", "output"):  # as SageMaker packs them
        shutil.make_archive(str(run.outputs / name), "gztar", base / name)


# --- results


def unpacked(run: Run, name: str) -> Path:
    """`model` or `output` of the job, from the archive in the S3 server's folder; empty without."""
    archive, folder = run.outputs / f"{name}.tar.gz", run.folder / name
    folder.mkdir(exist_ok=True)
    if archive.exists():
        shutil.unpack_archive(archive, folder)  # tarfile's `filter` is younger than Python 3.11
    return folder


def show_results(run: Run) -> int:
    """Unpack the job's archives, print its validations and where everything is; the exit code."""
    model = unpacked(run, "model")
    missing = sorted(name for name in PROMISED if not (model / name).is_file())
    if missing:
        raise LocalRunError(f"model.tar.gz lacks {', '.join(missing)}: see {_short(run.folder)}.")
    rows = rows_of_log((model / "training_log").read_text())
    data = f".local/s3/{BUCKET}/{DATA_PREFIX}"
    print("", *result_table(rows), "", sep="\n")
    for report in unpacked(run, "output").rglob("report.html"):
        print(f"report       {report}")
    print(f"model        {_short(model)}")
    print(f"in S3        s3://{BUCKET}/{OUTPUT_PREFIX}/{run.job}/  (.local/s3/{BUCKET}/...)")
    print(f"logs         {_short(run.folder)}")
    print(f"evaluate     .venv/bin/python code/evaluate_model.py --model {_short(model)} \\")
    print(f"                 --data-dir {data} --output-dir {_short(run.folder)}/evaluation")

    best = best_validation(rows.get("validation", []))
    if run.steps is None and (best is None or max(best["der"], best["per"]) >= LEARNED):
        say(f"The decoder did not learn: DER and PER should fall below {LEARNED:.2f}.")
        return 1
    return 0


# --- what is shown

COMPOSE_PREFIX = re.compile(r"^(\x1b\[[\d;]*m)*[\w.-]+ *\|( |\x1b\[[\d;]*m)*")


class _Tee(io.TextIOBase):
    """Writes every line to a file and the lines worth a look to the terminal."""

    def __init__(
        self,
        file: TextIO,
        show: Callable[[str], bool],
        strip: re.Pattern[str] | None = None,
        width: int | None = None,
    ) -> None:
        self._file = file
        self._show = show
        self._strip = strip
        self._width = width
        self._terminal = sys.stdout
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            clean = self._strip.sub("", line.rstrip("\r")) if self._strip else line
            self._file.write(clean + "\n")
            if self._show(clean):
                self._terminal.write(clean[: self._width] + "\n")
        self._file.flush()
        self._terminal.flush()
        return len(text)


def _is_build_step(line: str) -> bool:
    return re.match(r"#\d+ \[(?!internal)", line) is not None


def _is_trainer_line(line: str) -> bool:
    """Not the toolkit's own chatter, not Compose's."""
    chatter = (
        r"sagemaker-training-toolkit|^Returning the value itself|toolkit_hook INFO"
        r"|^Attaching to|^(\x1b\[\d*m)?(Creating|Recreating|Starting|Aborting)\b|\bexited with"
    )
    return bool(line.strip()) and not re.search(chatter, line)


def say(sentence: str) -> None:
    print(f"==> {sentence}", flush=True)


def _short(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def _succeeds(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(run(main))
