"""The GRU in its possible forms: what to choose between on a GPU.

    python tests/benchmarks/bench_gru.py --device cuda        # full size: 5 x 1024, 48 trials
    python tests/benchmarks/bench_gru.py --units 32 ...       # any size; on a CPU what it has

Forward and backward on the same frames; medians of ten, contenders one after the other; on a GPU
also the kernels that the profiler counts and how long the GPU was busy. Forms of the GRU:

- one call: what a step does (`packed_gru`): all layers packed in one call of cuDNN;
- layer by layer: five calls, torch's dropout between them;
- padded, CUDA graph: one call on the padded batch, both ways replayed, so that no launch waits for
  the host.

torch never chooses cuDNN's persistent kernels for a GRU of this size (aten's RNN.cpp, get_algo).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "code"))

from bench_step import profiled, timed
from brain_to_text.model import packed_gru
from brain_to_text.model.device import allow_tf32
from brain_to_text.model.rnn_model import Packing

Work = Callable[[], object]


class Forms:
    """The forms on one batch; each makes what is to be timed, in a type."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        H, L, C = args.units, args.layers, args.inputs
        self.args, self.device = args, device
        self.gru = torch.nn.GRU(C, H, L, dropout=0.5, batch_first=True).to(device)
        self.single = [
            torch.nn.GRU(H if k else C, H, 1, batch_first=True).to(device) for k in range(L)
        ]
        lengths = torch.linspace(args.frames // 4, args.frames, args.batch_size).long()
        self.sizes = Packing.of(lengths, args.frames, device).batch_sizes
        self.states = torch.zeros(L, args.batch_size, H, device=device)
        self.frames = torch.randn(int(lengths.sum()), C, device=device)

    def one_call(self, dtype: torch.dtype) -> Work:
        return partial(self._back, dtype, lambda x: self._call(x, self.states, self.gru))

    def layer_by_layer(self, dtype: torch.dtype) -> Work:
        def forward(x: torch.Tensor) -> torch.Tensor:
            for k, layer in enumerate(self.single):
                x = self._call(F.dropout(x, 0.5) if k else x, self.states[k : k + 1], layer)
            return x

        return partial(self._back, dtype, forward)

    def graph_of_padded(self, dtype: torch.dtype) -> Work:
        args, gru = self.args, self.gru
        weights = [w for layer in gru.all_weights for w in layer]
        states, state = self.states.to(dtype), packed_gru.dropout_state(0.5, self.device)
        x = torch.randn(args.batch_size, args.frames, args.inputs, device=self.device, dtype=dtype)
        x.requires_grad_()

        def call(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
            copies, buffer = packed_gru.in_one_buffer(weights, dtype, gru)
            return torch._cudnn_rnn(
                x, copies, 4, buffer, states, None, packed_gru.GRU_MODE, args.units, 0,
                args.layers, True, 0.5, True, False, [], state,
            )[0]  # fmt: skip

        run = torch.cuda.make_graphed_callables(call, (x, *weights))
        return lambda: run(x, *weights).float().sum().backward()

    def _call(self, x: torch.Tensor, states: torch.Tensor, gru: torch.nn.GRU) -> torch.Tensor:
        return packed_gru.packed_gru(x, self.sizes, states, gru)[0]

    def _back(self, dtype: torch.dtype, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        frames = self.frames.to(dtype).requires_grad_()
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            hidden = forward(frames)
        hidden.float().sum().backward()


def row(name: str, make: Callable[[], Work], device: torch.device, rounds: int) -> None:
    """One line of milliseconds; a form that fails says why and costs no other."""
    try:
        work, counted = make(), ""
        times = [timed(work, device) for _ in range(3 + rounds)][3:]
        if device.type == "cuda":
            _, kernels = profiled(work, device)
            busy = sum(event.self_device_time_total for event in kernels) / 1e3
            counted = f"{len(kernels):6d} kernels, {busy:8.2f} ms busy"
        print(f"{name:52} {1e3 * statistics.median(times):9.2f} ms  {counted}", flush=True)
    except Exception as error:  # noqa: BLE001 - the other rows count too
        reason = (str(error).splitlines() or [""])[0]
        print(f"{name:52} failed: {type(error).__name__}: {reason[:120]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--units", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--inputs", type=int, default=7168)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--frames", type=int, default=416, help="of the longest trial")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    allow_tf32(True)
    forms = Forms(args, device)
    print(f"{vars(args)}, {len(forms.frames)} frames")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for form in (forms.one_call, forms.layer_by_layer, forms.graph_of_padded):
            if device.type == "cuda" or form != forms.graph_of_padded:
                name = f"{str(dtype).removeprefix('torch.')}: {form.__name__.replace('_', ' ')}"
                row(name, partial(form, dtype), device, args.rounds)
    if device.type == "cuda":
        make = packed_gru.dropout_states.__wrapped__  # without its cache
        row("32 dropout states", lambda: partial(make, 0.5, device), device, args.rounds)


if __name__ == "__main__":
    main()
