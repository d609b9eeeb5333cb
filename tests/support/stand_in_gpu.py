"""A GPU for machines without one: tensors that say `cuda:0` and are computed on the CPU.

What it shows: tensors of two devices in one operation, and every point at which the host would wait
for the device (reading a value, a size that depends on values, copies through memory that is not
pinned). Values are the CPU's, so a step on it can be compared with a step there; cuDNN's GRU is
torch's, its dropout a function of the state it is given. What it cannot show: kernels, times,
memory, autocast's types.
"""

from __future__ import annotations

import importlib
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("cuda", 0)
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")
HERE = __file__


FETCHES = {
    torch.Tensor.cpu: lambda values: values,
    torch.Tensor.numpy: torch.Tensor.numpy,
    torch.Tensor.tolist: torch.Tensor.tolist,
}


class OnGpu(torch.Tensor):
    """Says `cuda:0`; to torch's C++ it is a tensor without data, so that no driver is asked."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> OnGpu:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device="meta",
        )
        made.values = values.detach()
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def __repr__(self) -> str:
        return f"OnGpu({self.values})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return StandInGpu.current.run(function, args, kwargs or {})


class GeneratorOfCpu(torch.Generator):
    """Whatever device it is asked for."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        return super().__new__(cls, "cpu")


def is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "meta")


def name_of(function: Any) -> str:
    return function.overloadpacket.__name__


class StandInGpu(TorchFunctionMode):
    """Counts `waits` by (what, where in our code), `operations` and copies by name."""

    current: StandInGpu

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.operations: Counter[str] = Counter()
        self.bytes_sent = 0

    def reset(self) -> None:
        self.waits.clear()
        self.operations.clear()
        self.bytes_sent = 0

    def wait(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if "brain_to_text" in f.filename]
        where = f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""
        self.waits[what, where] += 1

    # --- what torch's own bindings would ask a driver for -----------------------------------------

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in _device_constructors() and is_gpu(kwargs.get("device")):
            kwargs["device"] = "cpu"
            self.operations[function.__name__] += 1
            return OnGpu(function(*args, **kwargs))
        if function is torch._cudnn_init_dropout_state:
            self.operations[function.__name__] += 1
            return OnGpu(torch.tensor([args[2]]))  # its seed
        if function is torch.Tensor.pin_memory:
            pinned = args[0].clone()
            pinned.is_pinned_here = True
            return pinned
        if function is torch.Tensor.to and not isinstance(args[0], OnGpu):
            device = kwargs.get("device", args[1] if len(args) > 1 else None)
            if isinstance(device, (str, torch.device)) and is_gpu(device):
                return self.send(args[0], kwargs.get("non_blocking", False))
        if function is torch.Tensor.to and isinstance(args[0], OnGpu):
            device = kwargs.pop("device", args[1] if len(args) > 1 else None)
            if isinstance(device, (str, torch.device)):
                if not is_gpu(device):
                    return self.fetch(args[0])
                args = (args[0], *args[2:])
                if not args[1:] and not kwargs.keys() - {"non_blocking", "copy"}:
                    return args[0].clone() if kwargs.get("copy") else args[0]
        if function in FETCHES and isinstance(args[0], OnGpu):
            return FETCHES[function](self.fetch(args[0]))
        if function is torch.where:  # its C++ makes a tensor without data of a number
            args = tuple(torch.tensor(a) if isinstance(a, (int, float)) else a for a in args)
        return function(*args, **kwargs)

    def send(self, tensor: torch.Tensor, non_blocking: bool) -> OnGpu:
        if tensor.dim() and not (non_blocking and getattr(tensor, "is_pinned_here", False)):
            self.wait("copy from memory that is not pinned")
        self.operations["copy to the device"] += 1
        self.bytes_sent += tensor.numel() * tensor.element_size()
        return OnGpu(tensor.detach().clone())

    def fetch(self, tensor: OnGpu) -> torch.Tensor:
        self.wait("copy to the host")
        return tensor.values.detach().clone()

    # --- operations -------------------------------------------------------------------------------

    def run(self, function, args, kwargs):
        name = name_of(function)
        self.operations[name] += 1
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        by_mask = name.startswith("index") and any(t.dtype == torch.bool for t in tensors[1:])
        if name in READS or by_mask:
            self.wait(name)
        strangers = [t for t in tensors if not isinstance(t, OnGpu) and t.dim() > 0]
        if strangers and name == "copy_":
            self.wait("copy to the host" if strangers[0] is args[0] else "copy to the device")
        elif strangers:
            raise AssertionError(f"{name} is given tensors of two devices")
        if is_gpu(kwargs.get("device")):
            kwargs = kwargs | {"device": torch.device("cpu")}
        elif kwargs.get("device") is not None:
            self.wait("copy to the host")
            return function(*tree_map(values_of, args), **tree_map(values_of, kwargs))
        own = {id(t.values): t for t in tensors if isinstance(t, OnGpu)}
        made = COMPUTED.get(name, function)(
            *tree_map(values_of, args), **tree_map(values_of, kwargs)
        )
        return tree_map(
            lambda t: own.get(id(t), OnGpu(t)) if isinstance(t, torch.Tensor) else t, made
        )


def values_of(value: Any) -> Any:
    return value.values if isinstance(value, OnGpu) else value


# --- cuDNN ----------------------------------------------------------------------------------------


def _gru(frames, weights, sizes, states, layers, dropout, train, both, state):
    with torch.random.fork_rng(devices=[]):
        if state is not None:
            torch.manual_seed(int(state[0]))
        return torch._VF.gru(
            frames, torch.tensor(sizes), states, weights, True, layers, dropout, train, both
        )


def _cudnn_rnn(
    frames, weights, stride, buffer, states, cells, mode, units, projections, layers, first,
    dropout, train, both, sizes, state,
):  # fmt: skip
    assert (stride, mode, projections, first, cells) == (4, 3, 0, False, None)
    offsets = [w.storage_offset() for w in weights]
    assert buffer is not None and buffer.numel() == sum(w.numel() for w in weights)
    assert min(offsets) == buffer.storage_offset()
    hidden, last = _gru(frames, weights, sizes, states, layers, dropout, train, both, state)
    nothing = frames.new_zeros(0)
    return hidden, last, nothing, nothing.clone(), buffer


def _cudnn_rnn_backward(
    frames, weights, stride, buffer, states, cells, outputs, by_outputs, by_last, by_cells, mode,
    units, projections, layers, first, dropout, train, both, sizes, state, reserve, mask,
):  # fmt: skip
    assert train, "cuDNN goes back through training passes alone"
    inputs = [t.detach().requires_grad_() for t in (frames, states, *weights)]

    def gradients() -> tuple[torch.Tensor | None, ...]:
        made = _gru(inputs[0], inputs[2:], sizes, inputs[1], layers, dropout, train, both, state)
        given = [(y, g) for y, g in zip(made, (by_outputs, by_last), strict=True) if g is not None]
        return torch.autograd.grad(
            [y for y, _ in given], inputs, [g for _, g in given], allow_unused=True
        )

    # a thread of its own: in this one torch has switched autograd off, below which we are
    with ThreadPoolExecutor(1) as pool:
        by_frames, by_states, *by_weights = pool.submit(gradients).result()
    return by_frames, by_states, None, by_weights


COMPUTED = {
    "_cudnn_rnn": _cudnn_rnn,
    "_cudnn_rnn_backward": _cudnn_rnn_backward,
}


def matrices_first(shapes, *_) -> tuple[int, ...]:
    """Where cuDNN has each weight."""
    offsets, end = [0] * len(shapes), 0
    for i in sorted(range(len(shapes)), key=lambda i: -len(shapes[i])):
        offsets[i], end = end, end + torch.Size(shapes[i]).numel()
    return tuple(offsets)


def _grouped(real):
    """torch's grouping of tensors by device, in which ours are on a GPU."""

    def grouped(*args, **kwargs):
        groups = real(*args, **kwargs)
        return {
            (GPU if device is not None and device.type == "meta" else device, dtype): group
            for (device, dtype), group in groups.items()
        }

    return grouped


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


@contextmanager
def stand_in_gpu() -> Iterator[StandInGpu]:
    """Within it `GPU` can be computed on."""
    from brain_to_text.model import gpu_ctc, packed_gru

    gpu = StandInGpu.current = StandInGpu()
    with pytest.MonkeyPatch.context() as patch, gpu:
        patch.setattr(torch, "Generator", GeneratorOfCpu)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
        for module in map(
            importlib.import_module, ("torch.nn.utils.clip_grad", "torch.optim.optimizer")
        ):
            real_grouping = module._group_tensors_by_device_and_dtype
            patch.setattr(module, "_group_tensors_by_device_and_dtype", _grouped(real_grouping))
        patch.setattr(packed_gru, "cudnn_computes", lambda frames: frames.is_cuda)
        patch.setattr(packed_gru, "cudnn_offsets", matrices_first)
        patch.setattr(packed_gru, "dropout_states", cache(packed_gru.dropout_states.__wrapped__))
        patch.setattr(gpu_ctc, "reason_against", lambda device: None)
        patch.setattr(gpu_ctc, "alphas", lambda *given: OnGpu(plain_alphas(*map(values_of, given))))
        yield gpu
