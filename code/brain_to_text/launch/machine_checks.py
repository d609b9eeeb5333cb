"""Does the configuration fit the instance type: GPU generation, memory, time, storage?"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from ..config import TrainingConfig
from .account import AwsAccount
from .findings import Finding, error, warning
from .pricing import Gpu, gpu_of, instance_type, step_seconds, table
from .request import JobSettings

OLDEST_CAPABILITY = 7.5  # the image's torch wheels: T4 and newer
LONG_TRIAL_BINS = 2500  # 50 s of attempted speech: about the longest trials of the public corpus


def check_machine(
    job: JobSettings, config: TrainingConfig, account: AwsAccount
) -> Iterator[Finding]:
    """Findings about instance type, GPU memory, running time and storage volume."""
    row, gpu = instance_type(job.instance_type), gpu_of(job.instance_type)
    if row is None:
        near = difflib.get_close_matches(job.instance_type, table()["types"], n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield warning(
            "instance-unknown",
            f"Instance type {job.instance_type} is not in instance_types.yaml, so GPU, memory and "
            f"price are not checked{hint}",
        )
        return
    if gpu is None:
        yield warning(
            "instance-cpu",
            f"{row.name} has no GPU and training would take weeks: use --instance-type "
            "ml.g5.2xlarge.",
        )
    elif gpu.capability < OLDEST_CAPABILITY:
        yield error(
            "gpu-too-old",
            f"{row.name} has a {gpu.name} (compute capability {gpu.capability}) and the image "
            f"supports {OLDEST_CAPABILITY} and newer: use --instance-type ml.g4dn.xlarge or "
            "ml.g5.2xlarge.",
        )
    else:
        yield from _memory(config, gpu, row.gpus * job.instance_count)
        yield from _time(job, config)
    if row.nvme_gb and job.volume_kms_key:
        yield error(
            "volume-key",
            f"{row.name} has NVMe storage, which encrypts itself, and SageMaker refuses a volume "
            "key for it: drop --volume-kms-key.",
        )
    if row.nvme_gb and job.volume_gb > row.nvme_gb:
        yield error(
            "volume-too-large",
            f"--volume-gb is {job.volume_gb} but {row.name} has {row.nvme_gb:g} GB of NVMe "
            f"storage: ask for at most {row.nvme_gb:g}.",
        )


def memory_gib(config: TrainingConfig, n_gpus: int = 1, bins: int = LONG_TRIAL_BINS) -> float:
    """GPU memory of a step whose trials all have `bins` bins: an estimate, to within a third.

    Weights, gradients and Adam's two moments in float32; features and their augmented copies in
    float32; patches, gate activations of each GRU layer, logits with gradients.
    """
    model, dataset = config.model, config.dataset
    trials = -(-dataset.batch_size // n_gpus)
    frames = max((bins - model.patch_size) // model.patch_stride + 1, 1)
    directions = 1 + model.bidirectional
    patch = config.width * model.patch_size
    inputs = patch + (model.n_layers - 1) * model.n_units * directions
    weights = 3 * model.n_units * directions * (inputs + model.n_units * model.n_layers)
    weights += 45 * config.width**2 + model.n_units * directions * dataset.n_classes
    activation = 2 if config.use_amp else 4
    per_frame = activation * (2 * patch + 6 * model.n_layers * model.n_units * directions)
    per_frame += 4 * 4 * dataset.n_classes
    per_bin = 4 * 5 * config.width
    total = 16 * weights + trials * (frames * per_frame + bins * per_bin)
    return total / 2**30 + 0.8


def _memory(config: TrainingConfig, gpu: Gpu, n_gpus: int) -> Iterator[Finding]:
    need = memory_gib(config, n_gpus)
    batch = config.dataset.batch_size
    if need > gpu.memory_gib:
        fits = max(
            (n for n in range(1, batch) if _memory_at(config, n, n_gpus) < 0.85 * gpu.memory_gib),
            default=None,
        )
        way = f"use --batch-size {fits}" if fits else "use a GPU with more memory"
        yield error(
            "gpu-memory",
            f"A batch of {batch} long trials needs about {need:.0f} GiB and the {gpu.name} has "
            f"{gpu.memory_gib:g}: {way}.",
        )
    elif need > 0.85 * gpu.memory_gib:
        yield warning(
            "gpu-memory-tight",
            f"A batch of {batch} long trials needs about {need:.0f} of the {gpu.name}'s "
            f"{gpu.memory_gib:g} GiB: if the job runs out, use --batch-size {batch // 2}.",
        )


def _memory_at(config: TrainingConfig, batch_size: int, n_gpus: int) -> float:
    smaller = TrainingConfig(**vars(config))
    smaller.dataset = type(config.dataset)(**{**vars(config.dataset), "batch_size": batch_size})
    return memory_gib(smaller, n_gpus)


def _time(job: JobSettings, config: TrainingConfig) -> Iterator[Finding]:
    speed = step_seconds(config, job.instance_type, job.instance_count)
    if speed is None:
        return
    hours = config.num_training_batches * speed[0] / 3600
    if hours > job.max_run_hours:
        yield error(
            "max-run",
            f"The job needs about {hours:.0f} h and SageMaker would stop it after "
            f"{job.max_run_hours:g}: use --max-run-hours {2 * hours:.0f}, or fewer "
            "--num-training-batches.",
        )
    elif 1.5 * hours > job.max_run_hours:
        yield warning(
            "max-run-tight",
            f"The job needs about {hours:.0f} h and SageMaker stops it after "
            f"{job.max_run_hours:g}: --max-run-hours {2 * hours:.0f} is safer.",
        )
    if job.max_run_hours > 120 and not job.spot:
        yield warning(
            "max-run-quota",
            f"--max-run-hours is {job.max_run_hours:g} and new accounts may run jobs of 120 h at "
            "most: ask Service Quotas for a longer maximum run time first.",
        )
