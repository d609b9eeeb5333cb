"""Several processes that train one model: who they are, and what they must agree on.

torchrun starts one process per GPU and says through its variables who is who; a process started
alone is a world of one, for which everything here is free. Gradients travel by the device's engine
(NCCL on GPUs, gloo on CPUs), decisions by gloo, so that asking for them never waits for a GPU.

A rank that fails pins its reason to a board (torchrun's key-value store, on the first host) before
it hangs up; the others, who only see a closed connection, read it there and fail with that reason.
The board also holds how many meeting points each rank has come to: whoever waits for more than a
minute says for whom.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..errors import BrainToTextError, TrainingError
from .container import RunInterrupted

LOGGER = logging.getLogger("brain_to_text")
T = TypeVar("T")

# One rank works while the others wait: indexing a dataset without a manifest, the final report.
PATIENCE = timedelta(hours=2)
JOIN_TIMEOUT = timedelta(minutes=30)  # and what NCCL, which ends without a word, waits longer
BOARD_TIMEOUT = timedelta(seconds=30)
REASON_KEY = "brain_to_text/reason"
REASON_SECONDS = 3.0  # for the failing rank's reason to arrive after its connection has closed
STOPPED = "stopped"  # on the board: no failure, a stop signal
SILENCE_SECONDS = 60.0  # before a rank says whom it waits for; then after twice as long, …
ROLL_SECONDS = 5.0


class RollCall:
    """Which ranks have not come to the point where this one waits.

    Each rank comes to the same points in the same order, and keeps on the board how many it has
    come to.

    Args:
        names: of all ranks, for the log.
    """

    def __init__(self, board: dist.Store, rank: int, names: Sequence[str]) -> None:
        self._board, self._rank, self._names = board, rank, names
        self._came_to = 0
        self._since: float | None = None
        self._next = SILENCE_SECONDS
        self._end = threading.Event()
        threading.Thread(target=self._work, name="roll-call", daemon=True).start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around one meeting point."""
        self._came_to += 1
        self._next, self._since = SILENCE_SECONDS, time.monotonic()
        yield
        self._since = None  # not after an error, whose text asks for `missing` and `seconds`

    @property
    def seconds(self) -> float:
        """How long this rank has waited."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    def missing(self) -> str:
        """The ranks that are not where this one waits; empty where all came, or nobody knows."""
        try:
            keys = [self._key(rank) for rank in range(len(self._names))]
            late = [
                name
                for key, name in zip(keys, self._names, strict=True)
                if not self._board.check([key]) or int(self._board.get(key)) < self._came_to
            ]
        except RuntimeError:  # the first host is gone, and the board with it
            return ""
        return ", ".join(name for name in late if name != self._names[self._rank])

    def close(self) -> None:
        self._end.set()

    def _key(self, rank: int) -> str:
        return f"brain_to_text/came_to/{rank}"

    def _work(self) -> None:
        while not self._end.wait(ROLL_SECONDS):
            try:
                self._board.set(self._key(self._rank), str(self._came_to))
            except RuntimeError:
                return
            if self.seconds > self._next:
                self._next *= 2
                who = self.missing() or "an answer over the network"
                LOGGER.warning("Waiting for %s since %.0f s", who, self.seconds)


@dataclass(frozen=True)
class World:
    """This process among the `size` processes of a run.

    Attributes:
        rank: 0 writes logs, checkpoints and results.
        size: processes over all hosts.
        local_rank: position on this host; also its GPU.
        local_size: processes on this host; their ranks follow each other.
        hosts: (name, address) of each rank's host, by rank.
        decisions, setup: gloo groups of everybody; the second waits as long as PATIENCE.
        gradients: the group that sums them; None for the default one.
        board: where a failing rank leaves its reason.
        roll_call: knows for whom this rank waits.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    hosts: Sequence[tuple[str, str]] = ()
    decisions: dist.ProcessGroup | None = None
    setup: dist.ProcessGroup | None = None
    gradients: dist.ProcessGroup | None = None
    board: dist.Store | None = None
    roll_call: RollCall | None = None

    @classmethod
    def join(cls, timeout_seconds: float = 300.0) -> World:
        """The world that torchrun's variables describe; one process without them.

        Args:
            timeout_seconds: how long ranks wait for one that stands still.

        Raises:
            TrainingError: the other processes cannot be reached.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        local_rank = int(os.environ["LOCAL_RANK"])
        limit = timedelta(seconds=timeout_seconds)
        try:
            if torch.cuda.is_available():
                torch.cuda.set_device(local_rank)
                gpu = torch.device("cuda", local_rank)
                dist.init_process_group("nccl", timeout=limit + JOIN_TIMEOUT, device_id=gpu)
            else:
                dist.init_process_group("gloo", timeout=JOIN_TIMEOUT)
            decisions = dist.new_group(backend="gloo", timeout=limit)
            setup = dist.new_group(backend="gloo", timeout=PATIENCE)
            board = dist.TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=BOARD_TIMEOUT
            )
            hosts: list[Any] = [None] * size
            dist.all_gather_object(hosts, _this_host(), group=decisions)
        except (RuntimeError, ValueError) as error:
            raise TrainingError(
                f"Rank {os.environ.get('RANK')} of {size} could not join the other processes: "
                "check that the hosts reach each other (security group, network interface)."
            ) from error
        rank = dist.get_rank()
        names = [f"rank {number} on {host}" for number, (host, _) in enumerate(hosts)]
        return cls(
            rank=rank,
            size=size,
            local_rank=local_rank,
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            hosts=hosts,
            decisions=decisions,
            setup=setup,
            gradients=None if torch.cuda.is_available() else decisions,
            board=board,
            roll_call=RollCall(board, rank, names),
        )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def device(self) -> torch.device:
        """The GPU of this process, or the CPU."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank)

    def from_main(self, make: Callable[[], T]) -> T:
        """`make()` on rank 0, its result on every rank; an error on rank 0 is raised on all."""
        if self.size == 1:
            return make()
        message: list[Any] = [None, None]
        if self.is_main:
            try:
                message[0] = make()
            except Exception as error:  # noqa: BLE001 - raised on every rank, below
                message[1] = error
        with self.in_contact():
            dist.broadcast_object_list(message, src=0, group=self.setup)
        if message[1] is not None:
            raise message[1]
        return message[0]

    def any(self, flag: bool) -> bool:
        """True on every rank when it is on one; all ranks must ask at the same point."""
        if self.size == 1:
            return flag
        asked = torch.tensor([int(flag)])
        with self.in_contact():
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.decisions)
        return bool(asked.item())

    def all_on_device(self, flag: torch.Tensor) -> torch.Tensor:
        """Whether a bool scalar is true on every rank; stays on the device, and nothing waits."""
        if self.size == 1:
            return flag
        agreed = flag.int()
        with self.in_contact():
            dist.all_reduce(agreed, dist.ReduceOp.MIN, group=self.gradients)
        return agreed.bool()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order of rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.in_contact():
            dist.all_gather_object(values, value, group=self.decisions)
        return values

    def meet(self) -> None:
        """Return when every rank has come here: nobody leaves while another still writes."""
        if self.size > 1:
            with suppress(RunInterrupted), self.in_contact():
                dist.barrier(group=self.setup)

    def announce_stop(self) -> None:
        """Tell the others, who will lose contact, that a stop signal is why we leave."""
        self._pin(STOPPED)

    def leave(self, error: BaseException | None = None) -> None:
        """Let go of the other processes; with an `error`, after pinning it to the board."""
        if self.size == 1 or not dist.is_initialized():
            return
        if self.roll_call is not None:
            self.roll_call.close()
        if error is not None:
            self._pin(f"Rank {self.rank} on {self.hosts[self.rank][0]} failed: {_reason(error)}")
            if dist.get_backend() == "nccl":
                return  # taking the group apart would wait for collectives that never end
        dist.destroy_process_group()

    @contextmanager
    def in_contact(self) -> Iterator[None]:
        """Around whatever needs the other ranks.

        Raises:
            TrainingError: one of them is gone; says which and why, as far as that is known.
            RunInterrupted: one of them is gone because it was told to stop.
        """
        try:
            with nullcontext() if self.roll_call is None else self.roll_call.waiting():
                yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # all that torch says when a connection closes
            reason = self._pinned_reason()
            if reason == STOPPED:
                raise RunInterrupted("another process") from error
            raise TrainingError(reason or self._lost(str(error))) from error

    def _pin(self, reason: str) -> None:
        """The first reason stays: later ranks fail because of it."""
        if self.board is not None:
            try:
                self.board.compare_set(REASON_KEY, "", reason)
            except RuntimeError:
                return  # the first host is gone, and the board with it

    def _pinned_reason(self) -> str | None:
        deadline = time.monotonic() + REASON_SECONDS
        try:
            while self.board is not None and time.monotonic() < deadline:
                if self.board.check([REASON_KEY]):
                    return self.board.get(REASON_KEY).decode()
                time.sleep(0.05)
        except RuntimeError:
            return None
        return None

    def _lost(self, message: str) -> str:
        """One sentence for a rank that went without a reason; `message` is torch's."""
        if "timed out" in message.lower() and self.roll_call is not None:
            who = self.roll_call.missing() or "Another process of this job"
            return (
                f"{who[0].upper()}{who[1:]} did not answer for {self.roll_call.seconds:.0f} s: a "
                "GPU that hangs, a process that was stopped, or a host that swaps; look at that "
                "host's log, and start the job again with the same checkpoint location to resume "
                "(rank_timeout_seconds is how long the others wait)."
            )
        address = re.search(r"\[([0-9a-f.:]+)\]:\d+", message)
        here = self.hosts[self.rank] if self.hosts else None
        gone = {host for host in self.hosts if address and host[1] == address[1] and host != here}
        where = f"host {min(gone)[0]}" if gone else "another process of this job"
        return (
            f"Lost contact with {where}, which gave no reason: it was killed, ran out of memory, "
            "or its instance is gone; look at that host's log, and start the job again with the "
            "same checkpoint location to resume."
        )


def _this_host() -> tuple[str, str]:
    name = socket.gethostname()
    try:
        return name, socket.gethostbyname(name)
    except OSError:
        return name, ""


def _reason(error: BaseException) -> str:
    if isinstance(error, BrainToTextError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def sum_gradients(model: nn.Module, world: World, days: Collection[int]) -> None:
    """Replace every gradient by its sum over ranks, an absent one counting as zero.

    The day layer of a session that occurs nowhere keeps its gradient absent, so that it is left
    alone on every rank alike.

    Args:
        model: after `backward`; its day layers are `day_weights` and `day_biases`.
        world: at least two processes.
        days: sessions of the whole batch, the same on every rank.
    """
    gradients = []
    for name, parameter in model.named_parameters():
        absent = name.startswith("day_") and int(name.split(".")[1]) not in days
        if parameter.requires_grad and not absent:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    with world.in_contact():
        dist.all_reduce(flat, group=world.gradients)
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])
