"""Where streaming meets its next limit, from one GPU to 64 machines: a small model, no data.

    python tests/benchmarks/plan_streaming.py

Assumes weak scaling (48 trials of 1.74 MB per GPU), steps as long as `gpus` estimates, the RAM
cache's automatic budget with one cache per process (each meets every trial), uniform draws (hit
rate = cache / train set) and published limits: network of the instance type, 5,500 GETs/s per S3
prefix (one prefix per session folder, of which 4 are drawn per batch). Figures marked "cold" are
those of a run's first minutes, "steady" once caches are full.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

CODE = Path(__file__).resolve().parents[2] / "code"
sys.path.insert(0, str(CODE))

from brain_to_text.config_reader import load_config  # noqa: E402
from brain_to_text.gpus import GPUS, step_time  # noqa: E402
from brain_to_text.launch.pricing import instance_types  # noqa: E402

TRAIN_SET_GB = 14.0  # float32; half as float16
TRIAL_MB = 1.74
TRIALS_PER_GPU = 48
GETS_PER_SECOND_AND_PREFIX = 5_500  # docs.aws.amazon.com/AmazonS3, "Optimizing performance"
PREFIXES_PER_BATCH = 4
PREFETCH_GB, HEADROOM_GB, CACHE_SHARE = 2.0, 2.1, 0.75
# From the EC2 instance pages; the sustained rate where two are given.
GBIT = {"g4dn.xlarge": 5, "g5.2xlarge": 5, "g5.12xlarge": 40, "g5.48xlarge": 100}
GBIT |= {"p4d.24xlarge": 400, "p5.48xlarge": 3200}


def hit_rate(name: str, bytes_per_value: int) -> float:
    """Steady hit rate of each process's cache."""
    machine = instance_types()[f"ml.{name}"]
    rest = machine.ram_gib - HEADROOM_GB - machine.gpus * PREFETCH_GB
    cache = max(0.0, CACHE_SHARE * rest / machine.gpus)
    return min(1.0, cache / (TRAIN_SET_GB * bytes_per_value / 4))


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for bytes_per_value, name in ((4, "float32"), (2, "float16")):
        print(f"\n### {name}\n")
        print("| instance | nodes | GB/s per node, cold | network GB/s | GETs/s, cold ", end="")
        print("| hit rate, steady | GB/s per node, steady | GETs/s, steady | first limit |")
        print("|---|---|---|---|---|---|---|---|---|")
        for instance in GBIT:
            for nodes in (1, 4, 16, 64):
                print(row(instance, nodes, bytes_per_value))


def row(name: str, nodes: int, bytes_per_value: int) -> str:
    config = load_config(CODE / "rnn_args_diphone_sagemaker.yaml")
    machine = instance_types()[f"ml.{name}"]
    step = step_time(config, GPUS[str(machine.gpu)], TRIALS_PER_GPU).total
    trials = machine.gpus * TRIALS_PER_GPU / step  # per second and node
    cold = trials * TRIAL_MB * bytes_per_value / 4 / 1000
    network = GBIT[name] / 8
    hits = hit_rate(name, bytes_per_value)
    gets, steady = nodes * trials, 1 - hits
    capacity = GETS_PER_SECOND_AND_PREFIX * PREFIXES_PER_BATCH
    limits = {
        "network, steady": cold * steady / network,
        "S3 requests, steady": gets * steady / capacity,
    }
    cold_limits = {
        "network, while cold": cold / network,
        "S3 requests, while cold": gets / capacity,
    }
    worst = max(limits, key=lambda k: limits[k])
    if limits[worst] < 1:
        limits = cold_limits
        worst = max(limits, key=lambda k: limits[k])
    first = f"{worst} ({100 * limits[worst]:.0f} %)" if limits[worst] >= 1 else "none"
    return (
        f"| {name} | {nodes} | {cold:.2f} | {network:.2f} | {gets:,.0f} "
        f"| {100 * hits:.0f} % | {cold * steady:.2f} | {gets * steady:,.0f} | {first} |"
    )


if __name__ == "__main__":
    main()
