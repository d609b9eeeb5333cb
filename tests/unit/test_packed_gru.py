"""The CPU's GRU against torch's, forward and backward, on packed frames."""

from __future__ import annotations

import pytest
import torch
from brain_to_text.model.packed_gru import packed_gru
from torch.nn.utils.rnn import PackedSequence


@pytest.mark.parametrize("sizes", [[4, 4, 3, 3, 1], [2, 2, 2], [3], [5, 1, 1, 1]])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_outputs_states_and_every_gradient_equal_torch(sizes, layers, dtype, bound) -> None:
    torch.manual_seed(3)
    gru = torch.nn.GRU(7, 5, layers).to(dtype)
    frames = torch.randn(sum(sizes), 7, dtype=dtype, requires_grad=True)
    states = torch.randn(layers, sizes[0], 5, dtype=dtype, requires_grad=True)
    leaves = [frames, states, *gru.parameters()]
    weigh_outputs = torch.randn(sum(sizes), 5, dtype=dtype)
    weigh_states = torch.randn(layers, sizes[0], 5, dtype=dtype)

    def everything(outputs: torch.Tensor, last: torch.Tensor) -> list[torch.Tensor]:
        score = (outputs * weigh_outputs).sum() + (last * weigh_states).sum()
        return [outputs, last, *torch.autograd.grad(score, leaves)]

    fast = everything(*packed_gru(frames, torch.tensor(sizes), states, gru))
    packed, last = gru(PackedSequence(frames, torch.tensor(sizes)), states)
    for a, b in zip(fast, everything(packed.data, last), strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)


def test_dropout_between_layers_acts_in_training_alone() -> None:
    torch.manual_seed(0)
    gru = torch.nn.GRU(4, 6, 2, dropout=0.5)
    inputs = (torch.randn(6, 4), torch.tensor([2, 2, 2]), torch.zeros(2, 2, 6))
    first, second = packed_gru(*inputs, gru)[0], packed_gru(*inputs, gru)[0]
    assert not torch.equal(first, second)
    gru.eval()
    assert torch.equal(packed_gru(*inputs, gru)[0], packed_gru(*inputs, gru)[0])
