"""GPUs: what each can do at best, and what one training step asks of it. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from .config import TrainingConfig


@dataclass(frozen=True)
class Gpu:
    """One GPU; TFLOP/s are dense peaks of the data sheet, None where there is no such unit.

    Attributes:
        capability: CUDA compute capability.
        memory_gib: of one GPU; None where AWS does not rent it.
        sustained: share of the peak that its power limit lets it keep up.
        seconds_per_step: measured with rnn_args_diphone_sagemaker.yaml (batch 48) on one such GPU,
            with the command in tests/benchmarks/RESULTS.md; None: not measured.
    """

    name: str
    capability: float
    memory_gib: float | None
    bfloat16: float | None
    float16: float
    tf32: float | None
    float32: float
    sustained: float = 1.0
    seconds_per_step: float | None = None

    @property
    def half(self) -> float:
        """Peak of the 16-bit type that the trainer picks: bfloat16 where there is one."""
        return self.bfloat16 or self.float16


# NVIDIA's data sheets; figures quoted with sparsity are halved. A10G: AWS's figure for the G5
# family (about half of the A10's tensor rate). T4 and L4 have 70 W, which do not sustain the peak.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("K80", 3.7, 12, None, 4.1, None, 4.1),
        Gpu("V100", 7.0, 16, None, 125.0, None, 15.7),
        Gpu("T4", 7.5, 16, None, 65.0, None, 8.1, sustained=0.46),
        Gpu("A10G", 8.6, 24, 70.0, 70.0, 35.0, 31.5),
        Gpu("A10", 8.6, None, 125.0, 125.0, 62.5, 31.2),
        Gpu("A100", 8.0, 40, 312.0, 312.0, 156.0, 19.5),
        Gpu("A100 80GB", 8.0, 80, 312.0, 312.0, 156.0, 19.5),
        Gpu("L4", 8.9, 24, 121.0, 121.0, 60.0, 30.3, sustained=0.5),
        Gpu("L40S", 8.9, 48, 362.0, 362.0, 183.0, 91.6),
        Gpu("GeForce RTX 4090", 8.9, None, 165.2, 165.2, 82.6, 82.6),
        Gpu("H100 PCIe", 9.0, None, 756.0, 756.0, 378.0, 51.0),
        Gpu("H100", 9.0, 80, 989.0, 989.0, 494.0, 67.0),
        Gpu("H200", 9.0, 141, 989.0, 989.0, 494.0, 67.0),
        Gpu("B200", 10.0, 180, 2250.0, 2250.0, 1100.0, 75.0),
        Gpu("RTX PRO 6000", 12.0, 96, 500.0, 500.0, 250.0, 120.0),
    )
}


def known_as(device_name: str) -> Gpu | None:
    """The GPU that calls itself so, e.g. 'Tesla T4' or 'NVIDIA A10G'; None if it is not listed."""
    words = device_name.replace("-", " ").split()
    for name in sorted(GPUS, key=len, reverse=True):
        if all(word in words for word in name.split()):
            return GPUS[name]
    return None


def training_flops(config: TrainingConfig, n_bins: float, n_frames: float) -> float:
    """Floating-point operations of training on trials with so many bins and output frames in all.

    Two per multiply-add of every matrix product over the trials' own bins and frames (padding is
    not work), and twice the forward pass for the backward pass, except that nothing flows back
    into the stored features. Elementwise work and CTC (under 1 %) are left out.
    """
    model = config.model
    features, units = model.n_input_features, model.n_units
    directions = 2 if model.bidirectional else 1
    gates = 3 * units * directions
    inputs = gates * (features * model.patch_size + (model.n_layers - 1) * units * directions)
    recurrent = gates * units * model.n_layers
    classifier = units * directions * config.dataset.n_classes
    per_frame = 2.0 * (inputs + recurrent + classifier)
    day_layer = 2.0 * features * features
    return 3 * n_frames * per_frame + 2 * n_bins * day_layer


def frames_of(config: TrainingConfig, n_bins: int) -> int:
    """Output frames of a trial of so many bins."""
    return max((n_bins - config.model.patch_size) // config.model.patch_stride + 1, 0)
