"""The GPU's CTC: its formulas on any device, its kernel in Triton's interpreter or on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from brain_to_text.model import gpu_ctc
from support import reference_float64 as reference

INTERPRETED = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
import torch
from brain_to_text.model import gpu_ctc
sys.exit(0 if gpu_ctc.works_on(torch.device("cpu")) else 1)
"""


def plain_alphas(emit: torch.Tensor, may_skip: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """The kernel's contract in tensor operations; NaN beyond a problem's frames."""
    P, T, S = emit.shape
    out = torch.full_like(emit, torch.nan)
    lowest = torch.full((P, 2), -torch.inf, dtype=emit.dtype)
    now = emit[:, 0].masked_fill(torch.arange(S) >= 2, -torch.inf)
    out[:, 0] = now
    for t in range(1, T):
        padded = torch.cat([lowest, now], 1)
        two = padded[:, :-2].masked_fill(~may_skip, -torch.inf)
        now = torch.stack([now, padded[:, 1:-1], two]).logsumexp(0) + emit[:, t]
        out[:, t] = torch.where((t < frames).unsqueeze(1), now, torch.nan)
    return out


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_ctc, "alphas", plain_alphas)


CASES = [
    (14, [3, 1, 4, 1, 5], 5),
    (11, [2, 2, 2, 6, 0], 4),
    (9, [5, 5, 5, 5, 5], 5),  # exactly as many frames as five equal labels need
    (6, [0, 0, 0, 0, 0], 0),
    (1, [4, 0, 0, 0, 0], 1),
]


def problem(dtype: torch.dtype):
    scores = torch.randn(5, 14, 7, dtype=dtype, generator=torch.Generator().manual_seed(1))
    frames, labels, lengths = (list(column) for column in zip(*CASES, strict=True))
    return scores, torch.tensor(labels), torch.tensor(frames), torch.tensor(lengths)


def test_losses_and_gradients_agree_with_the_reference(plain: None) -> None:
    scores, labels, frames, lengths = problem(torch.float64)
    fast, slow = scores.clone().requires_grad_(True), scores.clone().requires_grad_(True)
    found = gpu_ctc.ctc_nll_without_waiting(fast.log_softmax(-1), labels, frames, lengths)
    expected = torch.stack(
        [
            reference.ctc(slow[b, : frames[b]].log_softmax(1), labels[b, : lengths[b]].tolist())
            for b in range(5)
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(fast.grad, slow.grad, rtol=0, atol=1e-12)


def test_the_gradient_does_not_assume_normalised_input(plain: None) -> None:
    """Unlike torch's: the gradient of the formula, checked by differences."""
    log_probs = torch.randn(2, 6, 4, dtype=torch.float64).requires_grad_(True)
    labels, frames, lengths = torch.tensor([[1, 1], [3, 0]]), torch.tensor([6, 4]), [2, 1]
    assert torch.autograd.gradcheck(
        lambda p: gpu_ctc.ctc_nll_without_waiting(p, labels, frames, torch.tensor(lengths)),
        (log_probs,),
    )


def test_an_infeasible_trial_is_infinite_and_spoils_its_own_gradient_alone(plain: None) -> None:
    scores, labels, frames, lengths = problem(torch.float32)
    frames[2] = 8
    scores.requires_grad_(True)
    found = gpu_ctc.ctc_nll_without_waiting(scores.log_softmax(-1), labels, frames, lengths)
    assert found.isinf().tolist() == [False, False, True, False, False]
    found.sum().backward()
    assert scores.grad.isnan().any((1, 2)).tolist() == [False, False, True, False, False]


def test_torchs_own_agrees_in_float32(plain: None) -> None:
    scores, labels, frames, lengths = problem(torch.float32)
    log_probs = scores.log_softmax(-1)
    found = gpu_ctc.ctc_nll_without_waiting(log_probs, labels, frames, lengths)
    own = F.ctc_loss(log_probs.transpose(0, 1), labels, frames, lengths, reduction="none")
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_agrees_in_tritons_interpreter() -> None:
    code = str(Path(gpu_ctc.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([code, *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_the_kernel_agrees_on_the_gpu() -> None:
    assert gpu_ctc.works_on(torch.device("cuda:0"))


def test_without_triton_torchs_own_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_ctc, "triton", None)
    gpu_ctc.works_on.cache_clear()
    assert not gpu_ctc.works_on(torch.device("cpu"))
    gpu_ctc.works_on.cache_clear()
