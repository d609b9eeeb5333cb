"""Trials kept on the training device, so that a batch of them crosses no bus.

One tensor holds the rows (time bins) of every trial kept; row 0 is zero and stands for padding. A
batch is then a single gather of rows. What comes first stays, as in the RAM cache; trials for which
there is no room pass through a scratch area of one batch's size.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch


class DeviceCache:
    """Rows of trials on a device under a byte budget.

    Args:
        device: any torch device; the CPU too.
        budget_bytes: size of the whole tensor, scratch area included.
        n_features: C.
        dtype: float32 or float16: what the stream gives.
        scratch_rows: most rows that the distinct trials of one batch can have.

    Raises:
        ValueError: the budget does not even hold the scratch area (see `smallest_budget`).
    """

    def __init__(
        self,
        device: torch.device,
        budget_bytes: int,
        n_features: int,
        dtype: torch.dtype,
        scratch_rows: int,
    ) -> None:
        rows = budget_bytes // (n_features * dtype.itemsize)
        if rows <= scratch_rows + 1:
            needed = self.smallest_budget(n_features, dtype, scratch_rows)
            raise ValueError(f"{budget_bytes} bytes cannot hold one batch ({needed} bytes)")
        self.device = device
        self.dtype = dtype
        self._rows = torch.empty((rows, n_features), dtype=dtype, device=device)
        self._rows[0] = 0
        self._scratch = rows - scratch_rows
        self._next = 1
        self._starts: dict[int, int] = {}
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))

    @staticmethod
    def smallest_budget(n_features: int, dtype: torch.dtype, scratch_rows: int) -> int:
        return (scratch_rows + 2) * n_features * dtype.itemsize

    def holds(self, index: int) -> bool:
        """True once the trial is on the device; it then stays there."""
        return index in self._starts

    def gather(
        self,
        indices: Sequence[int],
        n_time_steps: Sequence[int],
        rows: torch.Tensor | None,
        places: Mapping[int, int],
    ) -> torch.Tensor:
        """The padded batch [B, T, C] float32 on the device.

        Args:
            indices: trial of each row of the batch.
            n_time_steps: bins of each.
            rows: [R, C] CPU: the trials not held when the batch was prepared, one after another.
            places: first row in `rows` of each such trial.
        """
        with self._lock, torch.cuda.stream(self._stream):
            starts = self._admit(dict(zip(indices, n_time_steps, strict=True)), rows, places)
            first = np.array([starts[i] for i in indices])[:, None]
            lengths = np.asarray(n_time_steps)[:, None]
            bins = np.arange(max(n_time_steps))[None, :]
            table = torch.from_numpy(np.where(bins < lengths, first + bins, 0))
            if self._stream is not None:
                table = table.pin_memory()
            table = table.to(self.device, non_blocking=True)
            flat = self._rows.index_select(0, table.flatten())
            features = flat.view(*table.shape, self._rows.shape[1]).float()
        if self._stream is not None:
            consumer = torch.cuda.current_stream(self.device)
            consumer.wait_stream(self._stream)
            features.record_stream(consumer)
        return features

    def _admit(
        self,
        lengths: Mapping[int, int],
        rows: torch.Tensor | None,
        places: Mapping[int, int],
    ) -> dict[int, int]:
        """Put new trials on the device; where each trial of the batch starts."""
        scratch = self._scratch
        starts = {}
        for index, length in lengths.items():
            if index in self._starts:
                starts[index] = self._starts[index]
                continue
            assert rows is not None
            keep = self._next + length <= self._scratch
            starts[index] = start = self._next if keep else scratch
            source = rows[places[index] : places[index] + length]
            self._rows[start : start + length].copy_(source, non_blocking=True)
            if keep:
                self._starts[index] = start
                self._next += length
            else:
                scratch += length
        return starts


@dataclass(frozen=True)
class GatherPlan:
    """A batch that is put together on the device when it is moved there."""

    cache: DeviceCache
    indices: tuple[int, ...]
    n_time_steps: tuple[int, ...]
    rows: torch.Tensor | None
    places: Mapping[int, int]

    def run(self) -> torch.Tensor:
        """[B, T, C] float32 on the cache's device."""
        return self.cache.gather(self.indices, self.n_time_steps, self.rows, self.places)
