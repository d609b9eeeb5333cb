"""More than one process: what it costs here, what it should give on GPUs, what the cache gains.

    python tests/benchmarks/bench_scaling.py               # 2 gloo processes on this machine
    python tests/benchmarks/bench_scaling.py --overhead    # distributed path, world size 1
    python tests/benchmarks/bench_scaling.py --overhead --device cuda --units 1024 --layers 5 \\
        --batch-size 48 --bins 850 --rounds 50             # the same on a GPU (NCCL)
    python tests/benchmarks/bench_scaling.py --plan        # model: 1 to 64 GPUs of four types
    python tests/benchmarks/bench_scaling.py --cache       # one cache per host or per process

Contenders take turns in one run; a figure is the median over rounds. `--plan` and `--cache` are
arithmetic and simulation, not measurements.
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "code"), str(HERE)]

from brain_to_text.config import TrainingConfig, load_config
from brain_to_text.launch.pricing import (
    ASSUMED_UTILISATION,
    STEP_OVERHEAD_SECONDS,
    Gpu,
    gpu_of,
    hourly_price,
    instance_type,
    step_tflop,
)
from brain_to_text.streaming.batch_plan import BatchPlan, shard

CONFIG = HERE.parents[1] / "code" / "rnn_args_diphone_sagemaker.yaml"

# --- the plan: all-reduce of the gradients after a backward pass of the estimated length ----------


@dataclass(frozen=True)
class Network:
    """Bus bandwidth of an all-reduce in GB/s, as nccl-tests defines it: inside one machine, between
    two, between more; and of plain TCP, which is what an image without the EFA plugin gets."""

    inside: float
    two: float
    more: float
    tcp: float
    memory: float  # GB/s of the GPU, for packing gradients into one buffer
    source: str


# Share of the link's rate that an all-reduce between machines reached: p4d, 4 machines, 29.6 of
# 50 GB/s (github.com/NVIDIA/nccl/issues/527, comment of 2022-07-25). Used where nothing was found.
LINK_SHARE = 29.6 / 50
# Plain TCP: NCCL's socket transport, assumed at half the link and at most 100 Gbit/s (one network
# card without EFA); nothing was measured.
TCP_SHARE, TCP_MOST = 0.5, 12.5
PCIE = 8.0  # assumed: PCIe 4 through host memory, no peer-to-peer; no published figure was found


def of_link(gigabits: float) -> tuple[float, float, float]:
    """(two, more, tcp) from a link's rate alone."""
    share = gigabits / 8 * LINK_SHARE
    return share, share, min(TCP_SHARE * gigabits / 8, TCP_SHARE * TCP_MOST)


NETWORKS = {
    "ml.g5.12xlarge": Network(PCIE, *of_link(40), 600, "inside assumed; link 40 Gbit/s x share"),
    "ml.g5.48xlarge": Network(PCIE, *of_link(100), 600, "inside assumed; link 100 Gbit/s x share"),
    "ml.p4d.24xlarge": Network(230.8, 57.2, 29.6, of_link(400)[2], 1555, "nccl issue 527, 2022-07"),
    "ml.p5.48xlarge": Network(
        480, *of_link(3200), 3350, "inside: GTC S62129 in nccl issue 1374, 2024-07; link x share"
    ),
}
LATENCY_SECONDS = 70e-6  # 2 x p5, small messages: aws-k8s-tester pull request 585, 2025-02-19
WORLDS = (1, 4, 8, 16, 32, 64)
STEPS = 150_000


def gradient_bytes(config: TrainingConfig, bytes_per_value: int) -> int:
    """What travels each step: everything but day layers, and those of one batch's sessions."""
    model = config.model
    width, units = model.n_input_features, model.n_units
    first = width * model.patch_size
    gru = 3 * units * (first + units + 2)
    gru += (model.n_layers - 1) * 3 * units * (2 * units + 2)
    classifier = (units + 1) * config.dataset.n_classes
    days = config.dataset.days_per_batch * (width + 1) * width
    return (gru + classifier + units + days) * bytes_per_value


def compute_seconds(
    config: TrainingConfig, gpu: Gpu, trials: float, overhead: float = STEP_OVERHEAD_SECONDS
) -> float:
    """The launcher's estimate for one GPU and `trials` of the batch (not measured)."""
    tflop = step_tflop(config) * trials / config.dataset.batch_size
    return tflop / (ASSUMED_UTILISATION * gpu.tflops) + overhead


def exchange_seconds(config: TrainingConfig, name: str, gpus: int, half: bool, efa: bool) -> float:
    """Packing, all-reduce, unpacking; nothing of it overlaps with the backward pass, because cuDNN
    hands over the gradients of all GRU layers at once, at its end."""
    if gpus == 1:
        return 0.0
    network, per_machine = NETWORKS[name], instance_type(name).gpus
    machines = math.ceil(gpus / per_machine)
    between = network.two if machines == 2 else network.more
    bus = network.inside if machines == 1 else (between if efa else network.tcp)
    bus = min(bus, network.inside)
    sent = gradient_bytes(config, 2 if half else 4)
    packing = 4 * gradient_bytes(config, 4) / (network.memory * 1e9)  # two copies, read and write
    hops = LATENCY_SECONDS * (1 + math.log2(machines))
    return packing + 2 * (gpus - 1) / gpus * sent / (bus * 1e9) + hops


def batch_for(config: TrainingConfig, name: str, exchange: float, efficiency: float) -> int:
    """Trials per GPU from which arithmetic alone is `efficiency` of the step."""
    gpu = gpu_of(name)
    assert gpu is not None
    needed = exchange * efficiency / (1 - efficiency)
    return max(1, math.ceil(needed / compute_seconds(config, gpu, 1, overhead=0)))


def print_plan() -> None:
    config = load_config(CONFIG)
    full, half = (gradient_bytes(config, n) / 1e6 for n in (4, 2))
    print(f"Gradients of a step: {full:.0f} MB as float32, {half:.0f} MB as bfloat16.")
    print("\n| type | GPUs | exchange, ms: float32, bfloat16, float32 by TCP ", end="")
    print("| efficiency at 48 trials per GPU, likewise | the same without launch overhead ", end="")
    print("| trials per GPU for 80 %, 90 % | 150,000 steps of 48 trials: h, $ ", end="")
    print("| of the 80 % batch: trials, h, $ |")
    print("|---|---|---|---|---|---|---|---|")
    for name in NETWORKS:
        row = instance_type(name)
        assert row is not None
        for gpus in WORLDS:
            if gpus == 1 or gpus >= row.gpus:
                print(plan_row(config, name, gpus))
    print("\nAll-reduce bus bandwidth in GB/s, and where it comes from:")
    for name, network in NETWORKS.items():
        print(
            f"  {name}: {network.inside:.0f} inside, {network.two:.1f} between two machines, "
            f"{network.more:.1f} between more, {network.tcp:.1f} by TCP; {network.source}"
        )


def plan_row(config: TrainingConfig, name: str, gpus: int) -> str:
    gpu, row = gpu_of(name), instance_type(name)
    assert gpu is not None and row is not None
    exchanges = [
        exchange_seconds(config, name, gpus, half, efa)
        for half, efa in ((False, True), (True, True), (False, False))
    ]
    cells = [name.removeprefix("ml."), str(gpus), ", ".join(f"{1e3 * s:.1f}" for s in exchanges)]
    for overhead in (STEP_OVERHEAD_SECONDS, 0.0):
        step = compute_seconds(config, gpu, 48, overhead)
        cells.append(", ".join(f"{100 * step / (step + seconds):.0f} %" for seconds in exchanges))
    batches = [batch_for(config, name, exchanges[0], share) for share in (0.8, 0.9)]
    cells.append(", ".join(map(str, batches)) if gpus > 1 else "-")
    price, machines = hourly_price(name)[0], math.ceil(gpus / row.gpus)

    def run(per_gpu: float) -> str:
        hours = STEPS * (compute_seconds(config, gpu, per_gpu) + exchanges[0]) / 3600
        return f"{hours:.1f}, " + ("?" if price is None else f"{hours * price * machines:,.0f}")

    cells.append(run(48 / gpus))
    cells.append(f"{gpus * batches[0]:,}, {run(batches[0])}" if gpus > 1 else "-")
    return f"| {' | '.join(cells)} |"


# --- the cache: where a host's processes keep trials ----------------------------------------------


def print_cache(trials: int = 10_774, sessions: int = 45, draws: int = 72_000) -> None:
    """Hit rate and balance of three ways to keep trials on one host, on the plan's own draws."""
    rng = np.random.default_rng(0)
    lengths = np.clip(850 * rng.lognormal(-0.06, 0.35, trials), 60, 2500).astype(np.int64)
    by_session = np.array_split(np.arange(trials), sessions)
    print(f"{trials:,} trials; {draws:,} draws fill the cache of the host, {draws:,} are counted\n")
    print("| ranks | batch | cache / data | own cache per rank | a home rank per trial ", end="")
    print("| one cache per host | longest rank / mean: by length, by home |")
    print("|---|---|---|---|---|---|---|")
    for ranks, batch in ((4, 48), (8, 48), (8, 384)):
        plan, steps = BatchPlan(by_session, batch, 4, seed=1), draws // batch
        drawn = [plan.trials(step) for step in range(2 * steps)]
        by_length = [parts(trial, lengths, ranks, shard_by_length) for trial in drawn]
        by_home = [parts(trial, lengths, ranks, shard_by_home) for trial in drawn]
        for share in (0.25, 0.5, 1.0):
            budget = share * lengths.sum()
            own = hit_rate(by_length, lengths, [budget / ranks] * ranks, steps)
            home = hit_rate(by_home, lengths, [budget / ranks] * ranks, steps, home_only=True)
            one = hit_rate([[np.concatenate(b)] for b in by_length], lengths, [budget], steps)
            print(
                f"| {ranks} | {batch} | {share:.2f} | {100 * own:.1f} % | {100 * home:.1f} % "
                f"| {100 * one:.1f} % | {balance(by_length, lengths):.3f}, "
                f"{balance(by_home, lengths):.3f} |"
            )


def parts(
    trials: np.ndarray, lengths: np.ndarray, ranks: int, assign: Callable[..., list[np.ndarray]]
) -> list[np.ndarray]:
    return assign(trials, lengths[trials], ranks)


def shard_by_length(trials: np.ndarray, lengths: np.ndarray, ranks: int) -> list[np.ndarray]:
    return [shard(trials, lengths, rank, ranks) for rank in range(ranks)]


def shard_by_home(trials: np.ndarray, lengths: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Each trial to its home (a hash) while there is room, the rest to the emptiest rank."""
    least, remainder = divmod(len(trials), ranks)
    room = [least + (r < remainder) for r in range(ranks)]
    bins, found, left = [0] * ranks, [[] for _ in range(ranks)], []
    for place in np.argsort(-lengths, kind="stable"):
        home = home_of(int(trials[place]), ranks)
        if room[home]:
            room[home] -= 1
            bins[home] += int(lengths[place])
            found[home].append(int(trials[place]))
        else:
            left.append(place)
    for place in left:
        rank = min((r for r in range(ranks) if room[r]), key=lambda r: bins[r])
        room[rank] -= 1
        bins[rank] += int(lengths[place])
        found[rank].append(int(trials[place]))
    return [np.array(f, np.int64) for f in found]


def home_of(trial: int, ranks: int) -> int:
    return (trial * 2_654_435_761) % 2**32 * ranks >> 32


def hit_rate(
    steps: list[list[np.ndarray]],
    lengths: np.ndarray,
    budgets: list[float],
    warm: int,
    home_only: bool = False,
) -> float:
    """Share of distinct trials found, after `warm` steps; what comes first stays."""
    kept: list[set[int]] = [set() for _ in budgets]
    used = [0.0] * len(budgets)
    hits = asked = 0
    for step, shares in enumerate(steps):
        for rank, share in enumerate(shares):
            for trial in set(share.tolist()):
                found = trial in kept[rank]
                if step >= warm:
                    hits, asked = hits + found, asked + 1
                if found or (home_only and home_of(trial, len(budgets)) != rank):
                    continue
                if used[rank] + lengths[trial] <= budgets[rank]:
                    kept[rank].add(trial)
                    used[rank] += lengths[trial]
    return hits / asked


def balance(steps: list[list[np.ndarray]], lengths: np.ndarray) -> float:
    """Mean over steps of the longest rank's bins over the mean rank's: what the others wait for."""
    sums = np.array([[lengths[share].sum() for share in shares] for shares in steps])
    return float((sums.max(1) / sums.mean(1)).mean())


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
    from bench_step import Ours, finish, synthetic_batch
    from brain_to_text.training.distributed import GradientSum, World

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
        own = config.__class__(**vars(config))
        own.dataset = config.dataset.__class__(**{**vars(config.dataset), "batch_size": batch_size})
        batches = [synthetic_batch(own, args.bins, "equal", seed, device) for seed in range(2)]
        torch.manual_seed(0)
        ours = Ours(own, device)
        if group is not None:
            gradients = GradientSum(ours.model, group, args.compression)
            ours.step.after_backward = lambda batch: gradients.finish(
                {int(day) for day in batch.day_indices}
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
    parser.add_argument("--cache", action="store_true")
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--units", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--bins", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compression", default="none", choices=("none", "bfloat16"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plan:
        print_plan()
    elif args.cache:
        print_cache()
    elif args.worker:
        work(args)
    else:
        return start_workers(sys.argv[1:], 1 if args.overhead else 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
