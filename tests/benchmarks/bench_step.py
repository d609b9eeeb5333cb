"""Time a training step against the recipe in plain PyTorch, or count what it asks of a GPU.

    python tests/benchmarks/bench_step.py                          # sized for a CPU
    python tests/benchmarks/bench_step.py --config code/rnn_args_diphone_sagemaker.yaml
    python tests/benchmarks/bench_step.py --device cuda --n-units 1024 --batch-size 48
    python tests/benchmarks/bench_step.py --counts                 # launches, waits, copies, memory

Any key of the configuration can be given beside it (--rnn-dropout 0, --use-amp false); a schedule
of the phoneme weight counts as no schedule. Contenders take turns; a figure is the median over
rounds of the time with everything that was started also finished. Trials are noise: a step's time
does not depend on what is in it.
"""

# ruff: noqa: E402  (the library's folder comes first on the path)

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "code"), str(HERE.parent), str(HERE)]

from brain_to_text.config import TrainingConfig
from brain_to_text.config_reader import load_config, resolve_key, split_overrides
from brain_to_text.gpus import MEAN_BINS, n_frames, training_flops
from brain_to_text.model.device import allow_tf32, autocast_dtype, peak_flops
from brain_to_text.model.rnn_model import GRUDecoder
from brain_to_text.model.train_step import TrainStep
from brain_to_text.streaming.batch import Batch
from plain_recipe import PlainDecoder, PlainStep

FOR_A_CPU = {"n_classes": 1681, "n_units": 512, "n_layers": 3, "batch_size": 16}
LABELS_PER_BIN = 58 / MEAN_BINS  # self-loop labels of a mean trial
N_SESSIONS = 4
SIGMA = 0.35  # of lognormal lengths: 5th to 95th percentile 0.53 to 1.67 of the mean


def synthetic_batch(
    config: TrainingConfig, bins: int, lengths: str, seed: int, device: torch.device
) -> Batch:
    """Trials of `bins` bins each ('equal'), or lognormal with that mean ('spread')."""
    random = np.random.default_rng(seed)
    B, C = config.dataset.batch_size, config.width
    n = np.full(B, bins)
    if lengths == "spread":
        drawn = bins * random.lognormal(-(SIGMA**2) / 2, SIGMA, B)
        n = np.clip(drawn, config.model.patch_size * 4, None).astype(np.int64)
    n_labels = np.maximum(2, (n * LABELS_PER_BIN).astype(np.int64))
    features = torch.zeros(B, int(n.max()), C)
    labels = torch.zeros(B, int(n_labels.max()), dtype=torch.int64)
    phonemes = labels.clone()
    for trial, (length, count) in enumerate(zip(n, n_labels, strict=True)):
        noise = random.standard_normal((length, C), dtype=np.float32)
        features[trial, :length] = torch.from_numpy(noise)
        drawn = random.integers(1, config.dataset.n_classes, count)
        labels[trial, :count] = torch.from_numpy(drawn)
        phonemes[trial, : count // 2] = torch.from_numpy(random.integers(1, 41, count // 2))
    return Batch(
        step=seed,
        features=features,
        n_time_steps=torch.from_numpy(n),
        labels=labels,
        label_lengths=torch.from_numpy(n_labels),
        phoneme_labels=phonemes,
        phoneme_lengths=torch.from_numpy(n_labels // 2),
        day_indices=torch.arange(B) * N_SESSIONS // B,
        trial_indices=torch.arange(B),
    ).to(device)


class Ours:
    """This library's step."""

    def __init__(self, config: TrainingConfig, device: torch.device) -> None:
        model = GRUDecoder(config, N_SESSIONS, for_training=True).to(device)
        self.step = TrainStep(model, config, device)
        self.objective = self.step.objective

    def whole(self, batch: Batch, k: int) -> None:
        self.step(batch, k)


class Plain:
    """The plain rendering's step."""

    def __init__(self, config: TrainingConfig, device: torch.device) -> None:
        model = PlainDecoder.of(config, N_SESSIONS).to(device)
        self.step = PlainStep(model, config, device)
        self.dtype = autocast_dtype(config, device)

    def whole(self, batch: Batch, k: int) -> None:
        self.step.training_step(batch, self.dtype)


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(
    work: Callable[[], object],
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    finish(device)
    started = clock()
    work()
    finish(device)
    return clock() - started


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(f"\n{title}")
    for row in [header, ["-" * width for width in widths], *rows]:
        first, *others = (f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True))
        print(first, *(cell.strip().rjust(len(cell)) for cell in others), sep="  ")


def compare_step(config: TrainingConfig, args: argparse.Namespace, device: torch.device) -> None:
    """Both contenders' whole step."""
    contenders = {"plain": Plain(config, device), "ours": Ours(config, device)}
    batches = [synthetic_batch(config, args.bins, args.lengths, seed, device) for seed in range(3)]
    clock = time.process_time if args.cpu_time else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for k in range(args.rounds + 1):
        for name, contender in contenders.items():
            work = lambda step=contender: step.whole(batches[k % 3], k)  # noqa: B023, E731
            times[name].append(timed(work, device, clock))
    plain, ours = (statistics.median(times[name][1:]) for name in ("plain", "ours"))
    cells = [f"{1e3 * plain:.1f}", f"{1e3 * ours:.1f}", f"{plain / ours:.2f}"]
    table("Whole step, ms", ["", "plain", "ours", "plain / ours"], [["", *cells]])
    bins = [length for batch in batches for length in batch.n_time_steps.tolist()]
    frames = sum(n_frames(config, length) for length in bins)
    flops = training_flops(config, sum(bins), frames) / len(batches)
    peak = peak_flops(device, config)
    mfu = f", MFU {100 * flops / ours / peak:.1f} %" if peak else ""
    print(f"{flops / 1e12:.3f} TFLOP per step; ours {flops / ours / 1e12:.3f} TFLOP/s{mfu}")


# --- counts ---------------------------------------------------------------------------------------


def count_step(config: TrainingConfig, args: argparse.Namespace, device: torch.device) -> None:
    """What one step asks of the device: launches, waits, copies, memory, and where its time goes.

    Without a GPU, on tensors that stand in for one: operations instead of kernels, and no times.
    """
    if device.type == "cuda":
        count_on_gpu(config, args, device)
        return
    from support.stand_in_gpu import GPU, stand_in_gpu

    with stand_in_gpu() as gpu:
        ours = Ours(config, GPU)
        batch = synthetic_batch(config, args.bins, args.lengths, 0, GPU)
        ours.whole(batch, 0)
        gpu.reset()
        ours.whole(batch, 1)
        print(f"no GPU: {sum(gpu.operations.values())} operations on a stand-in for one")
        rows = [[name, str(n)] for name, n in gpu.operations.most_common(12)]
        rows += [[n, str(gpu.operations[n])] for n in ("_cudnn_rnn", "_cudnn_rnn_backward")]
        rows += [["bytes copied to the device", str(gpu.bytes_sent)]]
        rows += [["waits of the host", str(sum(gpu.waits.values()))]]
        rows += [[f"  {what} at {where}", str(n)] for (what, where), n in gpu.waits.items()]
    table("One step", ["of", "count"], rows)


def profiled(work: Callable[[], object], device: torch.device) -> tuple[Any, list[Any]]:
    """The profiler after `work`, and its events on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        finish(device)
    return seen, [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def count_on_gpu(config: TrainingConfig, args: argparse.Namespace, device: torch.device) -> None:
    ours = Ours(config, device)
    batches = [synthetic_batch(config, args.bins, args.lengths, seed, device) for seed in range(3)]
    for k in range(8):
        ours.whole(batches[k % 3], k)
    finish(device)
    started = time.perf_counter()
    for k in range(args.rounds):
        ours.whole(batches[k % 3], k)
    launched = time.perf_counter() - started
    finish(device)
    whole = time.perf_counter() - started
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        ours.whole(batches[0], 98)
    torch.cuda.set_sync_debug_mode("default")
    seen, events = profiled(lambda: ours.whole(batches[0], 99), device)
    copies = [event for event in events if event.name.startswith(("Memcpy", "Memset"))]
    if not events:
        raise SystemExit("The profiler saw nothing on the GPU: is CUPTI usable there?")
    span = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
    busy = sum(event.self_device_time_total for event in events)
    rows = [
        ["ms per step, back to back", f"{1e3 * whole / args.rounds:.1f}"],
        ["ms until the host has launched it", f"{1e3 * launched / args.rounds:.1f}"],
        ["kernels", str(len(events) - len(copies))],
        ["copies and fills", str(len(copies))],
        ["busy, % of the step", f"{100 * busy / span:.0f}"],
        ["waits of the host", str(sum("synchroniz" in str(w.message) for w in waits))],
        ["peak memory, GB", f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f}"],
        ["reserved, GB", f"{torch.cuda.max_memory_reserved(device) / 1e9:.2f}"],
    ]
    table("One step", ["of", "count"], rows)
    print(seen.key_averages().table(sort_by="self_device_time_total", row_limit=25))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    option = parser.add_argument
    option("--config", type=Path, help="YAML; default: the recipe, sized for a CPU")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    option("--threads", type=int, help="CPU threads")
    option("--cpu-time", action="store_true", help="CPU seconds, where others share the machine")
    option("--bins", type=int, default=MEAN_BINS, help="mean trial length")
    option("--lengths", choices=["equal", "spread"], default="spread")
    option("--rounds", type=int, default=5)
    option("--counts", action="store_true", help="launches, waits, copies, memory")
    args, keys = parser.parse_known_args()
    given: dict[str, Any] = {} if args.config else dict(FOR_A_CPU)
    given |= split_overrides(keys)
    overrides = {resolve_key(name): value for name, value in given.items()}
    config = load_config(args.config, overrides | {"objective.schedule": None})
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    allow_tf32(config.allow_tf32)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"{name}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads, "
        f"{'CPU' if args.cpu_time else 'wall'} time, precision "
        f"{autocast_dtype(config, device) or torch.float32}; "
        f"{config.model.n_layers} x {config.model.n_units} units, {config.dataset.n_classes} "
        f"classes, batch {config.dataset.batch_size}, {args.bins} bins ({args.lengths})"
    )
    (count_step if args.counts else compare_step)(config, args, device)


if __name__ == "__main__":
    main()
