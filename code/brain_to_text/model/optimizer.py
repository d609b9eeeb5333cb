"""AdamW as the recipe wants it: three groups, two schedules, updates that refuse themselves."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import AdamW

from ..config import TrainingConfig

CLIP_EPSILON = 1e-6  # added to the norm by torch.nn.utils.clip_grad_norm_


def build_optimizer(model: nn.Module, config: TrainingConfig) -> AdamW:
    """Fused AdamW over a model that is already on its device.

    Groups, in this order: GRU and classifier biases (no decay), day layers (own rate and decay),
    everything else. A parameter without a gradient, such as the day layer of a session that is not
    in the batch, is not touched by a step: neither decayed nor moved by its momentum.
    """
    decay = {"bias": 0.0, "day_layer": config.weight_decay_day, "other": config.weight_decay}
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in decay}
    for name, parameter in model.named_parameters():
        if name.startswith("day_"):
            kind = "day_layer"
        elif name.startswith("gru.bias") or (name.startswith("out.") and name.endswith("bias")):
            kind = "bias"
        else:
            kind = "other"
        if parameter.requires_grad:
            groups[kind].append(parameter)
    return AdamW(
        [
            {"params": parameters, "group_type": kind, "weight_decay": decay[kind]}
            for kind, parameters in groups.items()
            if parameters
        ],
        lr=config.lr_max,
        betas=(config.beta0, config.beta1),
        eps=config.epsilon,
        fused=True,
    )


def learning_rate_multiplier(
    step: int, min_ratio: float, decay_steps: int, warmup_steps: int, shape: str = "cosine"
) -> float:
    """step / warmup_steps, then from 1 to min_ratio at decay_steps, constant after.

    The first update therefore has rate 0 whenever there is a warm-up, as in the public baseline.
    """
    if step < warmup_steps:
        return step / warmup_steps
    if step >= decay_steps:
        return min_ratio
    progress = (step - warmup_steps) / (decay_steps - warmup_steps)
    remaining = 1 - progress if shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return min_ratio + (1 - min_ratio) * remaining


def set_learning_rates(optimizer: AdamW, config: TrainingConfig, step: int) -> None:
    """Give every group the rate of the update at a global step."""
    for group in optimizer.param_groups:
        suffix = "_day" if group["group_type"] == "day_layer" else ""
        peak = getattr(config, f"lr_max{suffix}")
        group["lr"] = peak * learning_rate_multiplier(
            step,
            getattr(config, f"lr_min{suffix}") / peak if peak else 0.0,
            getattr(config, f"lr_decay_steps{suffix}") or config.num_training_batches,
            getattr(config, f"lr_warmup_steps{suffix}"),
            config.lr_scheduler_type,
        )


def clip_and_check(
    parameters: Iterable[torch.Tensor], max_norm: float, scale: torch.Tensor | float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What to do with the gradients, decided on their device without waiting for it.

    Args:
        parameters: those whose `grad` takes part; None gradients are left out.
        max_norm: largest allowed norm of all gradients together; 0 does not clip.
        scale: factor that the gradients were multiplied by (float16 loss scaling).

    Returns:
        (norm before clipping, whether it is finite, divisor): float32, bool and float32 scalars;
        gradients divided by `divisor` are unscaled and clipped.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True) / scale
    divisor = torch.ones_like(norm) * scale
    if max_norm > 0:
        divisor = divisor * ((norm + CLIP_EPSILON) / max_norm).clamp_min(1)
    return norm, torch.isfinite(norm), divisor


def apply_update(optimizer: AdamW, divisor: torch.Tensor, refused: torch.Tensor) -> None:
    """One AdamW step with gradients / divisor; where `refused` is true it changes nothing.

    Both reach the fused kernel as tensors (the contract that torch's GradScaler uses), so clipping
    costs no pass over the gradients and refusing needs no answer from the device.
    """
    optimizer.grad_scale = divisor.float()  # type: ignore[attr-defined]
    optimizer.found_inf = refused.float()  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
