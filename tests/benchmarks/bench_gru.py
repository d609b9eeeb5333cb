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
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "code"))

from bench_step import profiled, timed
from brain_to_text.model import packed_gru
from brain_to_text.model.device import allow_tf32
from brain_to_text.model.rnn_model import Packing

Work = Callable[[], object]


class Table:
    """Rows of milliseconds; a row that fails says why and costs no other."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds = device, rounds

    def __call__(self, name: str, make: Callable[[], Work]) -> None:
        try:
            work, counted = make(), ""
            times = [timed(work, self.device) for _ in range(3 + self.rounds)][3:]
            if self.device.type == "cuda":
                _, kernels = profiled(work, self.device)
                busy = sum(event.self_device_time_total for event in kernels) / 1e3
                counted = f"{len(kernels):6d} kernels, {busy:8.2f} ms busy"
            print(f"{name:52} {1e3 * statistics.median(times):9.2f} ms  {counted}", flush=True)
        except Exception as error:  # noqa: BLE001 - the other rows count too
            said = (str(error).splitlines() or [""])[0]
            print(f"{name:52} failed: {type(error).__name__}: {said[:120]}", flush=True)


def gru_rows(row: Table, args: argparse.Namespace, device: torch.device) -> None:
    H, L, B, T, C = args.units, args.layers, args.batch_size, args.frames, args.inputs
    gru = torch.nn.GRU(C, H, L, dropout=0.5, batch_first=True).to(device)
    single = [torch.nn.GRU(H if k else C, H, 1, batch_first=True).to(device) for k in range(L)]
    lengths = torch.linspace(T // 4, T, B).long()
    packing = Packing.of(lengths, T, device)
    N, cuda = int(lengths.sum()), device.type == "cuda"
    print(f"\nGRU {L} x {H}, inputs {C}, {B} trials, {N} frames, the longest {T}")

    def given(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        frames = torch.randn(N, C, device=device, dtype=dtype).requires_grad_()
        return frames, torch.zeros(L, B, H, device=device)

    def precision(dtype: torch.dtype) -> torch.autocast:
        return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)

    def one_call(dtype: torch.dtype, dropout: float = 0.5, back: bool = True) -> Work:
        frames, states = given(dtype)

        def work() -> None:
            gru.dropout = dropout
            with precision(dtype), torch.set_grad_enabled(back):
                y, _ = packed_gru.packed_gru(frames, packing.batch_sizes, states, gru)
            if back:
                y.float().sum().backward()

        return work

    def layer_by_layer(dtype: torch.dtype) -> Work:
        frames, states = given(dtype)

        def work() -> None:
            y = frames
            with precision(dtype):
                for k, layer in enumerate(single):
                    y = F.dropout(y, 0.5) if k else y
                    y, _ = packed_gru.packed_gru(y, packing.batch_sizes, states[k : k + 1], layer)
            y.float().sum().backward()

        return work

    def graph_of_padded(dtype: torch.dtype) -> Work:
        weights = [w for layer in gru.all_weights for w in layer]
        states = torch.zeros(L, B, H, device=device, dtype=dtype)
        x = torch.randn(B, T, C, device=device, dtype=dtype).requires_grad_()
        state = packed_gru.dropout_state(0.5, device)

        def call(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
            copies, buffer = packed_gru.in_one_buffer(weights, dtype, gru)
            return torch._cudnn_rnn(
                x, copies, 4, buffer, states, None, packed_gru.GRU_MODE, H, 0, L, True, 0.5,
                True, False, [], state,
            )[0]  # fmt: skip

        run = torch.cuda.make_graphed_callables(call, (x, *weights))
        return lambda: run(x, *weights).float().sum().backward()

    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32/tf32": torch.float32}
    for name, dtype in types.items():
        row(f"{name}: one call (as in a step)", lambda d=dtype: one_call(d))
        row(f"{name}: one call, forward only", lambda d=dtype: one_call(d, back=False))
        row(f"{name}: one call, no dropout", lambda d=dtype: one_call(d, dropout=0.0))
        row(f"{name}: layer by layer", lambda d=dtype: layer_by_layer(d))
        if cuda:
            row(f"{name}: padded, CUDA graph", lambda d=dtype: graph_of_padded(d))
    if cuda:
        make = packed_gru.dropout_states.__wrapped__  # without its cache
        row("32 dropout states, once a process", lambda: lambda: make(0.5, device))


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--units", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--inputs", type=int, default=7168)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--frames", type=int, default=416, help="of the longest trial")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args(words)
    device = torch.device(args.device)
    torch.manual_seed(0)
    allow_tf32(True)
    row = Table(device, args.rounds)
    gru_rows(row, args, device)


if __name__ == "__main__":
    main()
