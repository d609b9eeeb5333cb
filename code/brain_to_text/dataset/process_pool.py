"""Files worked on in processes of their own, so that a damaged one takes nothing else with it.

HDF5 can crash, loop or ask for any amount of memory on damaged bytes. A worker that does is ended
by the system; its file is named, and a new worker takes the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..errors import BrainToTextError, DataError, StorageError

T = TypeVar("T")

# What a sound file needs is far below; both grow with the file's size.
_CPU_SECONDS, _CPU_SECONDS_PER_BYTE = 30.0, 1e-6
_MEMORY, _MEMORY_PER_BYTE = 2 << 30, 8
_SPAWN = multiprocessing.get_context("spawn")  # a fork would share this process's S3 connections


@dataclass(frozen=True)
class Job(Generic[T]):
    """One call of a worker's function.

    Attributes:
        name: of the file, for messages.
        arguments: of the call; they and the result travel pickled.
        n_bytes: size of the file.
    """

    name: str
    arguments: tuple[Any, ...]
    n_bytes: int


def in_processes(
    function: Callable[..., T],
    jobs: Sequence[Job[T]],
    processes: int,
    instead: Callable[[Job[T], str], T] | None = None,
) -> Iterator[T]:
    """`function(*job.arguments)` of every job, in the order in which they end.

    Args:
        function: of a module, so that other processes find it.
        processes: at once; 0 works in this process, without protection.
        instead: the result of a job whose worker was ended for it, from the job and the reason; by
            default that is an error.

    Raises:
        DataError: a file crashed its worker, or needed too much time or memory.
        StorageError: a worker was killed from outside.
    """
    if processes == 0:
        for job in jobs:
            yield function(*job.arguments)
        return
    waiting = list(reversed(jobs))
    workers = [_Worker(function) for _ in range(min(processes, len(jobs)))]
    try:
        while True:
            for worker in workers:
                if worker.job is None and waiting:
                    worker.begin(waiting.pop())
            busy = {worker.pipe: worker for worker in workers if worker.job is not None}
            if not busy:
                return
            for pipe in multiprocessing.connection.wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                given: Job[T] | None = worker.job
                assert given is not None
                try:
                    yield worker.result()
                except _EndedError as ended:
                    workers[workers.index(worker)] = _Worker(function)
                    if ended.outside:
                        raise StorageError(
                            f"The process that worked on {given.name} was killed, probably for "
                            f"lack of memory ({processes} at once): use --processes 1."
                        ) from ended
                    if instead is None:
                        raise DataError(f"{given.name} {ended}: copy the file again.") from ended
                    yield instead(given, str(ended))
    finally:
        for worker in workers:
            worker.end()


class _EndedError(Exception):
    """Why a worker is no more, or is of no use any more."""

    def __init__(self, reason: str, outside: bool = False) -> None:
        super().__init__(reason)
        self.outside = outside


class _Worker:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.pipe, theirs = _SPAWN.Pipe()
        self.job: Job[Any] | None = None
        self._process = _SPAWN.Process(
            target=_work, args=(theirs, function, os.getpid()), daemon=True
        )
        self._process.start()
        theirs.close()

    def begin(self, job: Job[Any]) -> None:
        self.job = job
        self.pipe.send((job.arguments, job.n_bytes))

    def result(self) -> Any:
        """What the job returned; raises what it raised, or `_EndedError`."""
        job, self.job = self.job, None
        assert job is not None
        try:
            value, error = self.pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise _EndedError(*_cause(self._process.exitcode or 0, job.n_bytes)) from None
        if isinstance(error, MemoryError):
            self.end()
            limit = (_MEMORY + _MEMORY_PER_BYTE * job.n_bytes) >> 20
            raise _EndedError(f"asks for more than {limit:,} MiB of memory, far beyond its size")
        if error is not None:
            raise error
        return value

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _cause(exit_code: int, n_bytes: int) -> tuple[str, bool]:
    """(what a file did to its worker, whether somebody else did it)."""
    if exit_code == -signal.SIGPROF:
        return f"takes more than {_cpu_seconds(n_bytes):.0f} s of computing to read", False
    if exit_code in (-signal.SIGKILL, -signal.SIGTERM):
        return "its process was killed", True
    return f"crashes the HDF5 library ({_signal_name(-exit_code)})", False


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"exit code {-number}"


def _cpu_seconds(n_bytes: int) -> float:
    return _CPU_SECONDS + _CPU_SECONDS_PER_BYTE * n_bytes


def _work(
    pipe: multiprocessing.connection.Connection, function: Callable[..., Any], parent: int
) -> None:
    """A worker's life: jobs until the pipe or the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _die_with(parent)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            arguments, n_bytes = pipe.recv()
        except (EOFError, OSError):
            return
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = _MEMORY + _MEMORY_PER_BYTE * n_bytes
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.setitimer(signal.ITIMER_PROF, _cpu_seconds(n_bytes))
        value, error = None, None
        try:
            value = function(*arguments)
        except Exception as raised:  # noqa: BLE001  it goes to the parent, which raises it
            error = raised
            if not isinstance(raised, (BrainToTextError, MemoryError)):
                raised.add_note(traceback.format_exc())
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send((value, error))


def _die_with(parent: int) -> None:
    """End when the parent does, however that was; on other systems after the file in hand."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
