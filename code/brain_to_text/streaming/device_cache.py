"""Trials kept on the training device, so that a batch of them crosses no bus.

One tensor holds the rows (time bins) of every trial kept; row 0 is zero and stands for padding. A
batch is then a single gather of rows. Each trial that is to be kept has its place from the start
(see `cache_plan`); others pass through a scratch area of one batch's size.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch


class DeviceCache:
    """Rows of trials on a device.

    Args:
        device: any torch device; the CPU too.
        kept: bins of each trial to keep.
        n_features: C.
        dtype: float32 or float16: what the stream gives.
        scratch_rows: most rows that the distinct trials of one batch can have.
    """

    def __init__(
        self,
        device: torch.device,
        kept: Mapping[int, int],
        n_features: int,
        dtype: torch.dtype,
        scratch_rows: int,
    ) -> None:
        self.device = device
        self.dtype = dtype
        ends = np.cumsum([1, *kept.values()]).tolist()
        self._places = dict(zip(kept, ends, strict=False))
        self._scratch = ends[-1]
        shape = (self._scratch + scratch_rows, n_features)
        self._rows = torch.empty(shape, dtype=dtype, device=device)
        self._rows[0] = 0
        self._held: set[int] = set()
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def holds(self, index: int) -> bool:
        """True once the trial is on the device; it then stays there."""
        return index in self._held

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
            keep = index in self._places
            starts[index] = start = self._places[index] if keep else scratch
            if index in self._held:
                continue
            assert rows is not None
            source = rows[places[index] : places[index] + length]
            self._rows[start : start + length].copy_(source, non_blocking=True)
            if keep:
                self._held.add(index)
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
