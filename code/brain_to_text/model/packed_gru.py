"""torch's GRU over packed frames: one call for all layers, whose dropout is a function of a seed.

`torch.nn.GRU` with dropout on a GPU makes cuDNN's dropout state anew after every `manual_seed`, and
waits for the device to do so. Here a few states are made once, and a copy of one of them is given
to the same call (`torch._cudnn_rnn`), so that cuDNN has all layers at once and can overlap them
(arXiv 1604.01946). Where cuDNN does not compute, torch's own GRU does, dropout included.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import _VF, nn

GRU_MODE, WEIGHTS_PER_LAYER = 3, 4  # cuDNN's number for it; matrices and biases of a layer
DROPOUT_STATES = 32  # some 4 MB each on an H100; a step takes one of them
CHECK_BOUND = 0.05  # of the norm; rounding to 8 bits of mantissa gives 0.01


def packed_gru(
    frames: torch.Tensor, batch_sizes: torch.Tensor, states: torch.Tensor, gru: nn.GRU
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `gru(PackedSequence(frames, batch_sizes), states)` gives, in autocast's type.

    torch's autocast itself would call cuDNN in float16 whatever type it was set to
    (aten/src/ATen/cudnn/AutocastRNN.cpp): bfloat16 would get float16's range, without a loss scale.

    Args:
        frames: [N, inputs], sorted by time, then by trial, longest trial first.
        batch_sizes: [T'] trials that have a frame at each time; on the CPU.
        states: [layers * directions, B, H] initial states in packed order.
        gru: whose weights, dropout and training mode to use.

    Returns:
        (outputs of the last layer [N, H * directions], last states [layers * directions, B, H]).
    """
    kind = frames.device.type
    dtype = frames.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    dropout = gru.dropout if gru.training else 0.0
    weights: list[torch.Tensor] = [w for layer in gru.all_weights for w in layer]
    frames, states = frames.to(dtype), states.to(dtype)
    with torch.autocast(kind, enabled=False):
        if not cudnn_computes(frames):
            return _VF.gru(
                frames,
                batch_sizes,
                states,
                [weight.to(dtype) for weight in weights],
                True,  # has biases
                gru.num_layers,
                dropout,
                gru.training,
                gru.bidirectional,
            )
        # For every type but float16 torch lets cuDNN's RNN use tensor cores by this flag alone
        # (aten/src/ATen/cudnn/Descriptors.h), and reads it again on the way back. Only the GRU uses
        # cuDNN here.
        half = dtype in (torch.bfloat16, torch.float16)
        torch.backends.cudnn.allow_tf32 = half or torch.backends.cuda.matmul.allow_tf32
        weights, buffer = in_one_buffer(weights, dtype, gru)
        outputs, last, *_ = torch._cudnn_rnn(
            frames,
            weights,
            WEIGHTS_PER_LAYER,
            buffer,
            states,
            None,  # no cell states
            GRU_MODE,
            gru.hidden_size,
            0,  # no projections
            gru.num_layers,
            False,  # packed, so not batch first
            dropout,
            gru.training,
            gru.bidirectional,
            batch_sizes.tolist(),
            dropout_state(dropout, frames.device) if dropout > 0 else None,
        )
        return outputs, last


def cudnn_computes(frames: torch.Tensor) -> bool:
    """Whether cuDNN has a GRU for this device; `reason_against` asks whether for a type, too."""
    cudnn = torch.backends.cudnn
    return frames.is_cuda and cudnn.enabled and cudnn.is_available()


@cache
def reason_against(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the GRU is not computed in `dtype` on that GPU; None where it is right, there and back.

    A small one is held against float32 on the CPU, once per device, which waits for it. Before
    compute capability 8.0 (T4) torch would emulate bfloat16, and compute one frame at a time.
    """
    native = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == torch.bfloat16 and not native:
        return f"{torch.cuda.get_device_name(device)} has none"
    sizes = torch.tensor([6, 6, 5, 3, 1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gru = nn.GRU(24, 64, 2, batch_first=True)
        frames, states = torch.randn(int(sizes.sum()), 24), torch.randn(2, 6, 64)

    def results(on: torch.device, kind: torch.dtype) -> list[torch.Tensor]:
        inputs = frames.to(on).requires_grad_()
        with torch.autocast(on.type, dtype=kind, enabled=kind != torch.float32):
            hidden, _ = packed_gru(inputs, sizes, states.to(on), gru.to(on))
        gradients = torch.autograd.grad(hidden.float().square().sum(), [inputs, *gru.parameters()])
        return [values.detach().float().cpu() for values in (hidden, *gradients)]

    expected = results(torch.device("cpu"), torch.float32)
    try:
        found = results(device, dtype)
    except RuntimeError as error:
        return f"cuDNN's GRU fails in it: {' '.join(str(error).split())[:300]}"
    difference = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
    if not difference < CHECK_BOUND:
        return f"cuDNN's GRU in it differs from float32's by {difference:.0%}"
    return None


def dropout_state(dropout: float, device: torch.device) -> torch.Tensor:
    """cuDNN's generators for one call; torch's generator of the CPU chooses which.

    After `torch.manual_seed` the call drops what it dropped after the same seed before.
    """
    number = int(torch.randint(DROPOUT_STATES, ()))
    return dropout_states(dropout, device)[number].clone()  # cuDNN changes it as it draws


@cache
def dropout_states(dropout: float, device: torch.device) -> torch.Tensor:
    """[32, bytes] of seeds 0 to 31; making one is slow (aten/src/ATen/cudnn/Descriptors.h)."""
    make = partial(torch._cudnn_init_dropout_state, dropout, True)
    states = [make(seed, dtype=torch.uint8, device=device) for seed in range(DROPOUT_STATES)]
    return torch.stack(states)


def in_one_buffer(
    weights: Sequence[torch.Tensor], dtype: torch.dtype, gru: nn.GRU
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Copies of the weights as cuDNN wants them in memory, and the memory itself.

    The memory is None where cuDNN leaves gaps between weights: torch then copies them there.
    """
    shapes = tuple(tuple(weight.shape) for weight in weights)
    offsets = cudnn_offsets(shapes, dtype, weights[0].device, gru.num_layers, gru.bidirectional)
    order = sorted(range(len(weights)), key=lambda i: offsets[i])
    flat = torch.cat([weights[i].flatten() for i in order]).to(dtype)
    copies, end, no_gaps = list(weights), 0, True
    for i, copy in zip(order, flat.split([weights[i].numel() for i in order]), strict=True):
        copies[i] = copy.view_as(weights[i])
        no_gaps, end = no_gaps and offsets[i] == end, end + copy.numel()
    return copies, flat.detach() if no_gaps else None


@cache
def cudnn_offsets(
    shapes: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    device: torch.device,
    layers: int,
    bidirectional: bool,
) -> tuple[int, ...]:
    """Where cuDNN looks for each weight, in values from the first; asked of it once."""
    like = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    with torch.no_grad():
        torch._cudnn_rnn_flatten_weight(
            like,
            WEIGHTS_PER_LAYER,
            shapes[0][1],  # inputs
            GRU_MODE,
            shapes[1][1],  # units
            0,  # no projections
            layers,
            False,  # batch first
            bidirectional,
        )
    return tuple(int(weight.storage_offset()) for weight in like)
