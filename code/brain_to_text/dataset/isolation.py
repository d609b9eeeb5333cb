"""Processes in which a damaged file may crash, hang or swell without taking the run along."""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ..errors import BrainToTextError, DataError, StorageError

_SECONDS, _BYTES_PER_SECOND = 5.0, 1e6  # of computing, so that other load does not count
_MEMORY, _MEMORY_PER_BYTE = 2**30, 20
_DAMAGE = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
_PR_SET_PDEATHSIG = 1
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from brain_to_text.dataset.isolation import _serve; _serve(int(sys.argv[2]), int(sys.argv[3]))"
)
Progress = Callable[[int, int], object]  # told how many are done, and how many there are
_in_worker = False
_parked: list[_Worker] = []  # at most one, for the next call: starting it takes half a second


@dataclass(frozen=True)
class Lost:
    """A job whose process ended before it answered.

    exit_code: of the process; negative for the signal that ended it. too_large: it did not end, but
        ran into its limit of memory.
    """

    exit_code: int = 0
    too_large: bool = False

    @property
    def damage(self) -> str:
        """What is wrong with the file that was being read.

        Raises:
            StorageError: the process was ended from outside, which says nothing about the file.
        """
        if self.too_large:
            return "reading it takes more memory than a sound file of its size: copy it again"
        number = -self.exit_code
        if number == signal.SIGXCPU:
            return "reading it does not come to an end: it is damaged, copy it again"
        if number in _DAMAGE:
            name = signal.Signals(number).name
            return f"reading it crashes the process ({name}): the file is damaged, copy it again"
        if number > 0:
            raise StorageError(
                f"A worker process was killed ({signal.Signals(number).name}), probably for "
                "lack of memory: use --processes 1, or a machine with more memory."
            )
        raise StorageError(
            f"A worker process ended by itself (exit code {self.exit_code}): repeat the command."
        )


def in_workers(
    function: Callable[..., Any], jobs: Mapping[str, tuple[Any, ...]], processes: int = 1
) -> Generator[tuple[str, Any], None, None]:
    """(name, result) of each job as it ends, `Lost` where its process did not survive it.

    The processes are new ones, not forks, which would share S3 connections; they end with this
    process, however it ends. What `function` raises is raised here, and the rest is left undone.

    Args:
        function: of a module's top level.
        jobs: arguments of each call, by name.
        processes: how many jobs run at once.
    """
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    try:
        ours = dict(os.environ), Path.cwd(), mask
    except FileNotFoundError as error:
        raise StorageError("The folder you are in was removed: go to another with 'cd'.") from error
    waiting = list(jobs.items())[::-1]
    idle = [_parked.pop()] if _parked else []
    busy: dict[Connection, tuple[_Worker, str]] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < max(processes, 1):
                worker = idle.pop() if idle else _Worker()
                name, arguments = waiting.pop()
                busy[worker.connection] = (worker, name)  # whatever interrupts us now ends it
                with suppress(OSError):  # it has ended: `recv` finds out, too
                    worker.connection.send((ours, function, arguments))
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                worker, name = busy[connection]
                try:
                    fine, answer = connection.recv()
                except (EOFError, OSError):
                    fine, answer = True, Lost(worker.end())
                else:
                    idle.append(worker)
                del busy[connection]
                if not fine:
                    answer.add_note(f"of {name}")
                    raise answer
                yield name, answer
    finally:
        if idle and not _parked and threading.current_thread() is threading.main_thread():
            _parked.append(idle.pop())  # it ends with the thread that started it
        for worker in (*idle, *(worker for worker, _ in busy.values())):
            worker.end()


def sound_answers(
    function: Callable[..., Any],
    jobs: Mapping[str, tuple[Any, ...]],
    processes: int,
    progress: Progress = lambda done, total: None,
) -> Generator[Any, None, None]:
    """The results of `in_workers` where every job must survive.

    Args:
        jobs: by the file that a job is about, as messages name it.

    Raises:
        DataError: one did not; names the file.
    """
    with closing(in_workers(function, jobs, processes)) as answers:
        for done, (file, answer) in enumerate(answers, 1):
            if isinstance(answer, Lost):
                raise DataError(f"{file}: {answer.damage}.")
            yield answer
            progress(done, len(jobs))


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Only as much computing and memory as sound files of `size` bytes can need, in a worker.

    Too much computing ends the process (SIGXCPU); too much memory is a MemoryError.
    """
    if not _in_worker:
        yield
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = usage.ru_utime + usage.ru_stime + _SECONDS + size / _BYTES_PER_SECOND
    limits = {resource.RLIMIT_CPU: math.ceil(seconds)}
    statm = Path("/proc/self/statm")
    if statm.exists():
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        limits[resource.RLIMIT_AS] = now + _MEMORY + _MEMORY_PER_BYTE * size
    before = {kind: resource.getrlimit(kind) for kind in limits}
    for kind, most in limits.items():
        allowed = [value for value in before[kind] if value != resource.RLIM_INFINITY]
        resource.setrlimit(kind, (min([most, *allowed]), before[kind][1]))
    try:
        yield
    finally:
        for kind, values in before.items():
            resource.setrlimit(kind, values)


class _Worker:
    """A process that waits for jobs, and this end of the line to it."""

    def __init__(self) -> None:
        mine, theirs = socket.socketpair()
        with theirs:
            numbers = [str(theirs.fileno()), str(os.getpid())]
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(sys.path), *numbers],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self.connection = Connection(mine.detach())

    def end(self) -> int:
        """Let go of it, and kill it if it is busy; returns its exit code."""
        self.connection.close()
        self._process.kill()
        return self._process.wait()


def _serve(descriptor: int, parent: int) -> None:
    """Do jobs until the other end of the line closes."""
    global _in_worker
    _in_worker = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the parent's to answer
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    connection = Connection(descriptor)
    while True:
        try:
            (environment, folder, mask), function, arguments = connection.recv()
        except (EOFError, OSError):
            return
        if environment != dict(os.environ):
            os.environ.clear()
            os.environ.update(environment)
        os.umask(mask)
        try:
            os.chdir(folder)
            answer: tuple[bool, Any] = (True, function(*arguments))
        except BrainToTextError as error:
            answer = (False, error)
        except MemoryError:
            answer = (True, Lost(too_large=True))
        except Exception as error:  # noqa: BLE001 - it is raised in the parent
            answer = (False, RuntimeError(f"{type(error).__name__}: {error}"))
            answer[1].__cause__ = error
        connection.send(answer)
