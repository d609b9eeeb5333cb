"""The recipe from its formulas, in float64, as plainly as possible; nothing of the library is used.

Loops over trials, bins, frames and taps; gradients by automatic differentiation of these formulas;
the optimiser written out. Slow, and the judge of everything fast.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch

Weights = dict[str, torch.Tensor]


def gaussian_taps(std: float) -> list[float]:
    """Gaussian on the integers up to four standard deviations; taps above 0.01, renormalised."""
    reach = round(4 * std)
    taps = [math.exp(-(k**2) / (2 * std**2)) for k in range(-reach, reach + 1)]
    taps = [tap / sum(taps) for tap in taps]
    kept = [tap for tap in taps if tap > 0.01]
    return [tap / sum(kept) for tap in kept]


def smooth(trial: torch.Tensor, std: float) -> torch.Tensor:
    """[T, C] -> [T, C]: every bin is the weighted mean of its neighbours, zeros outside."""
    taps = gaussian_taps(std)
    half = len(taps) // 2
    out = torch.zeros_like(trial)
    for t in range(len(trial)):
        for k, tap in enumerate(taps):
            if 0 <= t + k - half < len(trial):
                out[t] += tap * trial[t + k - half]
    return out


def patches(trial: torch.Tensor, size: int, stride: int) -> list[torch.Tensor]:
    """Frames of `size` bins every `stride` bins; in a frame all features of bin 0 come first."""
    count = (len(trial) - size) // stride + 1
    return [trial[f * stride : f * stride + size].reshape(-1) for f in range(count)]


def gru_direction(
    frames: list[torch.Tensor], h: torch.Tensor, weights: Weights, suffix: str
) -> list[torch.Tensor]:
    w_i, w_h = weights[f"gru.weight_ih_{suffix}"], weights[f"gru.weight_hh_{suffix}"]
    b_i, b_h = weights[f"gru.bias_ih_{suffix}"], weights[f"gru.bias_hh_{suffix}"]
    H, out = len(h), []
    for x in frames:
        i, r = w_i @ x + b_i, w_h @ h + b_h
        reset = torch.sigmoid(i[:H] + r[:H])
        update = torch.sigmoid(i[H : 2 * H] + r[H : 2 * H])
        new = torch.tanh(i[2 * H :] + reset * r[2 * H :])
        h = (1 - update) * new + update * h
        out.append(h)
    return out


def logits(
    trial: torch.Tensor,
    day: int,
    weights: Weights,
    *,
    layers: int,
    patch_size: int,
    patch_stride: int,
    bidirectional: bool = False,
) -> torch.Tensor:
    """[T, C] smoothed features of one trial, without padding, to [T', classes]."""
    z = trial @ weights[f"day_weights.{day}"] + weights[f"day_biases.{day}"]
    frames = patches(z / (1 + z.abs()), patch_size, patch_stride)
    h0 = weights["h0"].reshape(-1)
    for layer in range(layers):
        ahead = gru_direction(frames, h0, weights, f"l{layer}")
        if bidirectional:
            back = gru_direction(frames[::-1], h0, weights, f"l{layer}_reverse")[::-1]
            ahead = [torch.cat(pair) for pair in zip(ahead, back, strict=True)]
        frames = ahead
    return torch.stack(frames) @ weights["out.weight"].T + weights["out.bias"]


def ctc_by_enumeration(log_probs: torch.Tensor, labels: list[int]) -> torch.Tensor:
    """-log of the summed probability of every path that collapses to `labels`: all C ** T paths."""
    T, C = log_probs.shape
    total = []
    for path in itertools.product(range(C), repeat=T):
        merged = [c for c, _ in itertools.groupby(path)]
        if [c for c in merged if c != 0] == labels:
            total.append(torch.stack([log_probs[t, c] for t, c in enumerate(path)]).sum())
    if not total:
        return torch.tensor(math.inf, dtype=torch.float64)
    return -torch.logsumexp(torch.stack(total), 0)


def ctc(log_probs: torch.Tensor, labels: list[int]) -> torch.Tensor:
    """The same by the forward recursion over labels interleaved with blanks."""
    states = [0]
    for label in labels:
        states += [label, 0]
    minus_inf = torch.tensor(-math.inf, dtype=log_probs.dtype)
    alpha = [minus_inf] * len(states)
    alpha[0] = log_probs[0, 0]
    if labels:
        alpha[1] = log_probs[0, states[1]]
    for t in range(1, len(log_probs)):
        following = []
        for s, state in enumerate(states):
            came = [alpha[s]] + ([alpha[s - 1]] if s else [])
            if s > 1 and state != 0 and state != states[s - 2]:
                came.append(alpha[s - 2])
            came = [a for a in came if a > -math.inf]
            following.append(
                torch.logsumexp(torch.stack(came), 0) + log_probs[t, state] if came else minus_inf
            )
        alpha = following
    return -torch.logsumexp(torch.stack(alpha[-2:] if labels else alpha[-1:]), 0)


def marginalise(log_probs: torch.Tensor, n: int) -> torch.Tensor:
    """P(c) = sum over p of P(n p + c), one phoneme at a time."""
    probs = log_probs.exp()
    return torch.stack([probs[:, c::n].sum(1) for c in range(n)], dim=1).log()


def multiplier(step: int, peak: float, least: float, decay: int, warmup: int) -> float:
    if step < warmup:
        return step / warmup
    if step < decay:
        turn = math.pi * (step - warmup) / (decay - warmup)
        return least / peak + (1 - least / peak) * (1 + math.cos(turn)) / 2
    return least / peak


@dataclass
class AdamW:
    """Decoupled decay, bias-corrected moments; parameters without gradient are not touched."""

    betas: tuple[float, float]
    eps: float
    moments: dict[str, tuple[int, torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def step(self, name: str, w: torch.Tensor, g: torch.Tensor, lr: float, decay: float) -> None:
        t, m, v = self.moments.get(name, (0, torch.zeros_like(w), torch.zeros_like(w)))
        b1, b2 = self.betas
        t, m, v = t + 1, b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        self.moments[name] = (t, m, v)
        with torch.no_grad():
            w -= lr * decay * w
            w -= lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + self.eps)


def clip(gradients: dict[str, torch.Tensor], most: float) -> tuple[float, dict[str, torch.Tensor]]:
    """(norm before, gradients scaled to norm `most` if they exceed it)."""
    norm = math.sqrt(sum(float((g * g).sum()) for g in gradients.values()))
    factor = min(1.0, most / (norm + 1e-6))
    return norm, {name: g * factor for name, g in gradients.items()}
