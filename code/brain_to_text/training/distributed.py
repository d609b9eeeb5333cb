"""Several processes that train one model: who they are, and what they must agree on.

torchrun starts one process per GPU and says through its variables who is who; a process started
alone is a world of one, for which everything here is free. Gradients travel by the device's engine
(NCCL on GPUs, gloo on CPUs), decisions by gloo, so that asking for them never waits for a GPU.
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

from ..errors import TrainingError
from .container import RunInterrupted, failure_text

LOGGER = logging.getLogger("brain_to_text")
T = TypeVar("T")

# One rank works while the others wait: indexing a dataset without a manifest, the final report.
PATIENCE = timedelta(hours=2)
JOIN_TIMEOUT = timedelta(minutes=30)  # and what NCCL, which ends without a word, waits longer
BOARD_TIMEOUT = timedelta(seconds=30)
REASON_SECONDS = 3.0  # for the failing rank's reason to arrive after its connection has closed
STOPPED = "stopped"  # on the board: no failure, a stop signal
SILENCE_SECONDS = 60.0  # before a rank says whom it waits for; then after twice as long, …
PROGRESS_SECONDS = 5.0  # between a rank's notes of how far it has come


class Board:
    """What ranks leave for each other in torchrun's key-value store, on the first host.

    A rank that fails pins its reason before it hangs up; the others, who only see a closed
    connection, read it there and fail with that reason. Each rank also notes how many meeting
    points it has come to, which are the same in the same order for all: whoever waits for more than
    a minute says for whom. When the first host is gone, so is the board, and it says nothing.

    Args:
        hosts: (name, address) of each rank's host, by rank.
    """

    def __init__(self, store: dist.Store, rank: int, hosts: Sequence[tuple[str, str]]) -> None:
        self._store, self._rank, self._hosts = store, rank, hosts
        self._came_to = 0
        self._waits_since: float | None = None
        self._warn_after = SILENCE_SECONDS
        self._closed = threading.Event()
        threading.Thread(target=self._note_progress, name="board", daemon=True).start()

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Around one meeting point.

        Raises:
            TrainingError: a rank is gone; says which and why, as far as that is known.
            RunInterrupted: a rank is gone because it was told to stop.
        """
        self._came_to += 1
        self._warn_after, self._waits_since = SILENCE_SECONDS, time.monotonic()
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # all that torch says when a connection closes
            reason = self._reason()
            if reason == STOPPED:
                raise RunInterrupted("another process") from error
            raise TrainingError(reason or self._lost(str(error))) from error
        self._waits_since = None

    def pin(self, reason: str) -> None:
        """Say why this rank leaves. The first reason stays: later ranks fail because of it."""
        with suppress(RuntimeError):
            self._store.compare_set("brain_to_text/reason", "", reason)

    def pin_failure(self, error: BaseException) -> None:
        self.pin(f"{self._name(self._rank)} failed: {failure_text(error)}")

    def close(self) -> None:
        self._closed.set()

    def _name(self, rank: int) -> str:
        return f"Rank {rank} on {self._hosts[rank][0]}"

    def _note_progress(self) -> None:
        with suppress(RuntimeError):
            while not self._closed.wait(PROGRESS_SECONDS):
                self._store.set(f"brain_to_text/came_to/{self._rank}", str(self._came_to))
                if self._waited() > self._warn_after:
                    self._warn_after *= 2
                    who = self._missing() or "an answer over the network"
                    LOGGER.warning("Still waiting for %s after %.0f s", who, self._waited())

    def _waited(self) -> float:
        since = self._waits_since
        return 0.0 if since is None else time.monotonic() - since

    def _missing(self) -> str:
        """The ranks that have not come to where this one waits; empty where nobody knows."""
        late = []
        with suppress(RuntimeError):
            for rank in range(len(self._hosts)):
                key = f"brain_to_text/came_to/{rank}"
                came_to = int(self._store.get(key)) if self._store.check([key]) else 0
                if rank != self._rank and came_to < self._came_to:
                    late.append(self._name(rank))
        return ", ".join(late)

    def _reason(self) -> str:
        deadline = time.monotonic() + REASON_SECONDS
        with suppress(RuntimeError):
            while time.monotonic() < deadline:
                if self._store.check(["brain_to_text/reason"]):
                    return self._store.get("brain_to_text/reason").decode()
                time.sleep(0.05)
        return ""

    def _lost(self, message: str) -> str:
        """One sentence for a rank that went without a reason; `message` is torch's."""
        if "timed out" in message.lower():
            return (
                f"{self._missing() or 'Another process of this job'} did not answer for "
                f"{self._waited():.0f} s: a GPU that hangs, a process that was stopped, or a host "
                "that swaps; look at that host's log, and start the job again with the same "
                "checkpoint location to resume (rank_timeout_seconds is how long the others wait)."
            )
        address = re.search(r"\[([0-9a-f.:]+)\]:\d+", message)
        here = self._hosts[self._rank]
        gone = {host for host in self._hosts if address and host[1] == address[1] and host != here}
        where = f"host {min(gone)[0]}" if gone else "another process of this job"
        return (
            f"Lost contact with {where}, which gave no reason: it was killed, ran out of memory, "
            "or its instance is gone; look at that host's log, and start the job again with the "
            "same checkpoint location to resume."
        )


@dataclass(frozen=True)
class World:
    """This process among the `size` processes of a run.

    Attributes:
        rank: 0 writes logs, checkpoints and results.
        size: processes over all hosts.
        local_rank: position on this host; also its GPU.
        local_size: processes on this host; their ranks follow each other.
        decisions, setup: gloo groups of everybody; the second waits as long as PATIENCE.
        gradients: the group that sums them; None for the default one.
        board: of all processes; None for a process alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    decisions: dist.ProcessGroup | None = None
    setup: dist.ProcessGroup | None = None
    gradients: dist.ProcessGroup | None = None
    board: Board | None = None

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
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=BOARD_TIMEOUT
            )
            hosts: list[Any] = [None] * size
            dist.all_gather_object(hosts, _this_host(), group=decisions)
        except (RuntimeError, ValueError) as error:
            raise TrainingError(
                f"Rank {os.environ.get('RANK')} of {size} could not join the other processes: "
                "check that the hosts reach each other (security group, network interface)."
            ) from error
        return cls(
            rank=dist.get_rank(),
            size=size,
            local_rank=local_rank,
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            decisions=decisions,
            setup=setup,
            gradients=None if torch.cuda.is_available() else decisions,
            board=Board(store, dist.get_rank(), hosts),
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
        if self.board is None:
            return make()
        message: list[Any] = [None, None]
        if self.is_main:
            try:
                message[0] = make()
            except Exception as error:  # noqa: BLE001 - raised on every rank, below
                message[1] = error
        with self.board.meeting():
            dist.broadcast_object_list(message, src=0, group=self.setup)
        if message[1] is not None:
            raise message[1]
        return message[0]

    def any(self, flag: bool) -> bool:
        """True on every rank when it is on one; all ranks must ask at the same point."""
        if self.board is None:
            return flag
        asked = torch.tensor([int(flag)])
        with self.board.meeting():
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.decisions)
        return bool(asked.item())

    def all_on_device(self, flag: torch.Tensor) -> torch.Tensor:
        """Whether a bool scalar is true on every rank; stays on the device, and nothing waits."""
        if self.board is None:
            return flag
        agreed = flag.int()
        with self.board.meeting():
            dist.all_reduce(agreed, dist.ReduceOp.MIN, group=self.gradients)
        return agreed.bool()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order of rank, on every rank."""
        if self.board is None:
            return [value]
        values: list[Any] = [None] * self.size
        with self.board.meeting():
            dist.all_gather_object(values, value, group=self.decisions)
        return values

    def meet(self) -> None:
        """Return when every rank has come here: nobody leaves while another still writes."""
        if self.board is not None:
            with suppress(RunInterrupted), self.board.meeting():
                dist.barrier(group=self.setup)

    def announce_stop(self) -> None:
        """Tell the others, who will lose contact, that a stop signal is why we leave."""
        if self.board is not None:
            self.board.pin(STOPPED)

    def leave(self, error: BaseException | None = None) -> None:
        """Let go of the other processes; with an `error`, after telling them of it."""
        if self.board is None:
            return
        self.board.close()
        if error is not None:
            self.board.pin_failure(error)
            if dist.get_backend() == "nccl":
                return  # taking the group apart would wait for collectives that never end
        dist.destroy_process_group()


def _this_host() -> tuple[str, str]:
    name = socket.gethostname()
    try:
        return name, socket.gethostbyname(name)
    except OSError:
        return name, ""


def sum_gradients(model: nn.Module, world: World, days: Collection[int]) -> None:
    """Replace every gradient by its sum over ranks, an absent one counting as zero.

    The day layer of a session that occurs nowhere keeps its gradient absent, so that it is left
    alone on every rank alike.

    Args:
        model: after `backward`; its day layers are `day_weights` and `day_biases`.
        world: the processes whose batches make up the whole batch.
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
    with nullcontext() if world.board is None else world.board.meeting():
        dist.all_reduce(flat, group=world.gradients)
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])
