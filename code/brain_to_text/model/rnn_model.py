"""The decoder: a day layer per session, patches of bins, a GRU, a linear classifier.

Parameter names and shapes are the public baseline's (`day_weights.0` [C, C], `day_biases.0`
[1, C], `gru.weight_ih_l0`, …, `out.weight`, `h0` [1, 1, H]), so weights load both ways.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..config import TrainingConfig
from ..errors import CheckpointError
from ..labels.diphones import N_DIPHONES
from .classifier import PLAIN_NAMES, PREFIX, FactoredClassifier, frame_logits, unfolded
from .device import one_thread, send
from .packed_gru import packed_gru


class GRUDecoder(nn.Module):
    """Logits of CTC classes per output frame from smoothed neural features.

    Args:
        config: whose model to build; its classes and features per bin are in the dataset section.
        n_days: sessions, each with its own day layer.
        for_training: with the classifier's own factors, where it has some.
    """

    def __init__(self, config: TrainingConfig, n_days: int, *, for_training: bool = False) -> None:
        super().__init__()
        settings = config.model
        self.neural_dim = neural_dim = config.width
        self.n_units = n_units = settings.n_units
        self.n_days = n_days
        self.n_classes = n_classes = config.dataset.n_classes
        self.n_layers = settings.n_layers
        self.n_directions = 2 if settings.bidirectional else 1
        self.input_dropout = settings.input_network.input_layer_dropout
        self.patch_size = settings.patch_size
        self.patch_stride = settings.patch_stride

        self.day_weights = nn.ParameterList(
            nn.Parameter(torch.eye(neural_dim)) for _ in range(n_days)
        )
        self.day_biases = nn.ParameterList(
            nn.Parameter(torch.zeros(1, neural_dim)) for _ in range(n_days)
        )
        self.gru = nn.GRU(
            input_size=neural_dim * self.patch_size,
            hidden_size=n_units,
            num_layers=self.n_layers,
            dropout=settings.rnn_dropout if self.n_layers > 1 else 0.0,
            batch_first=True,
            bidirectional=settings.bidirectional,
        )
        for name, parameter in self.gru.named_parameters():
            if "weight_hh" in name:
                with one_thread():
                    nn.init.orthogonal_(parameter)
            elif "weight_ih" in name:
                nn.init.xavier_uniform_(parameter)
        self.out: nn.Linear | FactoredClassifier
        self.out = nn.Linear(n_units * self.n_directions, n_classes)
        nn.init.xavier_uniform_(self.out.weight)
        self.h0 = nn.Parameter(nn.init.xavier_uniform_(torch.zeros(1, 1, n_units)))
        if for_training and settings.classifier == "factored" and n_classes == N_DIPHONES:
            self.out = FactoredClassifier(n_units * self.n_directions)

    def frame_lengths(self, n_time_steps: torch.Tensor) -> torch.Tensor:
        """Output frames per trial: ⌊(T − patch_size) / patch_stride⌋ + 1, at least 0."""
        whole = torch.div(n_time_steps - self.patch_size, self.patch_stride, rounding_mode="floor")
        return (whole + 1).clamp_min(0)

    def forward(
        self,
        x: torch.Tensor,
        day_idx: torch.Tensor,
        states: torch.Tensor | None = None,
        return_state: bool = False,
        n_time_steps: torch.Tensor | None = None,
    ) -> Any:
        """Logits [B, T', n_classes]; with `return_state`, also the GRU's last states.

        The first four arguments are those of the public baseline's model.

        Args:
            x: [B, T, C] float, augmented and smoothed.
            day_idx: [B] session of each trial; on the CPU, so that nothing waits for the GPU.
            states: [layers * directions, B, H] to continue from; None starts at h0.
            return_state: also return the states after the last frame.
            n_time_steps: [B] on the CPU: only these bins are computed, and frames beyond a
                trial's last hold zeros. None: every bin counts.
        """
        rows, packing, states = self.packed_logits(x, day_idx, n_time_steps, states)
        logits = packing.padded(rows)[:, :, : self.n_classes]
        return (logits, states.index_select(1, packing.inverse)) if return_state else logits

    def packed_logits(
        self,
        x: torch.Tensor,
        day_idx: torch.Tensor,
        n_time_steps: torch.Tensor | None = None,
        states: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Packing, torch.Tensor]:
        """As `forward`, for the frames that exist alone: no padding is classified.

        Returns:
            (logits [N, >= n_classes] (see `frame_logits`), whose frames they are, the last states
            [layers * directions, B, H] in packed order).
        """
        B, T = x.shape[:2]
        x = F.softsign(self._day_layer(x, day_idx.tolist()))
        x = F.dropout(x, self.input_dropout, self.training)
        if n_time_steps is None:
            n_time_steps = torch.full((B,), T)
        n_frames = max(int(self.frame_lengths(torch.tensor(T))), 1)
        packing = Packing.of(self.frame_lengths(n_time_steps), n_frames, x.device)
        if states is None:
            states = self.h0.expand(self.n_layers * self.n_directions, B, self.n_units)
            states = states.contiguous()
        else:
            states = states.index_select(1, packing.order)
        x = self._patches(x, packing)
        hidden, states = packed_gru(x, packing.batch_sizes, states, self.gru)
        return frame_logits(self.out, hidden), packing, states

    def _day_layer(self, x: torch.Tensor, days: Sequence[int]) -> torch.Tensor:
        """x W + b with each trial's session's weights: one product per run of trials."""
        outputs, start = [], 0
        for day, run in groupby(days):
            trials = x[start : start + (n := len(list(run)))]
            weight, bias = self.day_weights[day], self.day_biases[day]
            outputs.append(F.linear(trials, weight.t(), bias.squeeze(0)))
            start += n
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _patches(self, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        """[N, patch_size * C]: the bins of every real frame, bin-major, in packed order."""
        B, T, C = x.shape
        n_blocks = -(-max(T, self.patch_size) // self.patch_stride)
        x = F.pad(x, (0, 0, 0, n_blocks * self.patch_stride - T))
        blocks = x.view(B, n_blocks, self.patch_stride * C)
        return _GatherPatches.apply(blocks, packing, self.patch_size * C)


class _GatherPatches(torch.autograd.Function):
    """Overlapping windows of every trial, packed; on the way back shifted sums, not a scatter."""

    @staticmethod
    def forward(ctx: Any, blocks: torch.Tensor, packing: Packing, width: int) -> torch.Tensor:
        """[N, width] from blocks [B, M, values], of which a window may span several."""
        _, M, step = blocks.shape
        ctx.packing, ctx.shape = packing, blocks.shape
        count = max((blocks.numel() - width) // step + 1, 0)
        windows = blocks.as_strided((count, width), (step, 1))
        return windows.index_select(0, packing.trial * M + packing.time)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Block m of a trial is part k of its frame m - k: one view and one sum for each k."""
        padded = ctx.packing.padded(grads[0])
        gradient = padded.new_zeros(ctx.shape)
        for k, part in enumerate(padded.split(ctx.shape[2], dim=2)):
            gradient[:, k : k + part.shape[1], : part.shape[2]] += part
        return gradient, None, None


@dataclass
class Packing:
    """The order in which the GRU sees the real frames of a padded batch: no padding is computed.

    Frames are sorted by time, then by trial, longest trial first (torch's packed sequences).
    """

    n_frames: int  # T' of the padded batch
    frame_lengths: torch.Tensor  # [B] CPU int64: frames per trial
    batch_sizes: torch.Tensor  # [T'] CPU int64: trials that have a frame at each time
    order: torch.Tensor  # [B] trial at each packed position, on the device
    inverse: torch.Tensor  # [B] packed position of each trial, on the device
    rows: torch.Tensor  # [N] b * T' + t of each packed frame, on the device
    trial: torch.Tensor  # [N] b of each packed frame, on the device
    time: torch.Tensor  # [N] t of each packed frame, on the device

    @classmethod
    def of(cls, lengths: torch.Tensor, n_frames: int, device: torch.device) -> Packing:
        """Packing of trials with `lengths` [B] frames each; computed on the host.

        A trial too short for a frame gets one all the same, so that the rest of its batch can be
        computed; its frame length stays 0 and its loss infinite.
        """
        lengths_np = lengths.cpu().numpy().clip(min=1)
        order = np.argsort(-lengths_np, kind="stable")
        present = np.arange(lengths_np.max())[:, None] < lengths_np[order][None, :]
        time, position = np.nonzero(present)
        trial = order[position]
        where = torch.from_numpy(np.stack([trial * n_frames + time, trial, time]))
        orders = torch.from_numpy(np.stack([order, np.argsort(order)]))
        rows, trial_, time_ = send(where, device)
        order_, inverse = send(orders, device)
        batch_sizes = torch.from_numpy(present.sum(1))
        return cls(n_frames, lengths, batch_sizes, order_, inverse, rows, trial_, time_)

    def padded(self, frames: torch.Tensor) -> torch.Tensor:
        """[B, T', values] from packed [N, values]; zero where a trial has no frame."""
        B = len(self.order)
        padded = frames.new_zeros(B * self.n_frames, frames.shape[1])
        return padded.index_copy_(0, self.rows, frames).view(B, self.n_frames, -1)


def without_wrappers(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights without the prefixes that DistributedDataParallel and torch.compile leave."""
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): v for name, v in state_dict.items()}


def load_public_state_dict(
    model: GRUDecoder, state_dict: Mapping[str, torch.Tensor], *, assign: bool = False
) -> list[str]:
    """Load weights of this library or of the public baseline into `model`.

    Prefixes left by wrappers are stripped. A classifier for another number of classes, or day
    layers beyond those the file has, keep their fresh initialisation.

    Args:
        assign: the given tensors become the model's instead of being copied into them, as for a
            model on the meta device.

    Returns:
        One sentence for each thing that was not taken from `state_dict`.

    Raises:
        CheckpointError: a weight is missing, unexpected, or has another shape.
    """
    given = without_wrappers(state_dict)
    fresh, remarks = model.state_dict(), []
    if "out.weight" in given and len(given["out.weight"]) != model.n_classes:
        remarks.append(
            f"The classifier has {len(given['out.weight'])} classes in the checkpoint and "
            f"{model.n_classes} here: it starts from fresh weights."
        )
        given = {name: v for name, v in given.items() if not name.startswith(PREFIX)}
        given |= {name: v for name, v in fresh.items() if name.startswith(PREFIX)}
    elif isinstance(model.out, FactoredClassifier) and given.keys() >= set(PLAIN_NAMES):
        given = unfolded(given)
    n_days = sum(name.startswith("day_weights.") for name in given)
    if n_days != model.n_days:
        common = min(n_days, model.n_days)
        remarks.append(
            f"The checkpoint has day layers for {n_days} sessions and this run has {model.n_days}: "
            f"the first {common} are loaded in order"
            f"{', the others start as the identity' if common < model.n_days else ''}."
        )
        days = {name: v for name, v in fresh.items() if name.startswith("day_")}
        given = {n: v for n, v in given.items() if n in days or not n.startswith("day_")}
        given = days | given
    for name in sorted(fresh.keys() | given.keys()):
        there, here = (
            tuple(weights[name].shape) if name in weights else "absent"
            for weights in (given, fresh)
        )
        if there != here:
            raise CheckpointError(
                f"The checkpoint was made by another architecture: {name} is {there} there and "
                f"{here} here; set the config's model section (n_units, n_layers, bidirectional, "
                "n_input_features, patch_size) to the checkpoint's."
            )
    model.load_state_dict(given, assign=assign)
    return remarks
