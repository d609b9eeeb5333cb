"""A training run as one object: its parts, where it writes, where it stands."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..config import TrainingConfig
from ..dataset.manifest import TrialManifest
from ..dataset.selection import TrialSelection
from ..model.rnn_model import GRUDecoder
from ..model.train_step import TrainStep
from ..scoring.decoding import DecodedSplit
from ..streaming.dataset_s3 import BrainToTextDatasetS3, DeviceFeeder, EvaluationDatasetS3
from ..streaming.stream_stats import StreamCounts
from ..streaming.trial_stream import TrialStream
from .checkpoints import CheckpointFolder
from .distributed import World
from .log_files import RunLog

# What a run writes into the folders that become model.tar.gz and output.tar.gz.
MODEL_FILES = ("training_log", "checkpoint/*")
OUTPUT_FILES = (
    *("metrics.jsonl", "tensorboard/*", "*.pt"),
    *("report.html", "summary.json", "trials.csv"),
)


@dataclass(frozen=True)
class RunPaths:
    """Where a run writes: becomes model.tar.gz, becomes output.tar.gz, outlives the job."""

    model_dir: Path
    output_data_dir: Path
    checkpoint_dir: Path

    @property
    def event_file(self) -> Path:
        """TensorBoard's; its own names contain the time, so that a resumed job's file would stand
        beside that of the job before it, with the steps between them twice.
        """
        name = "events.out.tfevents.0000000000.brain-to-text"
        return self.output_data_dir / "tensorboard" / name

    @property
    def best_checkpoint(self) -> Path:
        return self.model_dir / "checkpoint" / "best_checkpoint"

    @property
    def val_logits(self) -> Path:
        return self.output_data_dir / "val_logits.pt"

    def validated(self, step: int) -> Path:
        """The model kept at the validation after training batch `step`."""
        return self.model_dir / "checkpoint" / f"step_{step}"


@dataclass
class RunState:
    """Everything that changes while a run goes on, apart from tensors and RNGs.

    Attributes:
        step: completed steps; also the next step to run.
        validated_step: `step` at the last validation; -1 before the first.
        best_value: lowest validation error rate so far (DER, or PER for 41 classes).
        best_step: `step` at which it was reached.
        validations_without_improvement: for early stopping.
        stopped_early: early stopping ended the run before its last step.
        finished: nothing is left to do.
        validations: one dict of numbers per validation, in order.
    """

    step: int = 0
    validated_step: int = -1
    best_value: float = float("inf")
    best_step: int = -1
    validations_without_improvement: int = 0
    stopped_early: bool = False
    finished: bool = False
    validations: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Interval:
    """Steps since the last log line, which the next one's rates are means over.

    Attributes:
        first_step: the first of them.
        traffic: what the stream had done before it.
        started: clock before it, in seconds.
        n_bins, n_frames: of this rank's trials so far; output frames.
    """

    first_step: int
    traffic: StreamCounts
    started: float = field(default_factory=time.perf_counter)
    n_bins: int = 0
    n_frames: int = 0


@dataclass
class Run:
    """One run's parts, and where it stands.

    Attributes:
        identity: what a resumed run must share with this one.
        batches: training batches from the run's step on, under way.
        resumed: an earlier job's state was continued.
        next_save: clock at which a state is due.
        refusals_said: refused updates that the log has named.
        best: the trials as the best model decoded them, where this job validated it.
        traffic_of_others: what the other ranks read, as far as it was asked.
    """

    config: TrainingConfig
    paths: RunPaths
    world: World
    device: torch.device
    log: RunLog
    manifest: TrialManifest
    selection: TrialSelection
    stream: TrialStream
    train_set: BrainToTextDatasetS3
    val_set: EvaluationDatasetS3
    model: GRUDecoder
    train_step: TrainStep
    checkpoints: CheckpointFolder | None
    identity: dict[str, Any]
    batches: DeviceFeeder
    interval: Interval
    resumed: bool
    next_save: float
    refusals_said: int = 0
    best: DecodedSplit | None = None
    traffic_of_others: list[StreamCounts] = field(default_factory=list)
    state: RunState = field(default_factory=RunState)
