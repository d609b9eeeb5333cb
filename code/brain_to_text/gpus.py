"""GPUs, and what a training step asks of one: products, bytes, and a recurrence that is serial.

One table for the launcher's prices and the trainer's MFU; nothing here needs torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config import TrainingConfig

OLDEST_CAPABILITY = 7.5  # that the image's torch has code for (sm_75: T4)
FIRST_WITH_BFLOAT16 = 8.0  # and with TF32

MEAN_BINS = 850  # mean trial length of the public corpus, 20 ms bins
LONGEST_OVER_MEAN = 2.0  # the longest of 48 trials with lognormal lengths, sigma 0.35

UTILISATION = 0.5  # of the peak, for matrix products of these sizes; assumed
KERNEL_SECONDS = 3e-6  # of a kernel that waits for the one before it; assumed
KERNELS_PER_CELL = 2  # one product, one pass over the gates
LAUNCHES, LAUNCH_SECONDS = 235, 5e-6  # outside cuDNN, counted; of each, assumed
FEATURE_PASSES, PATCH_PASSES, LOGIT_PASSES = 16, 8, 8  # reads and writes of each in a step
PCIE = 8.0  # GB/s of an all-reduce by PCIe 4 through host memory; assumed, no figure was found
NVLINK_3, NVLINK_4 = 230.8, 480.0  # nccl issue 527, 2022-07 (A100); GTC S62129, 2024 (H100)
LATENCY_SECONDS = 70e-6  # of an all-reduce: aws-k8s-tester pull request 585, 2025-02-19
WEIGHT_BYTES = 32  # of AdamW for every weight: four read, three written, the gradient's norm


@dataclass(frozen=True)
class Gpu:
    """One device.

    Attributes:
        capability: CUDA compute capability.
        memory_gib: of one device.
        bandwidth: of its memory, GB/s.
        half, float32: dense peaks in TFLOP/s, without sparsity: of 16-bit types, of float32.
        all_reduce: bus bandwidth among the devices of one machine, GB/s, as nccl-tests defines it.
        sustained: share of the peaks that its power allows for long.
        seconds_per_step: measured with rnn_args_diphone_sagemaker.yaml (batch 48) by the command in
            tests/benchmarks/RESULTS.md; None: not measured.
    """

    capability: float
    memory_gib: float
    bandwidth: float
    half: float
    float32: float
    all_reduce: float = PCIE
    sustained: float = 1.0
    seconds_per_step: float | None = None

    @property
    def has_bfloat16(self) -> bool:
        """Else the 16-bit type is float16."""
        return self.capability >= FIRST_WITH_BFLOAT16

    def peak(self, mixed: bool, allow_tf32: bool) -> float:
        """FLOP/s of products in mixed precision, or of float32's; TF32 has half of the former."""
        exact = self.half / 2 if allow_tf32 and self.has_bfloat16 else self.float32
        return 1e12 * (self.half if mixed else exact)


# Vendor data sheets (figures quoted with sparsity are halved): NVIDIA V100, T4 (2019), A10 and
# A10G, A100, L4, L40S, H100 PCIe and SXM, H200, B200, RTX PRO 6000 (Blackwell), RTX 4090. A10G:
# AWS's figure for the G5 family (it has about half of the A10's tensor rate). T4 and L4 sustain
# about half of it at 70 W.
GPUS = {
    "V100": Gpu(7.0, 16, 900, 125.0, 15.7),
    "T4": Gpu(7.5, 16, 320, 65.0, 8.1, sustained=0.5),
    "A10G": Gpu(8.6, 24, 600, 70.0, 31.5),
    "A10": Gpu(8.6, 24, 600, 125.0, 31.2),
    "A100": Gpu(8.0, 40, 1555, 312.0, 19.5, NVLINK_3),
    "A100 80GB": Gpu(8.0, 80, 2039, 312.0, 19.5, NVLINK_3),
    "L4": Gpu(8.9, 24, 300, 121.0, 30.3, sustained=0.5),
    "L40S": Gpu(8.9, 48, 864, 362.0, 91.6),
    "H100 PCIe": Gpu(9.0, 80, 2000, 756.0, 51.0),
    "H100": Gpu(9.0, 80, 3350, 989.0, 67.0, NVLINK_4),
    "H200": Gpu(9.0, 141, 4800, 989.0, 67.0, NVLINK_4),
    "B200": Gpu(10.0, 180, 8000, 2250.0, 75.0, NVLINK_4),
    "RTX PRO 6000": Gpu(12.0, 96, 1597, 500.0, 120.0),
    "GeForce RTX 4090": Gpu(8.9, 24, 1008, 165.2, 82.6),
}


def gpu_called(name: str) -> Gpu | None:
    """The one of `GPUS` that calls itself `name`, e.g. 'Tesla T4'."""
    words = name.replace("-", " ").split()
    for known in sorted(GPUS, key=len, reverse=True):
        if all(word in words for word in known.split()):
            return GPUS[known]
    return None


def n_frames(config: TrainingConfig, n_bins: float) -> int:
    """Output frames of a trial."""
    model = config.model
    return max(int((n_bins - model.patch_size) // model.patch_stride) + 1, 0)


def frame_weights(config: TrainingConfig) -> int:
    """Weights that each output frame is multiplied with: the GRU's and the plain classifier's."""
    model, H = config.model, config.model.n_units
    directions = 2 if model.bidirectional else 1
    patch = config.width * model.patch_size
    inputs = patch + (model.n_layers - 1) * H * directions
    gru = 3 * H * directions * (inputs + model.n_layers * H)
    return gru + H * directions * config.dataset.n_classes


def gradient_bytes(config: TrainingConfig) -> int:
    """What processes exchange in a step: all but the day layers that the batch has no trial of."""
    model, width = config.model, config.width
    H, directions = model.n_units, 2 if model.bidirectional else 1
    biases = directions * model.n_layers * 6 * H + config.dataset.n_classes + directions * H
    days = config.dataset.days_per_batch * (width + 1) * width
    return 4 * (frame_weights(config) + biases + days)


def exchange_seconds(
    config: TrainingConfig, gpu: Gpu, gpus: int, machines: int = 1, between: float = 0.0
) -> float:
    """Seconds a step needs for exchanging gradients: packing, all-reduce, unpacking.

    Nothing of it overlaps with the backward pass, because cuDNN hands over the gradients of all GRU
    layers at its end.

    Args:
        gpus: in all machines together.
        between: bus bandwidth among the machines, GB/s.
    """
    if gpus == 1:
        return 0.0
    sent = gradient_bytes(config)
    bus = gpu.all_reduce if machines == 1 else min(between, gpu.all_reduce)
    packing = 4 * sent / (gpu.bandwidth * 1e9)  # two copies, each read and written
    hops = LATENCY_SECONDS * (1 + math.log2(machines))
    return packing + 2 * (gpus - 1) / gpus * sent / (bus * 1e9) + hops


def training_flops(config: TrainingConfig, n_bins: float, n_frames: float) -> float:
    """Floating-point operations of training on trials with so many bins and output frames in all.

    Two per multiply-add of every matrix product over the trials' own bins and frames (padding is
    not work), and twice the forward pass for the backward pass, except that nothing flows back
    into the stored features. Elementwise work and CTC (under 1 %) are left out.
    """
    per_frame = 2.0 * frame_weights(config)
    day_layer = 2.0 * config.width**2
    return 3 * n_frames * per_frame + 2 * n_bins * day_layer


@dataclass(frozen=True)
class StepTime:
    """Estimated seconds of one training step on one GPU, by what they are spent on."""

    products: float  # matrix products but for the recurrence
    recurrence: float  # one frame of the longest trial after the other, layer by layer, both ways
    memory: float  # passes over features, patches, logits and weights
    launches: float  # kernels outside cuDNN

    @property
    def total(self) -> float:
        return self.products + self.recurrence + self.memory + self.launches


def step_time(
    config: TrainingConfig,
    gpu: Gpu,
    trials: float | None = None,
    mean_bins: float = MEAN_BINS,
    longest_bins: float | None = None,
) -> StepTime:
    """What a training step on one GPU should take: an estimate from its data sheet.

    The GRU is serial: every layer computes as many cells, one after the other, as the longest trial
    has frames, and each takes what its kernels wait, or what reading its weights takes, or what its
    product takes. That cuDNN may overlap layers is not counted.

    Args:
        trials: of the batch on this GPU; default: the whole batch.
        longest_bins: of the batch's longest trial; default: twice the mean.
    """
    model, batch = config.model, config.dataset.batch_size if trials is None else trials
    longest_bins = LONGEST_OVER_MEAN * mean_bins if longest_bins is None else longest_bins
    peak, value_bytes = gpu.peak(config.use_amp, config.allow_tf32), 2 if config.use_amp else 4
    rate, bandwidth = UTILISATION * gpu.sustained * peak, gpu.bandwidth * 1e9
    C, H = config.width, model.n_units
    directions = 2 if model.bidirectional else 1
    frames, longest_frames = n_frames(config, mean_bins), n_frames(config, longest_bins)

    cells = 2 * model.n_layers * directions * longest_frames  # forward and back
    cell_flops = 2.0 * 3 * H * H * batch * frames / max(longest_frames, 1)
    cell = max(
        KERNELS_PER_CELL * KERNEL_SECONDS, 3 * H * H * value_bytes / bandwidth, cell_flops / rate
    )
    recurrent = 3 * 2.0 * 3 * H * H * model.n_layers * directions * batch * frames
    back_to_weights = recurrent / 3  # one product over all frames, not serial
    flops = training_flops(config, batch * mean_bins, batch * frames) - recurrent
    weights = frame_weights(config) + C * C * config.dataset.days_per_batch
    moved = (
        batch * longest_bins * C * 4 * FEATURE_PASSES
        + batch * frames * C * model.patch_size * value_bytes * PATCH_PASSES
        + batch * frames * config.dataset.n_classes * 4 * LOGIT_PASSES
        + weights * WEIGHT_BYTES
    )
    return StepTime(
        products=(flops + back_to_weights) / rate,
        recurrence=cells * cell,
        memory=moved / bandwidth,
        launches=LAUNCHES * LAUNCH_SECONDS,
    )
