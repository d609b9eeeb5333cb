"""The GPU's CTC: its formulas on any device, its kernel in Triton's interpreter or on a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from brain_to_text.model import gpu_ctc
from support import reference_float64 as reference
from support.stand_in_gpu import plain_alphas
from support.training_examples import CPU

# What the kernel is asked on every machine that has Triton: (frames, labels) by trial, and how many
# classes. One process answers for all of them: the interpreter is chosen at import.
INTERPRETED = """
import json, os
os.environ["TRITON_INTERPRET"] = "1"
import torch
import torch.nn.functional as F
from brain_to_text.model import gpu_ctc

def ask(trials, classes, seed=0):
    \"\"\"Largest differences from float64, of torch's own gradient too; infinite trials.\"\"\"
    random = torch.Generator().manual_seed(seed)
    frames = torch.tensor([t for t, _ in trials])
    lengths = torch.tensor([len(l) for _, l in trials])
    labels = torch.zeros(len(trials), max(int(lengths.max()), 1), dtype=torch.int64)
    for row, (_, given) in zip(labels, trials):
        row[: len(given)] = torch.tensor(given, dtype=torch.int64)
    scores = torch.randn(len(trials), int(frames.max()), classes, generator=random)
    def run(x, ctc):
        x = x.clone().requires_grad_()
        nll = ctc(x.log_softmax(-1))
        finite = nll.detach().isfinite()
        nll.masked_select(finite).sum().backward()
        return nll.detach().double(), torch.nan_to_num(x.grad.double())[finite], finite
    def torchs(p):
        return F.ctc_loss(p.transpose(0, 1), labels, frames, lengths, reduction="none")
    def ours(p):
        scores = gpu_ctc.label_scores(p, labels)
        return gpu_ctc.ctc_nll_without_waiting(scores, labels, frames, lengths)
    exact, exact_gradient, feasible = run(scores.double(), torchs)
    found, gradient, finite = run(scores, ours)
    _, torch_gradient, _ = run(scores, torchs)
    return {
        "value": float((found / exact - 1)[feasible].abs().max()) if feasible.any() else 0.0,
        "gradient": float((gradient - exact_gradient).abs().max()) if feasible.any() else 0.0,
        "torch": float((torch_gradient - exact_gradient).abs().max()) if feasible.any() else 0.0,
        "infinite": [finite.logical_not().tolist(), feasible.logical_not().tolist()],
    }

draw = torch.Generator().manual_seed(1)
def some(n, classes):
    return torch.randint(1, classes, (n,), generator=draw).tolist()
print(json.dumps({
    "a step of the diphone configuration": ask(
        [(40 + b, some(4 + b, 1681)) for b in range(6)], 1681),
    "one frame": ask([(1, []), (1, [3]), (1, [3, 4])], 7),
    "no labels": ask([(9, []), (4, [])], 7),
    "repeats": ask([(9, [5] * 5), (8, [5] * 5), (11, [2, 2, 2, 6]), (9, [1, 1, 2, 2, 2, 3])], 7),
    "301 states": ask([(165, some(150, 30))], 30),
    "reason against": gpu_ctc.reason_against(torch.device("cpu")),
}))
"""


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


def ours(log_probs, labels, frames, lengths) -> torch.Tensor:
    scores = gpu_ctc.label_scores(log_probs, labels)
    return gpu_ctc.ctc_nll_without_waiting(scores, labels, frames, lengths)


def test_losses_and_gradients_agree_with_the_reference(plain: None) -> None:
    scores, labels, frames, lengths = problem(torch.float64)
    fast, slow = scores.clone().requires_grad_(True), scores.clone().requires_grad_(True)
    found = ours(fast.log_softmax(-1), labels, frames, lengths)
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
        lambda p: ours(p, labels, frames, torch.tensor(lengths)),
        (log_probs,),
    )


def test_an_infeasible_trial_is_infinite_and_spoils_its_own_gradient_alone(plain: None) -> None:
    scores, labels, frames, lengths = problem(torch.float32)
    frames[2] = 8
    scores.requires_grad_(True)
    found = ours(scores.log_softmax(-1), labels, frames, lengths)
    assert found.isinf().tolist() == [False, False, True, False, False]
    found.sum().backward()
    assert scores.grad.isnan().any((1, 2)).tolist() == [False, False, True, False, False]


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has no wheel for this machine"
)
def test_the_kernel_agrees_in_tritons_interpreter() -> None:
    """Values as float64's; gradients no worse than torch's own in float32; the same infinities."""
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
    answers = json.loads(done.stdout)
    assert answers.pop("reason against") is None
    for name, found in answers.items():
        assert found["value"] < 1e-6, name
        assert found["gradient"] <= max(2 * found["torch"], 1e-6), name
        ours, torchs = found["infinite"]
        assert ours == torchs, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_the_kernel_agrees_on_the_gpu() -> None:
    assert gpu_ctc.reason_against(torch.device("cuda:0")) is None


@pytest.fixture
def asked_anew() -> Iterator[None]:
    gpu_ctc.reason_against.cache_clear()
    yield
    gpu_ctc.reason_against.cache_clear()


def test_without_triton_torchs_own_is_used(
    monkeypatch: pytest.MonkeyPatch, asked_anew: None
) -> None:
    monkeypatch.setattr(gpu_ctc, "triton", None)
    assert gpu_ctc.reason_against(CPU) == "Triton is not installed"


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (lambda *_: torch.full((4,), 300.0, requires_grad=True), "differ from torch's by"),
        (lambda *_: 1 / 0, None),
    ],
)
def test_a_kernel_that_disagrees_or_cannot_be_built_is_left_aside(
    kernel, said: str | None, monkeypatch: pytest.MonkeyPatch, asked_anew: None
) -> None:
    def broken(*given: torch.Tensor) -> torch.Tensor:
        if said is None:
            raise RuntimeError("Failed to find\n C compiler.")
        return kernel(*given) * given[0].sum() / given[0].sum().detach()

    monkeypatch.setattr(gpu_ctc, "triton", gpu_ctc.triton or SimpleNamespace())
    monkeypatch.setattr(gpu_ctc, "TritonError", RuntimeError, raising=False)
    monkeypatch.setattr(gpu_ctc, "ctc_nll_without_waiting", broken)
    reason = gpu_ctc.reason_against(CPU)
    assert reason is not None and (said or "(Failed to find C compiler.)") in reason
