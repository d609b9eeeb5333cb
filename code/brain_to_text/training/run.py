"""A training run as one object: its parts, where it stands, what it says and leaves.

Models, scores and logits are the same whichever way a run went: what a later job could not make
again is copied beside the resume states, and brought back by the job that goes on, whose folders
are empty. Only the main rank writes.
"""

from __future__ import annotations

import dataclasses
import pickle
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..config import TrainingConfig
from ..dataset.manifest import TrialManifest
from ..dataset.selection import TrialSelection
from ..errors import CheckpointError, TrainingError
from ..gpus import training_flops
from ..log_lines import train_line, validation_line
from ..model.classifier import folded
from ..model.device import peak_flops
from ..model.rnn_model import GRUDecoder
from ..model.train_step import Health, StepResult, TrainStep
from ..model.weights_file import load_verified, save_atomically, state_to_cpu, writing
from ..scoring.decoding import DecodedSplit
from ..streaming.dataset_s3 import BrainToTextDatasetS3, EvaluationDatasetS3
from ..streaming.prefetch import Prefetcher
from ..streaming.stream_stats import StreamCounts
from ..streaming.trial_stream import TrialStream
from .checkpoints import CheckpointFolder
from .distributed import World
from .log_files import RunLog

# What a run writes into the folders that become model.tar.gz and output.tar.gz.
MODEL_FILES = ("training_log", "checkpoint/*")
OUTPUT_FILES = (
    *("metrics.jsonl", "tensorboard/*", "val_logits.pt"),
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
        """The model at the validation after training batch `step`."""
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
        next_save: clock at which a state is due.
        refusals_logged: refused updates that the log has named.
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
    batches: Prefetcher
    interval: Interval
    next_save: float
    refusals_logged: int = 0
    best: DecodedSplit | None = None
    traffic_of_others: list[StreamCounts] = field(default_factory=list)
    state: RunState = field(default_factory=RunState)

    def begin_interval(self, first_step: int) -> None:
        """Start counting time and traffic for the next log line."""
        self.interval = Interval(first_step, self.stream.stats.snapshot())


# --- what a run leaves ----------------------------------------------------------------------------


def write_model(run: Run, path: Path, result: DecodedSplit | None, *, keep: bool = False) -> None:
    """The model as users take it away: with averaged weights, where weights are averaged.

    Args:
        result: the validation that it is saved for, if any.
        keep: also beside the states.

    Raises:
        CheckpointError: it cannot be written.
    """
    if run.checkpoints is None:
        return
    with run.train_step.averaged_weights():
        weights = state_to_cpu(folded(run.model))
    numbers = {} if result is None else result.numbers
    content = {
        "model_state_dict": weights,
        "step": run.state.step,
        "val_DER": numbers.get("der"),
        "val_PER": numbers.get("per"),
        "val_loss": numbers.get("ctc_loss"),
        "sessions": list(run.selection.sessions),
        "label_form": run.manifest.label_form,
    }
    save_atomically(content, path)
    if keep:
        run.checkpoints.keep(path)


def write_best(run: Run, result: DecodedSplit) -> None:
    """The best model so far, and its logits where they were asked for."""
    write_model(run, run.paths.best_checkpoint, result, keep=True)
    if result.logits is not None and run.checkpoints is not None:
        save_atomically(result.logits, run.paths.val_logits)
        run.checkpoints.keep(run.paths.val_logits)


def write_validations(run: Run) -> None:
    """`val_metrics.pkl`: one dict of numbers per validation."""
    path = run.paths.best_checkpoint.with_name("val_metrics.pkl")
    if run.config.save_val_metrics and run.checkpoints is not None and run.state.validations:
        with writing(path):
            path.write_bytes(pickle.dumps(run.state.validations))


def bring_back(run: Run) -> None:
    """Put what earlier jobs of this run wrote into the folders that this job found empty."""
    state, config = run.state, run.config
    write_validations(run)
    if config.save_all_val_steps:
        for validation in state.validations:
            _bring_back(run, run.paths.validated(validation["step"]))
    if state.best_step < 0 or not config.save_best_checkpoint:
        return
    if not (_bring_back(run, run.paths.best_checkpoint) and _is_best(run)):
        run.log.warning("The next validation chooses a best model anew.")
        state.best_value, state.best_step = float("inf"), -1
        if state.finished:
            write_model(run, run.paths.best_checkpoint, None)
    elif config.save_val_logits:
        _bring_back(run, run.paths.val_logits)


def _is_best(run: Run) -> bool:
    """Whether the file that was brought back is the model that the state calls its best.

    A model of a later step was saved after the state; the run comes to that validation again.
    """
    state, metric = run.state, run.config.primary_metric
    content = load_verified(run.paths.best_checkpoint)
    rate = content.get(f"val_{metric}")
    if content["step"] > state.step or (content["step"], rate) == (
        state.best_step,
        state.best_value,
    ):
        return True
    run.log.warning(
        f"The best_checkpoint in {run.paths.checkpoint_dir} is not this run's: it is of step "
        f"{content['step']} with {metric} {rate}, and this run's best was of step "
        f"{state.best_step} with {metric} {state.best_value}."
    )
    return False


def _bring_back(run: Run, output: Path) -> bool:
    assert run.checkpoints is not None
    try:
        run.checkpoints.bring_back(output)
    except CheckpointError as error:
        run.log.warning(str(error))
        return False
    return True


# --- what a run says, and when it has to stop because it diverged ---------------------------------


def log_step(run: Run, result: StepResult) -> None:
    """Say how the last step and the interval up to it went; reading results waits for them."""
    step, interval = run.state.step, run.interval
    terms: dict[str, torch.Tensor | None] = {"loss": result.terms.nats_per_frame}
    if run.train_step.objective.is_joint:
        terms["phoneme_loss"] = result.terms.phoneme
    # reading them first makes the time that of the work, not of handing it to the device
    terms_here = {name: float(value) for name, value in terms.items() if value is not None}
    elapsed = time.perf_counter() - interval.started
    seconds = elapsed / (step + 1 - interval.first_step)
    traffic_here = run.stream.stats.snapshot() - interval.traffic
    shares = run.world.gather((terms_here, result.n_frames, interval.n_frames, traffic_here))
    batch_frames = sum(frames for _, frames, _, _ in shares)
    traffic = StreamCounts.total(counts for _, _, _, counts in shares)
    numbers: dict[str, Any] = {
        "step": step,
        **{
            name: sum(values[name] * frames for values, frames, _, _ in shares) / batch_frames
            for name in terms_here
        },
        "grad_norm": float(result.grad_norm),
        "seconds_per_step": seconds,
        "learning_rate": result.learning_rate,
        "trials_per_second": run.config.dataset.batch_size / seconds,
        "frames_per_second": sum(frames for _, _, frames, _ in shares) / elapsed,
        "data_wait_share": traffic.wait_seconds / elapsed,
        "cache_hit_rate": traffic.hit_rate,
        "retries": traffic.retries,
        **dataclasses.asdict(traffic),
    }
    if run.train_step.objective.is_joint:
        numbers["phoneme_weight"] = result.terms.alpha
    if run.device.type == "cuda":
        numbers["gpu_memory_gb"] = torch.cuda.max_memory_reserved(run.device) / 1e9
    peak = peak_flops(run.device, run.config)
    if peak is not None:
        flops = training_flops(run.config, interval.n_bins, interval.n_frames)
        numbers["mfu"] = flops / elapsed / peak
    run.log.info(train_line(numbers))
    run.log.metrics("train", **numbers)
    check_refusals(run)
    run.begin_interval(step + 1)


def log_validation(run: Run, step: int, result: DecodedSplit) -> None:
    numbers = {"step": step, **result.numbers}
    run.log.info(validation_line(numbers, run.config.primary_metric))
    if run.config.log_individual_day_val_PER:
        for session, rates in result.numbers["per_session"].items():
            text = " ".join(f"{k}: {v:.4f}" for k, v in rates.items() if isinstance(v, float))
            run.log.info(f"  {session} {text}")
    run.state.validations.append(numbers)
    run.log.metrics("validation", **numbers)
    write_validations(run)


def ask_for_traffic(run: Run) -> None:
    """Learn what the other ranks read, at a point that all of them reach."""
    run.traffic_of_others[:] = run.world.gather(run.stream.stats.snapshot())[1:]


def check_refusals(run: Run) -> None:
    """Say that updates were refused; stop where too many in a row were. Waits for the device.

    Raises:
        TrainingError: at any time since the last check, `non_finite_patience` in a row were.
    """
    health = run.train_step.health()
    if health.refused_total > run.refusals_logged:
        run.refusals_logged = health.refused_total
        run.log.warning(
            f"{health.refused_total} updates were refused so far, last at step "
            f"{health.last_refused_step}: loss or gradients were not finite"
        )
    if health.refused_in_a_row >= run.config.non_finite_patience:
        raise _diverged(run, health)


def check_finite(run: Run) -> None:
    """Raise TrainingError for weights or moments that no run can go on from."""
    moments = run.train_step.optimizer.state.values()
    values = [*run.model.parameters(), *(v for state in moments for v in state.values())]
    if all(bool(value.isfinite().all()) for value in values):
        return
    raise TrainingError(
        f"Training diverged: weights are not finite after {run.state.step} steps; {_way_back(run)}."
    )


def _way_back(run: Run) -> str:
    good = None if run.checkpoints is None else run.checkpoints.newest()
    return f"the last good checkpoint is {good or 'none yet'}; lower lr_max"


def _diverged(run: Run, health: Health) -> TrainingError:
    """What happened, in which trials, and the way back."""
    step = health.last_refused_step
    trials = [run.manifest.trials[index] for index in run.train_set.plan.trials(step)]
    names = [f"{t.session} block {t.block_num} trial {t.trial_num}" for t in trials]
    return TrainingError(
        f"Training diverged: loss or gradients were not finite in {health.refused_in_a_row} "
        f"updates in a row, last at step {step} with {len(names)} trials ({', '.join(names[:3])}, "
        f"…); {_way_back(run)}, or look for bad trials with prepare_dataset.py validate."
    )
