"""The reference recipe as one writes it first: padded, eager, one call per idea.

Same mathematics and the same parameter names as `brain_to_text`, in plain PyTorch: day weights
gathered to [B, C, C], depthwise convolution for smoothing, strided patches, torch's GRU over padded
frames, torch's CTC on log-softmax (of diphones, and of phonemes summed class by class where they
have a weight), clip and AdamW one after the other, and a host read of loss and gradient norm at
every step. Under autocast torch's GRU computes in float16 on GPUs, even if bfloat16 is asked for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from brain_to_text.config import TrainingConfig
from brain_to_text.model.augmentations import gaussian_kernel
from brain_to_text.model.optimizer import build_optimizer
from torch import nn


class PlainDecoder(nn.Module):
    """The public baseline's GRU decoder, by the names of its arguments and parameters."""

    def __init__(
        self,
        neural_dim: int,
        n_units: int,
        n_days: int,
        n_classes: int,
        rnn_dropout: float = 0.0,
        input_dropout: float = 0.0,
        n_layers: int = 5,
        patch_size: int = 14,
        patch_stride: int = 4,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        self.patch, self.stride = patch_size, patch_stride
        days = range(n_days)
        self.day_weights = nn.ParameterList(nn.Parameter(torch.eye(neural_dim)) for _ in days)
        self.day_biases = nn.ParameterList(nn.Parameter(torch.zeros(1, neural_dim)) for _ in days)
        self.dropout = nn.Dropout(input_dropout)
        self.gru = nn.GRU(
            neural_dim * patch_size,
            n_units,
            n_layers,
            dropout=rnn_dropout if n_layers > 1 else 0.0,
            batch_first=True,
            bidirectional=bidirectional,
        )
        self.out = nn.Linear(n_units * (2 if bidirectional else 1), n_classes)
        self.h0 = nn.Parameter(torch.zeros(1, 1, n_units))

    @classmethod
    def of(cls, config: TrainingConfig, n_days: int) -> PlainDecoder:
        model = config.model
        return cls(
            config.width,
            model.n_units,
            n_days,
            config.dataset.n_classes,
            model.rnn_dropout,
            model.input_network.input_layer_dropout,
            model.n_layers,
            model.patch_size,
            model.patch_stride,
            model.bidirectional,
        )

    def day_layer(self, x: torch.Tensor, days: torch.Tensor) -> torch.Tensor:
        weights = torch.stack([self.day_weights[d] for d in days])
        biases = torch.stack([self.day_biases[d] for d in days])
        return self.dropout(F.softsign(torch.bmm(x, weights) + biases))

    def patches(self, x: torch.Tensor) -> torch.Tensor:
        windows = x.unfold(1, self.patch, self.stride).transpose(2, 3)
        return windows.reshape(*windows.shape[:2], -1)

    def recurrent(self, frames: torch.Tensor) -> torch.Tensor:
        layers = self.gru.num_layers * (2 if self.gru.bidirectional else 1)
        states = self.h0.expand(layers, len(frames), -1).contiguous()
        return self.gru(frames, states)[0]

    def forward(self, x: torch.Tensor, days: torch.Tensor) -> torch.Tensor:
        return self.out(self.recurrent(self.patches(self.day_layer(x, days))))


class PlainStep:
    """Augment, forward, loss, backward, clip, update; `training_step` is the whole of it."""

    def __init__(self, model: PlainDecoder, config: TrainingConfig, device: torch.device) -> None:
        self.model, self.config, self.device = model, config, device
        self.transforms = config.dataset.data_transforms
        self.kernel = gaussian_kernel(
            self.transforms.smooth_kernel_std, self.transforms.smooth_kernel_size
        ).to(device)
        self.optimizer = build_optimizer(model, config)

    def augment(self, x: torch.Tensor, n_time_steps: torch.Tensor):
        x = x + torch.randn(x.shape, device=self.device) * self.transforms.white_noise_std
        offset = torch.randn((len(x), 1, x.shape[2]), device=self.device)
        x = x + offset * self.transforms.constant_offset_std
        cut = int(torch.randint(0, max(self.transforms.random_cut, 1), ()))
        x, n_time_steps = x[:, cut:], n_time_steps - cut
        C = x.shape[2]
        kernel = self.kernel.view(1, 1, -1).repeat(C, 1, 1)
        x = F.conv1d(x.permute(0, 2, 1), kernel, padding="same", groups=C).permute(0, 2, 1)
        return x, n_time_steps

    def loss(self, logits: torch.Tensor, batch, frames: torch.Tensor) -> torch.Tensor:
        log_probs = logits.float().log_softmax(2).permute(1, 0, 2)
        nll = F.ctc_loss(
            log_probs, batch.labels, frames, batch.label_lengths, blank=0, reduction="none"
        )
        weight = self.config.objective.phoneme_weight
        if weight == 0:
            return nll.mean()
        marginal = torch.stack([log_probs[..., c::41].logsumexp(-1) for c in range(41)], -1)
        phoneme_nll = F.ctc_loss(
            marginal,
            batch.phoneme_labels,
            frames,
            batch.phoneme_lengths,
            blank=0,
            reduction="none",
        )
        return (1 - weight) * nll.mean() + weight * phoneme_nll.mean()

    def update(self) -> torch.Tensor:
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(),
            self.config.grad_norm_clip_value,
            error_if_nonfinite=True,
            foreach=True,
        )
        self.optimizer.step()
        return norm

    def frames(self, n_time_steps: torch.Tensor) -> torch.Tensor:
        model = self.config.model
        return torch.div(
            n_time_steps - model.patch_size, model.patch_stride, rounding_mode="floor"
        ).add(1)

    def training_step(self, batch, dtype: torch.dtype | None = None) -> float:
        self.model.train()
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            x, n_time_steps = self.augment(batch.features, batch.n_time_steps)
            logits = self.model(x, batch.day_indices)
            loss = self.loss(logits, batch, self.frames(n_time_steps))
        loss.backward()
        self.update()
        return loss.item()
