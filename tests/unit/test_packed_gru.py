"""The GRU of packed frames: torch's on a CPU, one call of cuDNN on a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from brain_to_text.model import packed_gru as module
from brain_to_text.model.device import allow_tf32
from brain_to_text.model.packed_gru import in_one_buffer, packed_gru
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
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_on_a_cpu_it_is_torchs_gru(bidirectional: bool, dropout: float) -> None:
    """Exactly, dropout and gradients included."""
    given = case(bidirectional, dropout)
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


# --- cuDNN ----------------------------------------------------------------------------------------


class Cudnn:
    """Stands in for the two calls of cuDNN that need a GPU: says where weights go, notes a call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gap: int = 0) -> None:
        self.calls: list[tuple] = []
        self.seeds: list[int] = []
        self.tf32: list[bool] = []
        module.cudnn_offsets.cache_clear()
        monkeypatch.setattr(module, "cudnn_computes", lambda frames: True)
        monkeypatch.setattr(torch, "_cudnn_rnn", self.rnn, raising=False)
        monkeypatch.setattr(torch, "_cudnn_init_dropout_state", self.state, raising=False)
        monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", self.flatten, raising=False)
        self.gap = gap

    def flatten(self, weights, *_) -> torch.Tensor:
        """Matrices of all layers first, then the biases, as cuDNN has them."""
        order = sorted(range(len(weights)), key=lambda i: -weights[i].dim())
        n = sum(w.numel() for w in weights) + self.gap * len(weights)
        buffer = torch.zeros(n, dtype=weights[0].dtype)
        start = 0
        for i in order:
            shape, count = weights[i].shape, weights[i].numel()
            weights[i].set_(buffer[start : start + count].view(shape))
            start += count + self.gap
        return buffer

    def state(self, dropout, training, seed, *, dtype, device) -> torch.Tensor:
        self.seeds.append(seed)
        return torch.tensor([seed % 256], dtype=dtype, device=device)

    def rnn(self, frames, weights, stride, buffer, states, cells, mode, units, *rest):
        self.calls.append((weights, buffer, mode, units, *rest))
        self.tf32.append(torch.backends.cudnn.allow_tf32)
        _, layers, _, dropout, training, both, sizes, _ = rest
        hidden, last = torch._VF.gru(
            frames, torch.tensor(sizes), states, weights, True, layers, dropout, training, both
        )
        return hidden, last, None, None, None


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Cudnn:
    return Cudnn(monkeypatch)


@both_ways
def test_all_layers_are_one_call_with_equal_results(cudnn: Cudnn, bidirectional: bool) -> None:
    given = case(bidirectional)
    expected = outputs_and_gradients(torchs, *given)
    for a, b in zip(outputs_and_gradients(ours, *given), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    ((weights, buffer, mode, units, projections, layers, *_, state),) = cudnn.calls
    assert (mode, units, projections, layers, state) == (3, 8, 0, 3, None)
    assert buffer.untyped_storage().data_ptr() == weights[0].untyped_storage().data_ptr()


def test_tensor_cores_stay_on_around_half_precision_whatever_float32_may_do(cudnn: Cudnn) -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    given = case(False)
    try:
        for allowed in (False, True):
            allow_tf32(allowed)
            ours(*given)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                ours(*given)
            assert torch.backends.cuda.matmul.allow_tf32 is allowed, "products are as they were"
            ours(*given)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    assert cudnn.tf32 == [False, True, False, True, True, True]


@both_ways
@pytest.mark.parametrize("gap", [0, 2])
def test_copies_lie_as_cudnn_wants_them(
    monkeypatch: pytest.MonkeyPatch, bidirectional: bool, gap: int
) -> None:
    Cudnn(monkeypatch, gap)
    gru, *_ = case(bidirectional)
    weights = [weight for layer in gru.all_weights for weight in layer]
    copies, buffer = in_one_buffer(weights, torch.float32, gru)
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
    module.cudnn_offsets.cache_clear()


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
