"""Several processes that train one model: who they are, and what they must agree on.

torchrun starts one process per GPU and says through its variables who is who; a process started
alone is a world of one, for which everything here is free. Gradients travel by the device's engine
(NCCL on GPUs, gloo on CPUs), decisions by gloo, so that asking for them never waits for a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from .errors import TrainingError

T = TypeVar("T")
Compression = Literal["none", "bfloat16"]

# Indexing a dataset without a manifest happens on one rank while the others wait.
SETUP_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """This process among the `size` processes of a run.

    Attributes:
        rank: 0 writes logs, checkpoints and results.
        size: processes over all hosts.
        local_rank: position on this host; also its GPU.
        local_size: processes on this host.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    decisions: dist.ProcessGroup | None = None

    @classmethod
    def join(cls) -> World:
        """The world that torchrun's variables describe; one process without them.

        Raises:
            TrainingError: the other processes cannot be reached.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        local_rank = int(os.environ["LOCAL_RANK"])
        try:
            if torch.cuda.is_available():
                torch.cuda.set_device(local_rank)
                dist.init_process_group("nccl", device_id=torch.device("cuda", local_rank))
            else:
                dist.init_process_group("gloo", timeout=SETUP_TIMEOUT)
            decisions = dist.new_group(backend="gloo", timeout=SETUP_TIMEOUT)
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
            except Exception as error:
                message[1] = error
                dist.broadcast_object_list(message, src=0, group=self.decisions)
                raise
        dist.broadcast_object_list(message, src=0, group=self.decisions)
        if message[1] is not None:
            raise message[1]
        return message[0]

    def any(self, flag: bool) -> bool:
        """True on every rank when it is on one; all ranks must ask at the same point."""
        if self.size == 1:
            return flag
        asked = torch.tensor([int(flag)])
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.decisions)
        return bool(asked.item())

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order of rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.decisions)
        return values

    def leave(self) -> None:
        """Let go of the other processes."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


class GradientSum:
    """Sums gradients over ranks while the backward pass still runs.

    Two groups of parameters travel: those of every step (classifier, GRU, h0) start as soon as the
    last of them is known, while the day layers are still being differentiated; then the day layers
    of the sessions that occur anywhere in the batch. A session that occurs nowhere keeps its
    gradient absent, so that its layer is left alone on every rank alike.

    Args:
        model: its day layers are `day_weights` and `day_biases`.
        world: at least two processes.
        compression: "bfloat16" halves what travels.
    """

    def __init__(self, model: nn.Module, world: World, compression: Compression = "none") -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._always = [p for name, p in named if not name.startswith("day_")]
        self._days: dict[int, list[nn.Parameter]] = {}
        for name, parameter in named:
            if name.startswith("day_"):
                self._days.setdefault(int(name.split(".")[1]), []).append(parameter)
        self._compression = compression
        self._world = world
        self._known = 0
        self._travelling: _Sum | None = None
        for parameter in self._always:
            parameter.register_post_accumulate_grad_hook(self._one_more)

    def finish(self, days: Iterable[int]) -> None:
        """Replace every gradient by its sum over ranks; call after `backward`.

        Args:
            days: sessions of the whole batch, the same on every rank.
        """
        if self._travelling is None:  # this rank's share left a parameter without a gradient
            self._start()
        parameters = [p for day in sorted(set(days)) for p in self._days.get(day, ())]
        day_sum = _Sum(parameters, self._compression) if parameters else None
        assert self._travelling is not None
        self._travelling.finish()
        if day_sum is not None:
            day_sum.finish()
        self._travelling, self._known = None, 0

    def _one_more(self, parameter: torch.Tensor) -> None:
        self._known += 1
        if self._known == len(self._always):
            self._start()

    def _start(self) -> None:
        self._travelling = _Sum(self._always, self._compression)


class _Sum:
    """One all-reduce of many gradients under way; an absent gradient counts as zero."""

    def __init__(self, parameters: list[nn.Parameter], compression: Compression) -> None:
        self._parameters = parameters
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in self._gradients])
        self._flat = flat.bfloat16() if compression == "bfloat16" else flat
        self._work = dist.all_reduce(self._flat, async_op=True)

    def finish(self) -> None:
        self._work.wait()
        parts = self._flat.to(self._gradients[0].dtype).split(
            [gradient.numel() for gradient in self._gradients]
        )
        torch._foreach_copy_(
            self._gradients,
            [part.view_as(g) for part, g in zip(parts, self._gradients, strict=True)],
        )
