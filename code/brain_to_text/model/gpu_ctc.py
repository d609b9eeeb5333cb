"""CTC on a GPU without waiting for it.

torch's own CTC copies the lengths to the GPU with blocking copies (`at::tensor` in its LossCTC.cu),
so the host waits until the GPU has nothing left to do. Here one Triton kernel runs the forward
recursion over (trial, direction) and everything around it is ordinary tensor operations; the
backward recursion is the forward one on reversed time and states.

At its first use the kernel is compared with torch's CTC on the device, and left aside if it
disagrees or cannot be built there (`objective.ctc_kernel: auto`).
"""

from __future__ import annotations

import subprocess
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

try:
    import triton  # type: ignore[import-not-found]
    import triton.language as tl  # type: ignore[import-not-found]
    from triton.errors import TritonError  # type: ignore[import-not-found]
except ImportError:  # CPU builds of torch come without it
    triton = None

CHECK_BOUND = 5e-3  # largest difference from torch's CTC that float32 rounding explains


def ctc_nll_without_waiting(
    scores: torch.Tensor,
    labels: torch.Tensor,
    frame_lengths: torch.Tensor,
    label_lengths: torch.Tensor,
) -> torch.Tensor:
    """[B] negative log-likelihoods in nats, with the gradient of the formula itself.

    Args:
        scores: [B, T', 1 + L] float32 log-probabilities of the blank and of each label in turn.
        labels: [B, L] int64, zero-padded.
        frame_lengths, label_lengths: [B] int64; everything on one device.
    """
    return _CTC.apply(scores, labels, frame_lengths, label_lengths)


def label_scores(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[B, T', 1 + L] of [B, T', C]: what CTC reads, the blank and each label of the trial."""
    spoken = F.pad(labels, (1, 0)).unsqueeze(1)
    return log_probs.gather(2, spoken.expand(-1, log_probs.shape[1], -1))


class _CTC(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scores: torch.Tensor,
        labels: torch.Tensor,
        frames: torch.Tensor,
        label_lengths: torch.Tensor,
    ) -> torch.Tensor:
        B, T = scores.shape[:2]
        S = 2 * labels.shape[1] + 1
        device = scores.device
        state, time = torch.arange(S, device=device), torch.arange(T, device=device)
        last = (2 * label_lengths).unsqueeze(1)  # [B, 1] final blank
        inside = state <= last  # [B, S]
        emit = scores[:, :, :1].repeat(1, 1, S)  # blanks between, before and after the labels
        emit[:, :, 1::2] = scores[:, :, 1:]
        emit = emit.masked_fill(~inside.unsqueeze(1), -torch.inf)
        # relative to each frame's likeliest state, sums over frames stay small and so exact
        likeliest = emit.amax(2, keepdim=True)
        emit = emit - likeliest
        real_frame = time < frames.unsqueeze(1)  # [B, T]
        may_skip = torch.zeros_like(inside)  # a label may follow the one before it directly
        may_skip[:, 3::2] = labels[:, 1:] != labels[:, :-1]

        trial = torch.arange(B, device=device).view(B, 1, 1)
        mirror_state = (last - state).clamp_min(0)  # [B, S]
        mirror_time = (frames.unsqueeze(1) - 1 - time).clamp_min(0)  # [B, T]
        mirror = (trial, mirror_time.unsqueeze(2), mirror_state.unsqueeze(1))
        skip_from = (last + 2 - state).clamp(0, S - 1)
        mirrored_skip = may_skip.gather(1, skip_from) & (state >= 2) & inside
        reached = alphas(
            torch.cat([emit, emit[mirror].masked_fill(~inside.unsqueeze(1), -torch.inf)]),
            torch.cat([may_skip, mirrored_skip]),
            frames.repeat(2),
        )
        forward, backward = reached[:B], reached[B:][mirror]
        ends = forward[trial[:, :, 0], (frames - 1).clamp_min(0).unsqueeze(1)][:, 0]
        final = ends.gather(1, torch.cat([last, (last - 1).clamp_min(0)], 1))
        final[:, 1].masked_fill_(label_lengths == 0, -torch.inf)
        relative = final.logsumexp(1).masked_fill(frames == 0, -torch.inf)
        occupied = (forward + backward - emit - relative.view(B, 1, 1)).exp()
        real = inside.unsqueeze(1) & real_frame.unsqueeze(2)
        ctx.save_for_backward(torch.where(real, occupied, 0.0))
        return -relative - likeliest.squeeze(2).masked_fill(~real_frame, 0).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        share = ctx.saved_tensors[0] * -grads[0].view(-1, 1, 1)
        blank = share[:, :, ::2].sum(2, keepdim=True)
        return torch.cat([blank, share[:, :, 1::2]], 2), None, None, None


def alphas(emit: torch.Tensor, may_skip: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """Log-probability of reaching each state at each time: [P, T, S]; undefined beyond `frames`.

    Args:
        emit: [P, T, S] float32 log-probability of each state's class.
        may_skip: [P, S] whether a state can follow the one two before it.
        frames: [P] frames of each problem.
    """
    P, T, S = emit.shape
    out = torch.empty_like(emit)
    block = triton.next_power_of_2(S)
    warps = min(max(block // 64, 1), 8)
    _forward_recursion[(P,)](
        emit.contiguous(), may_skip.to(torch.int8), frames, out, T, S, BLOCK=block, num_warps=warps
    )
    return out


if triton is not None:

    @triton.jit
    def _forward_recursion(  # type: ignore[no-untyped-def]  # Triton reads annotations as types
        emit, may_skip, frames, out, T, S, BLOCK: tl.constexpr
    ):
        problem = tl.program_id(0).to(tl.int64)
        n_frames = tl.load(frames + problem)
        state = tl.arange(0, BLOCK)
        inside = state < S
        skips = tl.load(may_skip + problem * S + state, mask=inside, other=0) != 0
        row = problem * T * S + state
        lowest = float("-inf")
        now = tl.load(emit + row, mask=inside & (state < 2), other=lowest)
        tl.store(out + row, now, mask=inside)
        for _ in range(1, n_frames):
            tl.debug_barrier()  # the states of the frame before, written by other threads
            one = tl.load(out + row - 1, mask=inside & (state >= 1), other=lowest)
            two = tl.load(out + row - 2, mask=inside & skips, other=lowest)
            row += S
            emitted = tl.load(emit + row, mask=inside, other=lowest)
            most = tl.maximum(now, tl.maximum(one, two))
            most = tl.where(most == lowest, 0.0, most)
            now = tl.log(tl.exp(now - most) + tl.exp(one - most) + tl.exp(two - most))
            now = now + most + emitted
            tl.store(out + row, now, mask=inside)


@cache
def reason_against(device: torch.device) -> str | None:
    """Why the kernel cannot be used there; None where it agrees with torch's CTC.

    Decided once per device, which waits for it.
    """
    if triton is None:
        return "Triton is not installed"
    generator = torch.Generator().manual_seed(0)
    # so many states that several warps share a trial, as with real sentences
    scores = torch.randn(4, 120, 30, generator=generator).to(device).requires_grad_(True)
    labels = torch.randint(1, 30, (4, 80), generator=generator)
    labels[1, 3:6] = 7  # repeats need a blank between them
    frames, lengths = torch.tensor([120, 110, 70, 100]), torch.tensor([80, 75, 50, 0])
    log_probs, labels = scores.log_softmax(-1), labels.to(device)
    expected = F.ctc_loss(log_probs.transpose(0, 1), labels, frames, lengths, reduction="none")
    (wanted,) = torch.autograd.grad(expected.sum(), scores, retain_graph=True)
    try:
        found = ctc_nll_without_waiting(
            label_scores(log_probs, labels), labels, frames.to(device), lengths.to(device)
        )
        (gradient,) = torch.autograd.grad(found.sum(), scores)
    except (TritonError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        return f"Triton cannot build or run it here ({' '.join(str(error).split())[:300]})"
    difference = max(
        float((found / expected - 1).detach().abs().max()), float((gradient - wanted).abs().max())
    )
    if not difference < CHECK_BOUND:
        return f"its results differ from torch's by {difference:g}"
    return None
