"""The decoder for real time: bins in as they are recorded, frames out as soon as they are certain.

A `StreamingDecoder` gives exactly the frames that the whole-trial model gives, with smoothing
included: a frame appears once its last bin and the smoothing's look-ahead (4 bins, 80 ms) are in.
Exported as TorchScript, it runs from Python or C++ without this library.
"""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path

import torch
from torch import nn

from ..errors import CheckpointError
from ..storage.ownership import replace_file
from .augmentations import Augmentation
from .trained_model import ModelArtefact

METADATA = "decoder.json"  # extra file inside an exported decoder


class StreamingDecoder(nn.Module):
    """One trial at a time: `start()`, `decoder(bins, day, state)` as bins arrive, then `finish`.

    The state is three tensors: the last raw bins [1, up to 8, C], smoothed bins not yet in a frame
    [1, up to patch_size - 1, C], and the GRU's hidden states [layers, 1, H].

    On the CPU; its weights are those of the artefact.

    Raises:
        CheckpointError: the model is bidirectional, or its weights do not fit.
    """

    def __init__(self, artefact: ModelArtefact) -> None:
        super().__init__()
        model = artefact.build("cpu")
        if model.gru.bidirectional:
            raise CheckpointError(
                "A bidirectional model reads the future and cannot decode while a person speaks: "
                "train with model.bidirectional false."
            )
        taps = Augmentation(artefact.config.dataset.data_transforms).taps or [1.0]
        self.taps = nn.Buffer(torch.tensor(taps))
        self.day_weights = nn.Buffer(torch.stack([w.detach() for w in model.day_weights]))
        self.day_biases = nn.Buffer(torch.stack([b.detach() for b in model.day_biases]))
        self.h0 = nn.Buffer(model.h0.detach().clone())
        self.gru = model.gru
        self.out = model.out
        self.look_back = (len(taps) - 1) // 2
        self.look_ahead = len(taps) - 1 - self.look_back
        self.patch_size = model.patch_size
        self.patch_stride = model.patch_stride
        self.n_layers = model.n_layers

    @torch.jit.export
    def start(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The state before a trial's first bin."""
        C = self.day_weights.shape[1]
        bins = torch.zeros(1, self.look_back, C, device=self.h0.device)
        hidden = self.h0.expand(self.n_layers, 1, self.h0.shape[2]).contiguous()
        return bins, torch.zeros(1, 0, C, device=self.h0.device), hidden

    def forward(
        self,
        bins: torch.Tensor,
        day: int,
        state: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Logits of the frames that became certain, [1, frames, classes], and the state.

        Args:
            bins: [1, n, C] float32 raw z-scored features, any n.
            day: position of the session in the model's list.
            state: from `start` or the last call.
        """
        recent, waiting, hidden = state
        recent = torch.cat([recent, bins], dim=1)
        width = self.taps.shape[0]
        if recent.shape[1] >= width:
            smooth = recent.unfold(1, width, 1) @ self.taps
            recent = recent[:, recent.shape[1] - (width - 1) :]
            mapped = smooth @ self.day_weights[day] + self.day_biases[day]
            waiting = torch.cat([waiting, torch.nn.functional.softsign(mapped)], dim=1)
        n_frames = (waiting.shape[1] - self.patch_size) // self.patch_stride + 1
        if waiting.shape[1] < self.patch_size:
            n_frames = 0
        if n_frames == 0:
            empty = torch.zeros(1, 0, self.out.weight.shape[0], device=bins.device)
            return empty, (recent, waiting, hidden)
        patches = waiting.unfold(1, self.patch_size, self.patch_stride)
        patches = patches.permute(0, 1, 3, 2).reshape(1, n_frames, -1)
        hidden_frames, hidden = self.gru(patches, hidden)
        waiting = waiting[:, n_frames * self.patch_stride :]
        return self.out(hidden_frames), (recent, waiting, hidden)

    @torch.jit.export
    def finish(
        self, day: int, state: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Logits of the last frames, whose smoothing looks beyond the trial's end (at zeros)."""
        C = self.day_weights.shape[1]
        beyond = torch.zeros(1, self.look_ahead, C, device=self.h0.device)
        logits, _ = self.forward(beyond, day, state)
        return logits


def export_streaming(artefact: ModelArtefact, path: Path) -> None:
    """Write the streaming decoder as TorchScript; `torch.jit.load` needs nothing else.

    Its extra file decoder.json lists the sessions in day order and the classes' form.

    Raises:
        CheckpointError: the model is bidirectional. DataError: the file is there and is something
            else. StorageError: it cannot be written.
    """
    decoder = StreamingDecoder(artefact)
    metadata = {
        "sessions": list(artefact.sessions),
        "n_classes": artefact.config.dataset.n_classes,
        "bins_per_frame": decoder.patch_stride,
        "bins_before_first_frame": decoder.patch_size + decoder.look_ahead,
    }
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # torch announces a successor that cannot express a state of varying length
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(decoder)
        torch.jit.save(scripted, buffer, _extra_files={METADATA: json.dumps(metadata)})
    replace_file(path, buffer.getvalue(), METADATA.encode())
