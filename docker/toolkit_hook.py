"""What the SageMaker training toolkit's `train` runs instead of its own runner.

The toolkit calls `run_trainer` because SAGEMAKER_TRAINING_MODULE names it. It starts the training
program (SAGEMAKER_PROGRAM in the code folder) with the hyperparameters as arguments and adds what
the toolkit's runner leaves out:

- SIGTERM (a stop, or a spot instance being taken back) reaches every trainer process;
- `output/failure` holds the real reason: the sentence the trainer wrote there, else the end of its
  stderr (the toolkit leaves the file empty), even when the output volume is full;
- more than one process in all (hosts x GPUs) starts through torchrun;
- a GPU that was paid for and cannot be used is an error before the first step;
- CUDA's forward-compatibility libraries come into play only on hosts with an older driver
  (`gpu_check`).

Runs inside the image and, for `local_run.sh --no-docker`, in the local environment, where
SAGEMAKER_BASE_DIR moves /opt/ml. Knows nothing of the trainer but its command line and its failure
file.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import gpu_check
from sagemaker_training import environment, errors

log = logging.getLogger("toolkit_hook")

PROCESSES_VARIABLE = "BRAIN_TO_TEXT_PROCESSES_PER_HOST"
"""Trainer processes per host where there are no GPUs to count (gloo on CPU)."""

RENDEZVOUS_PORT = 29500
HOST_WAIT_SECONDS = 15 * 60  # a cluster's names resolve only once every instance is up
STDERR_TAIL_LINES = 400
FAILURE_DETAIL_LINES = 40

_TRACEBACK = re.compile(
    r"^Traceback \(most recent call last\).*\n(?: .*\n)*(?P<exception>\S.*)$", re.MULTILINE
)
RESERVED_BYTES = 16 * 1024  # of the output volume, for the failure text


def run_trainer() -> None:
    """Run the training program to its end; what went wrong is in output/failure.

    Raises:
        sagemaker_training.errors.ClientError: the program failed; `train` logs the text and exits
            with 1.
    """
    failure = FailureFile(Path(environment.output_dir) / "failure")
    try:
        run(failure)
    except errors.ClientError as problem:
        if not failure.read():
            failure.write(str(problem))
        raise
    finally:
        failure.release()


def run(failure: FailureFile) -> None:
    """Start what the job's configuration asks for and wait for its end.

    Raises:
        sagemaker_training.errors.ClientError: it could not start, or failed.
    """
    env = environment.Environment()
    asked = environment.read_hyperparameters()
    for name, used, ours in (
        ("sagemaker_program", env.user_entry_point, env.user_entry_point),
        ("sagemaker_submit_directory", env.module_dir, environment.code_dir),
    ):
        given = str(asked.get(name, used)).removeprefix("file://")
        if given != ours:
            raise errors.ClientError(
                f"The job's {name} is {given}, and this image runs {env.user_entry_point} as "
                "it was built: leave out entry_point and source_dir, or use another image."
            )

    child_env = trainer_environment(env)
    if gpu_check.expects_gpu(env.current_instance_type, env.num_gpus, os.environ):
        problem = gpu_check.find_problem(child_env, env.current_instance_type)
        if problem:
            raise errors.ClientError(problem)
    wait_for_hosts(env.hosts)

    command = trainer_command(
        [str(Path(environment.code_dir) / env.user_entry_point), *env.to_cmd_args()],
        hosts=env.hosts,
        current_host=env.current_host,
        processes_per_host=processes_per_host(env.num_gpus, os.environ),
    )
    log.info("Running %s", " ".join(command))
    trainer = Trainer()
    return_code = trainer.run(command, child_env)
    if return_code and (failure.path.exists() or not trainer.ended_by_the_stop(return_code)):
        raise errors.ClientError(failure.read() or failure_text(trainer.tail, return_code))


# --- the process


class Trainer:
    """The trainer process (or torchrun and its workers), its signals and the end of its stderr.

    Attributes:
        tail: the last lines of stderr, oldest first.
    """

    def __init__(self) -> None:
        self.tail: collections.deque[str] = collections.deque(maxlen=STDERR_TAIL_LINES)
        self._process: subprocess.Popen[bytes] | None = None
        self._stop_requested = False

    def run(self, command: Sequence[str], variables: Mapping[str, str]) -> int:
        """Start, forward SIGTERM and SIGINT, wait; the return code is negative for a signal."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._forward)
        # A process group of its own: a terminal's Ctrl-C reaches the trainer once, as SIGTERM.
        self._process = subprocess.Popen(
            command,
            env=variables,
            cwd=environment.code_dir,
            stderr=subprocess.PIPE,
            process_group=0,
        )
        if self._stop_requested:
            self._signal_trainers()
        copier = threading.Thread(target=self._copy_stderr, daemon=True)
        copier.start()
        return_code = self._process.wait()
        # A helper process that outlives the trainer may hold the pipe open: do not wait for it.
        copier.join(timeout=10)
        return return_code

    def ended_by_the_stop(self, return_code: int) -> bool:
        """A stop while Python still imported, or torchrun said goodbye: nothing lost or failed.

        torchrun turns its own SIGTERM, and that of its workers, into an exception.
        """
        tail = "\n".join(self.tail)
        stopped = self._stop_requested and (
            return_code == -signal.SIGTERM
            or (
                re.search(r"got signal: 15\b|Signal 15 \(SIGTERM\)", tail) is not None
                and re.search(r"Signal (?!15\b)\d+ \(SIG", tail) is None
            )
        )
        if stopped:
            log.warning("Stopped before training began or after it had ended.")
        return stopped

    def _forward(self, number: int, _frame: object) -> None:
        log.info("%s: asking the trainer to stop.", signal.Signals(number).name)
        self._stop_requested = True
        self._signal_trainers()

    def _signal_trainers(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        # torchrun would kill its workers after a moment; they are asked themselves, and it then
        # ends by itself when the last of them has.
        for pid in torchrun_workers(self._process.pid) or [self._process.pid]:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(pid, signal.SIGTERM)

    def _copy_stderr(self) -> None:
        assert self._process is not None and self._process.stderr is not None
        for line in self._process.stderr:
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
            self.tail.append(line.decode("utf-8", "replace").rstrip("\n"))


def torchrun_workers(pid: int) -> list[int]:
    """Children of process `pid` that torchrun started as ranks: those with LOCAL_RANK set."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    workers = []
    for child in children:
        try:
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended between the two reads
        if any(variable.startswith(b"LOCAL_RANK=") for variable in variables):
            workers.append(int(child))
    return workers


# --- the command


def processes_per_host(num_gpus: int, variables: Mapping[str, str]) -> int:
    """One process per GPU; without GPUs one, or as many as PROCESSES_VARIABLE asks for.

    Raises:
        errors.ClientError: PROCESSES_VARIABLE is not a positive whole number.
    """
    asked = variables.get(PROCESSES_VARIABLE, "")
    if not asked:
        return max(1, num_gpus)
    if not asked.isdigit() or int(asked) < 1:
        raise errors.ClientError(
            f"{PROCESSES_VARIABLE} is {asked!r}: set it to a number of processes, or unset it."
        )
    return int(asked)


def trainer_command(
    program: Sequence[str], *, hosts: Sequence[str], current_host: str, processes_per_host: int
) -> list[str]:
    """The program alone, or under torchrun when hosts x processes is more than one."""
    if len(hosts) * processes_per_host <= 1:
        return [sys.executable, *program]
    if len(hosts) == 1:
        where = ["--standalone", "--nnodes=1"]
    else:
        ordered = sorted(hosts)
        where = [
            f"--nnodes={len(ordered)}",
            f"--node-rank={ordered.index(current_host)}",
            f"--master-addr={ordered[0]}",
            f"--master-port={RENDEZVOUS_PORT}",
        ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *where]
    return [*torchrun, f"--nproc-per-node={processes_per_host}", "--max-restarts=0", *program]


def trainer_environment(env: environment.Environment) -> dict[str, str]:
    """This process's environment with the toolkit's SM_* variables and what the hardware needs."""
    variables = {**os.environ, **env.to_env_vars()}
    variables.setdefault("SM_CHECKPOINT_DIR", str(Path(environment.base_dir) / "checkpoints"))
    # Spawned helpers of the trainer import from its own folder, not from the hook's.
    variables["PYTHONPATH"] = os.pathsep.join(
        [environment.code_dir, *filter(None, [variables.get("PYTHONPATH")])]
    )
    interface = env.network_interface_name
    if len(env.hosts) > 1 and interface and Path("/sys/class/net", interface).exists():
        variables.setdefault("NCCL_SOCKET_IFNAME", interface)
        variables.setdefault("GLOO_SOCKET_IFNAME", interface)
    ranks_here = processes_per_host(env.num_gpus, os.environ)
    if ranks_here > 1:
        variables.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks_here)))
    if env.num_gpus == 0:
        # Spinning threads on busy cores made a CPU step 6 times slower than sleeping ones do.
        variables.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    compat = gpu_check.compat_path()
    if compat is not None:
        log.info("The host's driver is older than this image's CUDA: using %s.", compat)
        variables["LD_LIBRARY_PATH"] = os.pathsep.join(
            [str(compat), *filter(None, [variables.get("LD_LIBRARY_PATH")])]
        )
    return variables


def wait_for_hosts(hosts: Sequence[str]) -> None:
    """Return once every host of a multi-host job resolves.

    Raises:
        errors.ClientError: a host does not resolve within a quarter of an hour.
    """
    if len(hosts) == 1:
        return
    deadline = time.monotonic() + HOST_WAIT_SECONDS
    for host in hosts:
        while True:
            try:
                socket.gethostbyname(host)
                break
            except OSError as cause:
                if time.monotonic() > deadline:
                    raise errors.ClientError(
                        f"Host {host} of this job did not come up in {HOST_WAIT_SECONDS} s "
                        f"({cause}): start the job again."
                    ) from cause
                time.sleep(2)


# --- the failure


class FailureFile:
    """output/failure, and room for it: a job often fails because a volume is full.

    Attributes:
        path: the file; one of an earlier run in this folder, outside SageMaker, is removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reserve = path.with_name("failure-reserve")
        try:
            path.unlink(missing_ok=True)
            with self._reserve.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, RESERVED_BYTES)
        except OSError as cause:
            log.warning("No room can be kept for a failure text in %s: %s", path.parent, cause)

    def read(self) -> str:
        """What the trainer wrote; "" when it wrote nothing."""
        with contextlib.suppress(OSError):
            return self.path.read_text(errors="replace").strip()
        return ""

    def write(self, text: str) -> None:
        """Put the text there, in the room that was kept.

        Where it cannot be written it is logged and the process ends: the toolkit would try, fail
        likewise, and then report success.
        """
        self.release()
        try:
            self.path.write_text(text)
        except OSError as cause:
            log.error("%s\n%s cannot be written: %s", text, self.path, cause)
            os._exit(1)

    def release(self) -> None:
        """Give the room back."""
        with contextlib.suppress(OSError):
            self._reserve.unlink(missing_ok=True)


def failure_text(stderr: Iterable[str], return_code: int) -> str:
    """What output/failure shall say where the trainer could not: one sentence, then the cause.

    The sentence is the first that the trainer printed as its error, else the signal that ended it,
    the last exception with its traceback, or the last line.
    """
    # torch.distributed prefixes a worker's traceback with its rank
    lines = [re.sub(r"^\[rank\d+\]: ?", "", line) for line in stderr if line.strip()]
    for line in lines:
        if line.startswith("ERROR: "):
            return line.removeprefix("ERROR: ")
    detail = "\n".join(lines[-FAILURE_DETAIL_LINES:])
    tracebacks = [
        found
        for found in _TRACEBACK.finditer("\n".join(lines))
        if "ChildFailedError" not in found["exception"]  # torchrun's, which says nothing
    ]
    if return_code == -signal.SIGKILL:
        sentence = (
            "The trainer was killed (signal 9), most likely because the machine ran out of memory: "
            "lower dataset.cache_gb, dataset.prefetch_mb or dataset.batch_size."
        )
    elif return_code < 0:
        sentence = f"The trainer was ended by {signal.Signals(-return_code).name}."
    elif tracebacks:
        sentence, detail = tracebacks[-1]["exception"], tracebacks[-1][0]
    else:
        sentence = lines[-1] if lines else f"The trainer ended with exit code {return_code}."
    return f"{sentence}\n\n{detail}".strip()
