"""Where streaming meets its next limit, from one GPU to 64 machines: a small model, no data.

    python tests/benchmarks/plan_streaming.py

Assumes weak scaling (48 trials of 1.74 MB per GPU and step), the RAM cache's automatic budget with
one cache per process (each meets every trial), uniform draws (hit rate = cache / train set) and
published limits: network of the instance type, 5,500 GETs/s per S3 prefix (one prefix per session
folder, of which 4 are drawn per batch). Figures marked "cold" are those of a run's first minutes,
"steady" once caches are full.
"""

from __future__ import annotations

from dataclasses import dataclass

TRAIN_SET_GB = 14.0  # float32; half as float16
TRIAL_MB = 1.74
TRIALS_PER_GPU = 48
GETS_PER_SECOND_AND_PREFIX = 5_500  # docs.aws.amazon.com/AmazonS3, "Optimizing performance"
PREFIXES_PER_BATCH = 4
PREFETCH_GB, HEADROOM_GB, CACHE_SHARE = 2.0, 2.1, 0.75


@dataclass(frozen=True)
class Instance:
    """Figures of the EC2 instance pages; gbit is the sustained network where two are given."""

    name: str
    gpus: int
    ram_gb: float
    gbit: float
    step_seconds: float  # the model's time per step, from its arithmetic and the chip's speed


INSTANCES = (
    Instance("g4dn.xlarge", 1, 16, 5, 0.60),
    Instance("g5.2xlarge", 1, 32, 5, 0.13),
    Instance("g5.12xlarge", 4, 192, 40, 0.13),
    Instance("g5.48xlarge", 8, 768, 100, 0.13),
    Instance("p4d.24xlarge", 8, 1152, 400, 0.04),
    Instance("p5.48xlarge", 8, 2048, 3200, 0.02),
)


def hit_rate(instance: Instance, bytes_per_value: int) -> float:
    """Steady hit rate of each process's cache."""
    rest = instance.ram_gb - HEADROOM_GB - instance.gpus * PREFETCH_GB
    cache = max(0.0, CACHE_SHARE * rest / instance.gpus)
    return min(1.0, cache / (TRAIN_SET_GB * bytes_per_value / 4))


def main() -> None:
    for bytes_per_value, name in ((4, "float32"), (2, "float16")):
        print(f"\n### {name}\n")
        print("| instance | nodes | GB/s per node, cold | network GB/s | GETs/s, cold ", end="")
        print("| hit rate, steady | GB/s per node, steady | GETs/s, steady | first limit |")
        print("|---|---|---|---|---|---|---|---|---|")
        for instance in INSTANCES:
            for nodes in (1, 4, 16, 64):
                print(row(instance, nodes, bytes_per_value))


def row(instance: Instance, nodes: int, bytes_per_value: int) -> str:
    trials = instance.gpus * TRIALS_PER_GPU / instance.step_seconds  # per second and node
    cold = trials * TRIAL_MB * bytes_per_value / 4 / 1000
    network = instance.gbit / 8
    hits = hit_rate(instance, bytes_per_value)
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
        f"| {instance.name} | {nodes} | {cold:.2f} | {network:.2f} | {gets:,.0f} "
        f"| {100 * hits:.0f} % | {cold * steady:.2f} | {gets * steady:,.0f} | {first} |"
    )


if __name__ == "__main__":
    main()
