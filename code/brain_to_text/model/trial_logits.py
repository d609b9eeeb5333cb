"""Logits of whole trials where nothing is learnt: the forward pass of validation and evaluation.

On a GPU a batch is computed at once. On a CPU that spends its time on memory: patches copied out
of overlapping bins, gates kept for a backward pass that never comes, logits of 1681 classes for
padding. Here none of these is made, and the first layer, the largest, is computed with half the
multiplications (see `patch_projection`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from ..streaming.batch import Batch
from .augmentations import Augmentation
from .packed_gru import linear, reordered, run_layer
from .patch_projection import OUTPUTS, PatchProjection
from .rnn_model import GRUDecoder

_TILES = 256  # of the first layer computed together: its temporaries stay below 32 MB
_ROWS = 512  # frames of the other layers projected together
_STEP = 32  # rows of products come in multiples of this: oneDNN compiles code for every new shape


class TrialLogits:
    """A decoder with its weights as they are now.

    Args:
        model: in evaluation mode, on the device of the batches.
        augmentation: only its smoothing is used.
        autocast: the precision of the forward pass.
    """

    def __init__(
        self,
        model: GRUDecoder,
        augmentation: Augmentation,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._model, self._augmentation, self._autocast = model, augmentation, autocast
        with autocast():
            reduced = torch.is_autocast_enabled("cpu")
        self._on_cpu: _CpuPass | None = None
        if (
            model.h0.device.type == "cpu"
            and model.h0.dtype == torch.float32
            and not reduced
            and not model.bidirectional
            and PatchProjection.suits(model.patch_size, model.patch_stride)
        ):
            self._on_cpu = _CpuPass(model, augmentation)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows of the batch, their logits [b, T', classes]); a trial at a time on CPUs.

        T' is at least the longest of these rows' frames, and at least 1.
        """
        assert batch.features is not None  # on the device by now
        if self._on_cpu is not None:
            made = self._on_cpu.logits(batch.features, batch.n_time_steps, batch.day_indices)
            for row, logits in enumerate(made):
                yield slice(row, row + 1), logits
            return
        features, n_time_steps = self._augmentation(
            batch.features, batch.n_time_steps, training=False
        )
        with self._autocast():
            logits = self._model(features, batch.day_indices, n_time_steps=n_time_steps)
        # on a CPU a few trials at a time stay in the cache, and in memory that is already mapped
        size = 1 if logits.device.type == "cpu" else len(logits)
        for start in range(0, len(logits), size):
            rows = slice(start, start + size)
            longest = int(self._model.frame_lengths(n_time_steps[rows]).clamp_min(1).max())
            yield rows, logits[rows, :longest]


class _CpuPass:
    """The decoder's arithmetic on a CPU, in memory that is kept from batch to batch."""

    def __init__(self, model: GRUDecoder, augmentation: Augmentation) -> None:
        self._model, self._smooth = model, augmentation
        gru = model.gru
        weight, bias = (getattr(gru, name).detach() for name in ("weight_ih_l0", "bias_ih_l0"))
        self._project = PatchProjection(weight, bias, model.patch_size, model.patch_stride)
        self._memory: dict[str, torch.Tensor] = {}
        self._recurrent: dict[tuple[int, int], torch.Tensor] = {}

    def logits(
        self, features: torch.Tensor, n_time_steps: torch.Tensor, days: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """[1, its frames, classes] of each trial, in the batch's order."""
        model, H = self._model, self._model.n_units
        frames = model.frame_lengths(n_time_steps).clamp_min(1).numpy()
        order = np.argsort(-frames, kind="stable")
        place = np.argsort(order)
        sizes = (np.arange(frames.max())[:, None] < frames).sum(1)
        first = np.concatenate([[0], np.cumsum(sizes)])  # packed row of each time's longest trial
        N = int(first[-1])
        gates = self._kept("gates", N + 1, 3 * H)  # the last row takes what no trial has
        for some in self._chunks(frames):
            self._first_gates(features, n_time_steps, days, frames, some, place, first, gates)
        source, target = self._kept("odd", N, H), self._kept("even", N, H)
        state = model.h0[0].expand(len(frames), H).contiguous()
        for layer in range(model.n_layers):
            if layer:
                weight_ih = getattr(model.gru, f"weight_ih_l{layer}")
                bias_ih = getattr(model.gru, f"bias_ih_l{layer}")
                for x, into in zip(source.split(_ROWS), gates[:N].split(_ROWS), strict=True):
                    into.copy_(linear(x, weight_ih, bias_ih))
            bias_hh = getattr(model.gru, f"bias_hh_l{layer}")
            weight_hh = self._recurrent_weight(layer, len(frames))
            run_layer(gates[:N], state, weight_hh, bias_hh, sizes.tolist(), target)
            source, target = target, source
        for trial, length in enumerate(frames):
            rows = np.zeros(_rounded_up(int(length)), dtype=np.int64)
            rows[:length] = first[:length] + place[trial]
            yield self._classified(source.index_select(0, torch.from_numpy(rows)))[None, :length]

    def _classified(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T', classes] from [T', H]."""
        return linear(hidden, self._model.out.weight, self._model.out.bias)

    def _first_gates(
        self,
        features: torch.Tensor,
        n_time_steps: torch.Tensor,
        days: torch.Tensor,
        frames: np.ndarray,
        some: range,
        place: np.ndarray,
        first: np.ndarray,
        gates: torch.Tensor,
    ) -> None:
        """Smoothing, day layer and input gates of some trials, put where `gates` has them."""
        project, C = self._project, features.shape[2]
        counts = [project.blocks_of(int(frames[trial])) for trial in some]
        blocks = self._kept("blocks", sum(counts), project.block)
        starts, rows, begin = [], [], 0
        for trial, count in zip(some, counts, strict=True):
            self._mapped(
                features[trial],
                int(n_time_steps[trial]),
                int(days[trial]),
                blocks[begin : begin + count].view(-1, C),
            )
            tiles = -(-int(frames[trial]) // OUTPUTS)
            starts.append(begin + OUTPUTS * np.arange(tiles))
            packed = np.full(OUTPUTS * tiles, len(gates) - 1)
            packed[: frames[trial]] = first[: frames[trial]] + place[trial]
            rows.append(packed.reshape(tiles, OUTPUTS).T)
            begin += count
        tiles = sum(len(own) for own in starts)
        spare = _rounded_up(tiles) - tiles
        starts.append(np.zeros(spare, dtype=np.int64))
        rows.append(np.full((OUTPUTS, spare), len(gates) - 1))
        made = project(blocks, torch.from_numpy(np.concatenate(starts)))
        into = torch.from_numpy(np.concatenate(rows, axis=1).reshape(-1))
        gates.index_copy_(0, into, made.view(len(into), -1))

    def _mapped(self, features: torch.Tensor, bins: int, day: int, out: torch.Tensor) -> None:
        """The day layer of one trial's smoothed bins into `out` [bins, C], zero beyond them."""
        model = self._model
        one, length = features[None, :bins], torch.tensor([bins])
        smoothed, _ = self._smooth(one, length, training=False)
        weight, bias = model.day_weights[day].detach(), model.day_biases[day].detach()
        x = torch.addmm(bias, smoothed[0], weight)
        used = min(bins, len(out))
        torch.div(x[:used], x[:used].abs().add_(1), out=out[:used])
        out[used:] = 0

    def _chunks(self, frames: np.ndarray) -> Iterator[range]:
        """Runs of trials whose tiles are computed together."""
        start, tiles = 0, 0
        for trial, length in enumerate(frames):
            tiles += -(-int(length) // OUTPUTS)
            if tiles >= _TILES:
                yield range(start, trial + 1)
                start, tiles = trial + 1, 0
        if start < len(frames):
            yield range(start, len(frames))

    def _recurrent_weight(self, layer: int, rows: int) -> torch.Tensor:
        if (layer, rows) not in self._recurrent:
            weight = getattr(self._model.gru, f"weight_hh_l{layer}")
            self._recurrent[layer, rows] = reordered(weight, rows)
        return self._recurrent[layer, rows]

    def _kept(self, name: str, rows: int, width: int) -> torch.Tensor:
        """Memory of that shape, not cleared, the same one where it is large enough."""
        kept = self._memory.get(name)
        if kept is None or len(kept) < rows:
            kept = self._memory[name] = torch.empty(rows, width)
        return kept[:rows]


def _rounded_up(rows: int) -> int:
    return -(-rows // _STEP) * _STEP
