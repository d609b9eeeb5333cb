"""What a step should take on one GPU, and a run on 1 to 64 of four types: arithmetic alone.

    python tests/benchmarks/plan_scaling.py

Computing is `gpus.step_time`, exchanging gradients `gpus.exchange_seconds`, as the launcher
estimates them; the reference configuration with 150,000 steps.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

CODE = Path(__file__).resolve().parents[2] / "code"
sys.path.insert(0, str(CODE))

from brain_to_text.config import TrainingConfig  # noqa: E402
from brain_to_text.config_reader import load_config  # noqa: E402
from brain_to_text.gpus import GPUS, exchange_seconds, gradient_bytes, step_time  # noqa: E402
from brain_to_text.launch.pricing import (  # noqa: E402
    hourly_price,
    instance_types,
    tcp_bandwidth,
)

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
ONE_GPU = ("T4", "L4", "A10G", "L40S", "A100", "H100", "H200")
STEPS = 150_000


def print_steps(config: TrainingConfig) -> None:
    """One GPU of each kind: ms by what they are spent on."""
    print("| GPU | products, ms | recurrence | memory | launches | step, ms | 150,000 steps, h |")
    print("|---|---|---|---|---|---|---|")
    for name in ONE_GPU:
        parts = step_time(config, GPUS[name])
        cells = [f"{1e3 * seconds:.0f}" for seconds in (*vars(parts).values(), parts.total)]
        print(f"| {name} | {' | '.join(cells)} | {STEPS * parts.total / 3600:.1f} |")


def compute_seconds(config: TrainingConfig, name: str, trials: float) -> float:
    """The launcher's estimate for one GPU and `trials` of the batch."""
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


def main() -> None:
    config = load_config(CODE / "rnn_args_diphone_sagemaker.yaml")
    print_steps(config)
    print(f"\nGradients of a step: {gradient_bytes(config) / 1e6:.0f} MB.")
    print("\n| type | GPUs | exchange, ms, and by TCP | efficiency at 48 trials per GPU, ", end="")
    print("likewise | trials per GPU for 80 %, 90 % | 150,000 steps of 48 trials: h, $ ", end="")
    print("| of the 80 % batch: trials, h, $ |\n|---|---|---|---|---|---|---|")
    for name in BY_EFA:
        for gpus in WORLDS:
            if gpus == 1 or gpus >= instance_types()[name].gpus:
                print(plan_row(config, name, gpus))


if __name__ == "__main__":
    main()
