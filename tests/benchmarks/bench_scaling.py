"""More than one process: what it costs here, what it should give on GPUs.

    python tests/benchmarks/bench_scaling.py               # 2 gloo processes on this machine
    python tests/benchmarks/bench_scaling.py --overhead    # distributed path, world size 1
    python tests/benchmarks/bench_scaling.py --overhead --device cuda --units 1024 --layers 5 \\
        --batch-size 48 --bins 850 --rounds 50             # the same on a GPU (NCCL)
    python tests/benchmarks/bench_scaling.py --plan        # model: 1 to 64 GPUs of four types

Contenders take turns in one run; a figure is the median over rounds. `--plan` is
arithmetic, not a measurement.
"""

# ruff: noqa: E402  (the library's folder comes first on the path)

from __future__ import annotations

import argparse
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "code"), str(HERE)]

from brain_to_text.config import TrainingConfig
from brain_to_text.config_reader import load_config
from brain_to_text.gpus import GPUS, exchange_seconds, gradient_bytes, step_time
from brain_to_text.launch.pricing import hourly_price, instance_types, tcp_bandwidth

CONFIG = HERE.parents[1] / "code" / "rnn_args_diphone_sagemaker.yaml"

# --- the plan: all-reduce of the gradients after a backward pass of the estimated length ----------

# Share of the link's rate that an all-reduce between machines reached: p4d, 4 machines, 29.6 of
# 50 GB/s (github.com/NVIDIA/nccl/issues/527, comment of 2022-07-25). Used where nothing was found.
LINK_SHARE = 29.6 / 50
# Bus bandwidth of an all-reduce in GB/s over EFA, between two machines and between more
BY_EFA = {
    "ml.g5.12xlarge": (40 / 8 * LINK_SHARE,) * 2,
    "ml.g5.48xlarge": (100 / 8 * LINK_SHARE,) * 2,
    "ml.p4d.24xlarge": (57.2, 29.6),  # nccl issue 527, 2022-07
    "ml.p5.48xlarge": (3200 / 8 * LINK_SHARE,) * 2,
}
WORLDS = (1, 4, 8, 16, 64)
STEPS = 150_000


def compute_seconds(config: TrainingConfig, name: str, trials: float) -> float:
    """The launcher's estimate for one GPU and `trials` of the batch (not measured)."""
    return step_time(config, GPUS[str(instance_types()[name].gpu)], trials).total


def exchange(config: TrainingConfig, name: str, gpus: int, efa: bool) -> float:
    """The launcher's estimate by TCP, which is what our image has, or what EFA would take."""
    row = instance_types()[name]
    machines = math.ceil(gpus / row.gpus)
    by_efa = BY_EFA[name][0 if machines == 2 else 1]
    bandwidth = by_efa if efa else tcp_bandwidth(name)
    return exchange_seconds(config, GPUS[str(row.gpu)], gpus, machines, bandwidth)


def batch_for(config: TrainingConfig, name: str, exchange: float, efficiency: float) -> int:
    """Trials per GPU from which computing is `efficiency` of the step."""
    needed = exchange * efficiency / (1 - efficiency)
    return next(n for n in range(1, 10_000) if compute_seconds(config, name, n) >= needed)


def print_plan() -> None:
    config = load_config(CONFIG)
    print(f"Gradients of a step: {gradient_bytes(config) / 1e6:.0f} MB.")
    print("\n| type | GPUs | exchange, ms, and by TCP | efficiency at 48 trials per GPU, ", end="")
    print("likewise | trials per GPU for 80 %, 90 % | 150,000 steps of 48 trials: h, $ ", end="")
    print("| of the 80 % batch: trials, h, $ |\n|---|---|---|---|---|---|---|")
    for name in BY_EFA:
        for gpus in WORLDS:
            if gpus == 1 or gpus >= instance_types()[name].gpus:
                print(plan_row(config, name, gpus))


def plan_row(config: TrainingConfig, name: str, gpus: int) -> str:
    exchanges = [exchange(config, name, gpus, efa) for efa in (True, False)]
    cells = [name.removeprefix("ml."), str(gpus), ", ".join(f"{1e3 * s:.1f}" for s in exchanges)]
    step = compute_seconds(config, name, 48)
    cells.append(", ".join(f"{100 * step / (step + seconds):.0f} %" for seconds in exchanges))
    batches = [batch_for(config, name, exchanges[0], share) for share in (0.8, 0.9)]
    cells.append(", ".join(map(str, batches)) if gpus > 1 else "-")
    price, machines = hourly_price(name)[0], math.ceil(gpus / instance_types()[name].gpus)

    def run(per_gpu: float) -> str:
        hours = STEPS * (compute_seconds(config, name, per_gpu) + exchanges[0]) / 3600
        return f"{hours:.1f}, " + ("?" if price is None else f"{hours * price * machines:,.0f}")

    cells.append(run(48 / gpus))
    cells.append(f"{gpus * batches[0]:,}, {run(batches[0])}" if gpus > 1 else "-")
    return f"| {' | '.join(cells)} |"


# --- measured here --------------------------------------------------------------------------------


def start_workers(arguments: list[str], processes: int) -> int:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), __file__, *arguments, "--worker"]
    return subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    ).returncode


def work(args: argparse.Namespace) -> None:
    """One of the processes."""
    import torch
    import torch.distributed as dist
    from bench_step import Ours, finish, synthetic_batch, varied
    from brain_to_text.training.distributed import World, sum_gradients

    torch.set_num_threads(1)
    device = torch.device(args.device)
    config = load_config(CONFIG)
    config.model.n_units, config.model.n_layers = args.units, args.layers
    rank = int(os.environ["RANK"])
    if args.overhead:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        world = World()
    else:
        world = World.join()

    def contender(batch_size: int, group: World | None) -> Callable[[int], None]:
        own = varied(config, {"dataset.batch_size": batch_size})
        batches = [synthetic_batch(own, args.bins, "equal", seed, device) for seed in range(2)]
        torch.manual_seed(0)
        ours = Ours(own, device)
        if group is not None:
            ours.step.after_backward = lambda batch: sum_gradients(
                ours.model, group, {int(day) for day in batch.day_indices}
            )
        return lambda k: ours.whole(batches[k % 2], k)

    B = args.batch_size
    if args.overhead:
        contenders = {"plain": contender(B, None), "distributed path": contender(B, world)}
        alone = set(contenders)
    else:
        contenders = {
            "1 process, whole batch": contender(B, None),
            "2 processes, half each": contender(B // 2, world),
            "1 process, half batch": contender(B // 2, None),
        }
        alone = {"1 process, whole batch", "1 process, half batch"}
    walls: dict[str, list[float]] = {name: [] for name in contenders}
    cpus: dict[str, list[float]] = {name: [] for name in contenders}
    asked: list[float] = []
    for k in range(args.rounds + 1):
        for name, step in contenders.items():
            world.meet()
            cpu, wall = cpu_seconds(), time.perf_counter()
            if name not in alone or rank == 0:
                finish(device)
                step(k)
                finish(device)
            if k:
                walls[name].append(time.perf_counter() - wall)
                cpus[name].append(cpu_seconds() - cpu)
        world.meet()
        started = time.perf_counter()
        for _ in range(20):
            world.any(False)
        asked.append((time.perf_counter() - started) / 20)
    if rank == 0:
        parameters = sum(p.numel() for p in Ours(config, device).model.parameters())
        print(
            f"{args.layers} x {args.units} units, batch {B}, {args.bins} bins, gradients "
            f"{4e-6 * parameters:.0f} MB, {args.rounds} rounds, one thread per process"
        )
        print(f"{'':26}  wall ms  CPU ms of rank 0")
        for name in contenders:
            wall, cpu = (1e3 * statistics.median(t[name]) for t in (walls, cpus))
            print(f"{name:26}  {wall:7.1f}  {cpu:7.1f}")
        report(args, walls, cpus)
        if not args.overhead:
            print(f"asking all ranks before a step: {1e6 * statistics.median(asked):.0f} us")
    world.leave()
    if args.overhead:
        dist.destroy_process_group()


def report(args: argparse.Namespace, walls: dict, cpus: dict) -> None:
    def ratio(times: dict, one: str, other: str) -> float:
        pairs = zip(times[one], times[other], strict=True)
        return statistics.median(a / b for a, b in pairs)

    if args.overhead:
        for label, times in (("wall", walls), ("CPU", cpus)):
            print(f"distributed / plain, {label}: {ratio(times, 'distributed path', 'plain'):.3f}")
        return
    whole, two, half = walls
    print(f"strong scaling: 1 / 2 processes, same batch: {ratio(walls, whole, two):.2f} (ideal 2)")
    print(f"weak scaling: half alone / half of two: {ratio(walls, half, two):.2f} (ideal 1)")


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--units", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--bins", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plan:
        print_plan()
    elif args.worker:
        work(args)
    else:
        return start_workers(sys.argv[1:], 1 if args.overhead else 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
