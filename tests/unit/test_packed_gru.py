"""The GRU of packed frames: torch's on a CPU, one call of cuDNN on a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from brain_to_text.model import packed_gru as module
from brain_to_text.model.device import allow_tf32
from brain_to_text.model.packed_gru import in_one_buffer, packed_gru
from support import stand_in_gpu as stand_in
from support.training_examples import CPU
from torch.nn.utils.rnn import PackedSequence

GPU = torch.device("cuda:0")
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
on_gpu = pytest.mark.parametrize("device", [pytest.param(GPU, marks=needs_gpu)])
both_ways = pytest.mark.parametrize("bidirectional", [False, True])


def case(bidirectional: bool, dropout: float = 0.0, device: torch.device = CPU, units: int = 8):
    """A GRU of three layers, packed frames of 4 trials, their number by time, initial states."""
    torch.manual_seed(0)
    gru = torch.nn.GRU(6, units, 3, dropout=dropout, batch_first=True, bidirectional=bidirectional)
    sizes = torch.tensor([4, 4, 4, 3, 3, 1])
    states = torch.randn((6 if bidirectional else 3), 4, units, device=device)
    return gru.to(device), torch.randn(int(sizes.sum()), 6, device=device), sizes, states


def outputs_and_gradients(run, gru, frames, sizes, states) -> list[torch.Tensor]:
    """Outputs, last states, and gradients of frames, states and weights."""
    frames, states = frames.clone().requires_grad_(), states.clone().requires_grad_()
    gru.zero_grad()
    torch.manual_seed(7)
    hidden, last = run(gru, frames, sizes, states)
    (hidden.float().square().sum() + last.float().sum()).backward()
    gradients = [t.grad for t in (frames, states, *gru.parameters())]
    return [hidden.detach(), last.detach(), *gradients]


def torchs(gru, frames, sizes, states):
    packed, last = gru(PackedSequence(frames, sizes), states)
    return packed.data, last


def ours(gru, frames, sizes, states):
    return packed_gru(frames, sizes, states, gru)


@both_ways
def test_on_a_cpu_it_is_torchs_gru(bidirectional: bool) -> None:
    """Exactly, dropout and gradients included."""
    given = case(bidirectional, dropout=0.4)
    expected = outputs_and_gradients(torchs, *given)
    for a, b in zip(outputs_and_gradients(ours, *given), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=needs_gpu)])
@both_ways
def test_dropout_is_the_seeds_and_only_for_training(
    device: torch.device, bidirectional: bool
) -> None:
    gru, *rest = case(bidirectional, dropout=0.4, device=device)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(ours(gru, *rest)[0])
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[2], ours(gru, *rest)[0]), "one seed, two calls"
    gru.eval()
    torch.testing.assert_close(ours(gru, *rest)[0], torchs(gru, *rest)[0], rtol=1e-4, atol=1e-4)


BFLOAT16_BOUND = 0.05  # of the norm; 8 bits of mantissa over 6 frames and 3 layers give 0.01


def assert_near(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert float((a.float() - b).norm()) < BFLOAT16_BOUND * float(b.norm())


@pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=needs_gpu)])
@both_ways
@pytest.mark.parametrize("dropout", [0.0, 1e-12])
def test_it_computes_in_autocasts_type_and_its_gradients_reach_float32(
    device: torch.device, bidirectional: bool, dropout: float
) -> None:
    allow_tf32(False)
    given = case(bidirectional, device=device, units=64)
    expected = outputs_and_gradients(torchs, *given)
    given[0].dropout = dropout

    def under_autocast(asked: torch.dtype, gru, *rest):
        with torch.autocast(device.type, dtype=asked):
            return ours(gru, *rest)

    for asked in (torch.bfloat16, torch.float16):
        found = outputs_and_gradients(partial(under_autocast, asked), *given)
        assert found[0].dtype == asked
        assert all(gradient.dtype == torch.float32 for gradient in found[2:])
        assert_near(found, expected)


@pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=needs_gpu)])
def test_each_precision_passes_its_check(device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        module.reason_against.cache_clear()
        assert module.reason_against(dtype, device) is None


def test_a_precision_that_fails_or_is_wrong_on_the_way_back_alone_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def half_the_gradient(frames, sizes, states, gru):
        hidden, last = packed_gru(frames, sizes, states, gru)
        return (hidden + hidden.detach()) / 2 if hidden.dtype != torch.float32 else hidden, last

    def refuses(frames, sizes, states, gru):
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("cuDNN error:\n CUDNN_STATUS_NOT_SUPPORTED")
        return packed_gru(frames, sizes, states, gru)

    for broken, said in ((half_the_gradient, "by 50%"), (refuses, "CUDNN_STATUS_NOT_SUPPORTED")):
        module.reason_against.cache_clear()
        monkeypatch.setattr(module, "packed_gru", broken)
        assert said in str(module.reason_against(torch.bfloat16, CPU))
    module.reason_against.cache_clear()


# --- cuDNN (see test_stand_in_gpu too) ------------------------------------------------------------


def test_tensor_cores_stay_on_around_half_precision_whatever_float32_may_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, seen = stand_in.COMPUTED["_cudnn_rnn"], []

    def noting(*given):
        seen.append((given[0].dtype, torch.backends.cudnn.allow_tf32))
        return real(*given)

    monkeypatch.setitem(stand_in.COMPUTED, "_cudnn_rnn", noting)
    gru, frames, sizes, states = case(False)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        with stand_in.stand_in_gpu(), torch.no_grad():
            gru, frames, states = gru.to(GPU), frames.to(GPU), states.to(GPU)
            for allowed in (False, True):
                allow_tf32(allowed)
                for dtype in (torch.float32, torch.bfloat16, torch.float32):
                    ours(gru, frames.to(dtype), sizes, states)
                    assert torch.backends.cuda.matmul.allow_tf32 is allowed, "as it was"
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    exact, half = torch.float32, torch.bfloat16
    without = [(exact, False), (half, True), (exact, False)]
    assert seen == [*without, *((dtype, True) for dtype, _ in without)]


@both_ways
@pytest.mark.parametrize("gap", [0, 2])
def test_copies_lie_as_cudnn_wants_them(
    monkeypatch: pytest.MonkeyPatch, bidirectional: bool, gap: int
) -> None:
    def flatten(weights, *_) -> None:
        """Matrices of all layers first, then the biases, as cuDNN has them."""
        start, buffer = 0, torch.zeros(sum(w.numel() + gap for w in weights))
        for weight in sorted(weights, key=lambda w: -w.dim()):
            weight.set_(buffer[start : start + weight.numel()].view(weight.shape))
            start += weight.numel() + gap

    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", flatten, raising=False)
    module.cudnn_offsets.cache_clear()
    gru, *_ = case(bidirectional)
    weights = [weight for layer in gru.all_weights for weight in layer]
    copies, buffer = in_one_buffer(weights, torch.float32, gru)
    module.cudnn_offsets.cache_clear()
    assert (buffer is None) == (gap > 0), "torch is left to copy them where there are gaps"
    end = 0
    for copy in sorted(copies, key=lambda w: w.storage_offset()):
        assert copy.storage_offset() == end and copy.is_contiguous()
        end += copy.numel()
    offsets = {dim: [c.storage_offset() for c in copies if c.dim() == dim] for dim in (1, 2)}
    assert max(offsets[2]) < min(offsets[1]), "matrices before biases"
    sum((k + 1) * copy.sum() for k, copy in enumerate(copies)).backward()
    for k, (weight, copy) in enumerate(zip(weights, copies, strict=True)):
        assert torch.equal(weight, copy)
        assert torch.equal(weight.grad, torch.full_like(weight, k + 1))


@on_gpu
@both_ways
@pytest.mark.parametrize("dropout", [0.0, 1e-12])
def test_cudnn_agrees_with_torchs_own_call(
    device: torch.device, bidirectional: bool, dropout: float
) -> None:
    """At 1e-12 there is a dropout state, and nothing is dropped."""
    allow_tf32(False)
    given = case(bidirectional, device=device, units=64)
    expected = outputs_and_gradients(torchs, *given)
    given[0].dropout = dropout
    found = outputs_and_gradients(ours, *given)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@on_gpu
def test_cudnn_drops_the_share_it_is_told_to(device: torch.device) -> None:
    """Equal in distribution: two layers, the second an identity in its inputs' scale."""
    gru = torch.nn.GRU(64, 64, 2, dropout=0.25, batch_first=True).to(device)
    with torch.no_grad():
        for parameter in gru.parameters():
            parameter.zero_()
        gru.bias_ih_l0[128:] = 1.0  # the first layer gives tanh(1) / 2 everywhere
        gru.weight_ih_l1[128:] = torch.eye(64, device=device)
    frames, states = torch.zeros(256, 64, device=device), torch.zeros(2, 256, 64, device=device)
    torch.manual_seed(3)
    hidden, _ = packed_gru(frames, torch.tensor([256]), states, gru)
    assert float((hidden == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    kept = hidden[hidden != 0]
    value = torch.tanh(torch.tanh(torch.tensor(1.0)) / 2 / 0.75) / 2
    torch.testing.assert_close(kept, value.to(device).expand_as(kept), rtol=1e-3, atol=1e-3)
