"""Trains the diphone decoder on batches streamed from S3: the whole run, top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import pickle
import platform
import random
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import TrainingConfig, config_keys, differences
from ..config_reader import config_from_dict
from ..dataset.indexing import load_or_build_manifest
from ..dataset.locations import is_s3
from ..dataset.selection import select_trials
from ..dataset.store import open_store
from ..errors import CheckpointError, TrainingError
from ..gpus import training_flops
from ..log_lines import best_line, total_line, train_line, validation_line
from ..model.augmentations import Augmentation
from ..model.classifier import folded
from ..model.device import allow_tf32, notes, peak_flops, unusable
from ..model.losses import JointObjective
from ..model.optimizer import build_optimizer, build_scheduler, restore
from ..model.rnn_model import GRUDecoder, load_public_state_dict
from ..model.train_step import Health, StepResult, TrainStep, largest_batch
from ..model.weights_file import (
    CheckpointFolder,
    copy_atomically,
    load_verified,
    save_atomically,
    state_to_cpu,
)
from ..scoring.decoding import ValidationResult, evaluate
from ..scoring.evaluate import write_run_report
from ..scoring.trained_model import initial_weights
from ..streaming.dataset_s3 import BrainToTextDatasetS3, EvaluationDatasetS3
from ..streaming.stream_stats import StreamCounts
from ..streaming.trial_stream import TrialStream
from .distributed import GradientSum, World
from .interruption import Interruption, RunInterrupted
from .run_log import RunLog, process_seconds
from .trackers import announce, open_trackers

# Folders whose code decides what a run computes: a change in one of their files changes the run.
COMPUTING_FOLDERS = ("labels", "dataset", "streaming", "model", "scoring", "training")
CHECKPOINT_SHARE = 0.01  # a save may cost this share of the time between two saves


@dataclass(frozen=True)
class RunPaths:
    """Where a run writes: becomes model.tar.gz, becomes output.tar.gz, outlives the job.

    TensorBoard's event file goes to `tensorboard_dir`, by default below the output.
    """

    model_dir: Path
    output_data_dir: Path
    checkpoint_dir: Path
    tensorboard_dir: Path | None = None

    @property
    def best_checkpoint(self) -> Path:
        return self.model_dir / "checkpoint" / "best_checkpoint"


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
        seconds: training time so far, over all jobs of this run.
        validations: one dict of numbers per validation, in order.
    """

    step: int = 0
    validated_step: int = -1
    best_value: float = float("inf")
    best_step: int = -1
    validations_without_improvement: int = 0
    stopped_early: bool = False
    finished: bool = False
    seconds: float = 0.0
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


class BrainToTextDecoder_Trainer_S3:
    """One training run: build, resume, train, validate, checkpoint, leave a model.

    Args:
        config: what to compute.
        data_url: `s3://bucket/prefix` or a folder with SESSION/data_{train,val}.hdf5.
        paths: where results go.
        log_url: object-store folder that gets a live copy of the log; None for none.
        accept_changes: resume even when config, dataset or code differ from the checkpoint's.
        device: default: this process's GPU, else the CPU.
    """

    def __init__(
        self,
        config: TrainingConfig,
        data_url: str,
        paths: RunPaths,
        *,
        log_url: str | None = None,
        accept_changes: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.config = config
        self.data_url = data_url
        self.paths = paths
        self.log_url = log_url
        self.accept_changes = accept_changes
        self.world = World()
        self.device = device or torch.device("cpu")
        self._choose_device = device is None
        self.log = RunLog(None, None)
        self.state = RunState()
        self.interruption = Interruption()
        self._refused_said = 0
        self._traffic_of_others: list[StreamCounts] = []

    def train(self) -> RunState:
        """Run to the last step, to early stopping, or to a stop signal; resume where one ended.

        Returns:
            The state at the end; `finished` is False after a stop signal.

        Raises:
            BrainToTextError: bad configuration, data, storage or checkpoints; divergence.
        """
        with self.interruption, contextlib.ExitStack() as self.closing:
            try:
                with self.interruption.immediate():
                    self._join_world()
                    self._open_data()
                    saved = self.world.from_main(self._find_state)
                    self._start_reading(0 if saved is None else saved["run"]["step"])
                    self._build_model()
                    self._resume(saved)
                    self._open_outputs()
            except RunInterrupted:
                self.world.announce_stop()
                said = self.interruption.requested or "another process"
                self.log.info(f"Stopped by {said} before training")
                return self.state
            self._run()
            self.world.meet()
        return self.state

    # --- the run ----------------------------------------------------------------------------------

    def _run(self) -> None:
        """The loop: whatever is due at this step, then one more step."""
        config, state = self.config, self.state
        if state.finished:
            self.log.info(
                f"This run already finished at step {state.step}; its model is in "
                f"{self.paths.model_dir}. Raise num_training_batches to train on."
            )
            return None
        self._try_largest_batches()
        first_step, batches = state.step, self.batches
        self._mark_interval(state.step)
        try:
            while True:
                if self._validation_due():
                    self._validate()
                if self.world.any(self.interruption.requested is not None):
                    self._ask_for_traffic()
                    return self._stop_on_signal()
                if state.stopped_early or state.step == config.num_training_batches:
                    return self._finish()
                if self._checkpoint_due():
                    self._save_state()

                with self._waiting():
                    batch = next(batches)
                if state.step == first_step:
                    age = process_seconds()
                    read = age - (time.perf_counter() - batches.first_ready)
                    self.log.info(f"First batch after {age:.2f} s, read after {read:.2f} s")
                result = self.train_step(batch, state.step, config.dataset.batch_size)
                self._interval.n_bins += int(batch.n_time_steps.sum())
                self._interval.n_frames += result.n_frames
                if state.step % config.batches_per_train_log == 0:
                    self._log_step(result)
                state.step += 1
        except RunInterrupted:
            self._stop_on_signal()
        finally:
            batches.close()

    def _waiting(self) -> AbstractContextManager[None]:
        """Waiting for data: a signal ends it at once, unless other ranks would wait for us."""
        return self.interruption.immediate() if self.world.size == 1 else nullcontext()

    def _validation_due(self) -> bool:
        """After step 0 (so that trouble shows at once), every so often, and after the last step."""
        done, config = self.state.step, self.config
        if done == 0 or done == self.state.validated_step:
            return False
        return (done - 1) % config.batches_per_val_step == 0 or done == config.num_training_batches

    def _validate(self) -> None:
        """Score the validation set; keep the model if it is the best so far."""
        state, config = self.state, self.config
        step = state.step - 1
        self._check_refusals()
        self.log.info(f"Running test after training batch: {step}")
        with self.train_step.averaged_weights():
            result = evaluate(
                self.model,
                self.augmentation,
                self.val_set,
                self.selection.sessions,
                autocast=self.train_step.autocast,
                keep_logits=config.save_val_logits,
                stop=self._may_stop_validation,
                gather=self.world.gather,
            )
            if result is None:  # interrupted: the next job validates this step again
                return
            self._log_validation(step, result)
            metric = config.primary_metric
            value = result.der if metric == "DER" else result.per
            if config.save_all_val_steps:
                self._write_model(self.paths.model_dir / "checkpoint" / f"step_{step}", result)
            if value < state.best_value:
                self.log.info(best_line(metric, state.best_value, value))
                state.best_value, state.best_step = value, state.step
                state.validations_without_improvement = 0
                if config.save_best_checkpoint:
                    self.log.info("Checkpointing model")
                    self._write_best(result)
            else:
                state.validations_without_improvement += 1
        if (
            config.early_stopping
            and state.validations_without_improvement >= config.early_stopping_val_steps
        ):
            state.stopped_early = True
            self.log.info(
                f"Stopping early: {config.early_stopping_val_steps} validations without a better "
                f"{metric}"
            )
        state.validated_step = state.step
        self._save_state()
        self._mark_interval(state.step)

    def _may_stop_validation(self) -> bool:
        return self.world.size == 1 and self.interruption.requested is not None

    def _finish(self) -> None:
        """The last words of a run that reached its end."""
        state, config = self.state, self.config
        self._refused_said = 0  # the last words say it once more
        self._check_refusals()
        if config.save_final_model:
            self._write_model(self.paths.model_dir / "checkpoint" / "final_checkpoint", None)
        state.finished = True
        self._save_state(wait=True)
        metric = config.primary_metric
        self.log.info(
            f"Finished at step {state.step}: best {metric} {state.best_value:.4f} "
            f"after training batch {state.best_step - 1}"
        )
        self._ask_for_traffic()
        if config.save_best_checkpoint and self.world.is_main:
            write_run_report(
                self.paths.model_dir,
                self.paths.output_data_dir,
                self.stream,
                self.device,
                metrics_file=self.paths.output_data_dir / "metrics.jsonl",
                batch_size=config.dataset.batch_size,
            )
            self.log.info(f"Report: {self.paths.output_data_dir / 'report.html'}")

    def _stop_on_signal(self) -> None:
        """Leave a state to resume from, and a model even when no validation has chosen one yet."""
        self._save_state(wait=True)
        if self.world.is_main and not self.paths.best_checkpoint.exists():
            self._write_model(self.paths.best_checkpoint, None)
        self.log.info(
            f"Stopped by {self.interruption.requested or 'another process'} after "
            f"{self.state.step} steps; a job with the same checkpoint location continues from here"
        )

    # --- building ---------------------------------------------------------------------------------

    def _join_world(self) -> None:
        """Find out who trains with us, and who of us may speak and write."""
        self.world = World.join()
        self.closing.push(lambda kind, error, trace: self.world.leave(error))
        if self._choose_device:
            self.device = self.world.device()
        self.log.close()
        self.log = RunLog(
            self.paths.model_dir / "training_log" if self.world.is_main else None,
            self.paths.output_data_dir / "metrics.jsonl" if self.world.is_main else None,
        )
        self.closing.callback(self.log.close)
        self.log.info(f"Using device: {self.device}")
        if self.world.is_main:
            announce(self.log)
        if self.world.size > 1:
            self.log.info(f"Training on {self.world.size} processes")
        problem = unusable(self.device)
        if problem is not None:
            raise TrainingError(problem)
        for sentence in notes(self.config, self.device):
            self.log.info(sentence)
        allow_tf32(self.config.allow_tf32)

    def _open_data(self) -> None:
        config, log, world = self.config, self.log, self.world
        log.info(f"Loading data from: {self.data_url.removeprefix('s3://')}")
        store = open_store(self.data_url)
        self.manifest = world.from_main(
            lambda: load_or_build_manifest(
                store, log.info, on_damage=config.dataset.on_damaged_trial
            )
        )
        selection = self.selection = select_trials(self.manifest, config)
        for sentence in selection.warnings:
            log.warning(sentence)
        for sentence in selection.excluded:
            log.info(f"Left out: {sentence}")
        if selection.excluded:
            log.warning(f"{len(selection.excluded)} trials are left out of this run")
        if config.log_val_skip_logs:
            for session in selection.val_skipped:
                log.info(f"Validation skips session {session}")

        self.day_of_trial = {
            int(trial): day for day, trials in enumerate(selection.train) for trial in trials
        }
        self.stream = TrialStream.from_config(
            store, self.manifest, config.dataset, world.local_size
        )
        self.closing.callback(self.stream.close)
        self.closing.callback(self._say_traffic)
        log.info(f"Cache: {self.stream.cache.budget_bytes / 1e9:.1f} GB for this process")
        share: dict[str, Any] = {
            "device": self.device,
            "rank": world.rank,
            "world_size": world.size,
        }
        self.train_set = BrainToTextDatasetS3.from_config(
            self.stream, selection.train, config, **share
        )
        self.closing.callback(self.train_set.close)
        self.val_set = EvaluationDatasetS3.from_config(self.stream, selection.val, config, **share)
        self.closing.callback(self.val_set.close)
        log.info("Successfully initialized S3-backed datasets")
        log.info(total_line(config.num_training_batches))
        log.info(f"Val batches: {len(self.val_set)}")
        log.info(
            f"Trials: {sum(map(len, selection.train))} train, {sum(map(len, selection.val))} val, "
            f"from {len(selection.sessions)} sessions"
        )

    def _start_reading(self, step: int) -> None:
        """The first batches travel while the model is built."""
        self.batches = self.train_set.batches(start=step, stop=self.config.num_training_batches)

    def _build_model(self) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        random.seed(config.seed)
        np.random.seed(config.seed)
        self.model = GRUDecoder.from_config(
            config, len(self.selection.sessions), for_training=True
        ).to(self.device)
        for name, parameter in self.model.named_parameters():
            frozen = (name.startswith("gru.") and not config.model.rnn_trainable) or (
                name.startswith("day_") and not config.model.input_network.input_trainable
            )
            parameter.requires_grad_(not frozen)
        n_parameters = sum(p.numel() for p in self.model.parameters())
        n_day = sum(p.numel() for name, p in self.model.named_parameters() if "day_" in name)
        self.log.info("Initialized RNN decoding model")
        self.log.info(f"Model has {n_parameters:,} parameters")
        self.log.info(
            f"Model has {n_day:,} day-specific parameters ({100 * n_day / n_parameters:.1f}%)"
        )
        self.augmentation = Augmentation(config.dataset.data_transforms)
        self.objective = JointObjective.from_config(config)
        self.optimizer = build_optimizer(self.model, config, self.device)
        self.scheduler = build_scheduler(self.optimizer, config)
        after_backward = None
        if self.world.size > 1:
            gradients = GradientSum(self.model, self.world)

            def after_backward(batch: Any) -> None:
                trials = self.train_set.plan.trials(batch.step)
                gradients.finish(self.day_of_trial[int(trial)] for trial in trials)

        self.train_step = TrainStep(
            self.model,
            self.augmentation,
            self.objective,
            self.optimizer,
            self.scheduler,
            config,
            self.device,
            rank=self.world.rank,
            after_backward=after_backward,
            on_every_rank=self.world.all_on_device,
        )

    def _resume(self, saved: dict[str, Any] | None) -> None:
        """Continue from a saved state, or start from given weights, or from scratch."""
        config = self.config
        if saved is not None:
            self._load_state(saved)
            if self.world.is_main:
                self._restore_best()
            self.log.info(
                f"Resuming after step {self.state.step} from {self.paths.checkpoint_dir} "
                f"(best {config.primary_metric} so far {self.state.best_value:.4f})"
            )
        elif config.init_from_checkpoint:
            self._init_weights(str(config.init_checkpoint_path))
        self._next_save = time.monotonic() + config.checkpoint_interval_seconds

    def _open_outputs(self) -> None:
        """On the main rank: trackers, the log's live copy, the resolved configuration."""
        config, paths = self.config, self.paths
        if not self.world.is_main:
            return
        trackers = open_trackers(
            self.log,
            tensorboard_dir=paths.tensorboard_dir or paths.output_data_dir / "tensorboard",
            model_dir=paths.model_dir,
            output_data_dir=paths.output_data_dir,
            checkpoint_dir=paths.checkpoint_dir,
            params=config.to_dict(),
            tags={"data": self.data_url, "dataset": self.manifest.fingerprint()},
            already_finished=self.state.finished,
        )
        self.closing.push(
            lambda kind, error, trace: trackers.close(
                error, self.state.finished, lambda: self.interruption.requested is not None
            )
        )
        if self.log_url is not None:
            self.log.upload_to(self.log_url, trackers.copies())
        args = paths.model_dir / "checkpoint" / "args.yaml"
        args.parent.mkdir(parents=True, exist_ok=True)
        args.write_text(config.to_yaml(), encoding="utf-8")

    def _find_state(self) -> dict[str, Any] | None:
        """On the main rank: the newest valid state of this very run, if there is one."""
        self.checkpoints = CheckpointFolder(self.paths.checkpoint_dir)
        self.closing.callback(self.checkpoints.close)
        state, passed_over = self.checkpoints.load_latest()
        for sentence in passed_over:
            self.log.warning(f"{sentence} Going back to the checkpoint before it.")
        if state is not None:
            self._check_identity(state["identity"])
        return state

    def _init_weights(self, path: str) -> None:
        """Start from the weights of an earlier run or of the public baseline."""
        weights, sessions = initial_weights(path)
        if sessions is None:
            self.log.warning(
                f"{path} does not say whose its day layers are: they are taken in the order of "
                "dataset.sessions."
            )
        else:
            ours = self.selection.sessions
            if fresh := [session for session in ours if session not in sessions]:
                self.log.info(
                    f"{path} has no day layer for {', '.join(fresh)}: these start as the identity."
                )
            weights = match_day_layers(weights, sessions, ours)
        for sentence in load_public_state_dict(self.model, weights):
            self.log.info(sentence)
        self.log.info(f"Initialized weights from {path}")

    def _try_largest_batches(self) -> None:
        """Meet out-of-memory in minute one: a step on the longest trials, without an update."""
        choice = self.config.try_largest_batches_first
        steps = self.config.num_training_batches - self.state.step
        short = self.device.type != "cuda" or steps < 20_000  # about an hour on a T4 or A10G
        if choice == "false" or (choice == "auto" and short):
            return
        trials = [self.manifest.trials[i] for i in np.concatenate(self.selection.train)]
        n_bins = max(trial.n_time_steps for trial in trials)
        n_labels = max(len(trial.class_ids) for trial in trials if trial.class_ids is not None)
        wanted = self.config.dataset.batch_size
        share = -(-wanted // self.world.size)
        fits = self.world.size * min(
            self.world.gather(largest_batch(self.train_step, share, n_bins, n_labels))
        )
        if fits < wanted:
            raise TrainingError(
                f"A batch of {wanted} trials of {n_bins} bins does not fit the memory of "
                f"{self.device}: start again with --batch-size {fits}."
                if fits
                else f"Not even one trial of {n_bins} bins fits the memory of {self.device}: "
                "lower model.n_units, or take a larger instance type."
            )
        self.log.info(f"The largest batch fits: {wanted} trials of {n_bins} bins")

    # --- saying what happens ----------------------------------------------------------------------

    def _mark_interval(self, first_step: int) -> None:
        """Start counting time and traffic for the log line after the one just written."""
        self._interval = Interval(first_step, self.stream.stats.snapshot())

    def _log_step(self, result: StepResult) -> None:
        """Say how the last step and the interval up to it went; reading results waits for them."""
        step, interval = self.state.step, self._interval
        terms: dict[str, torch.Tensor | None] = {"loss": result.nats_per_frame}
        if self.objective.is_joint:
            terms["phoneme_loss"] = result.phoneme
        # reading them first makes the time that of the work, not of handing it to the device
        own_terms = {name: float(value) for name, value in terms.items() if value is not None}
        elapsed = time.perf_counter() - interval.started
        seconds = elapsed / (step + 1 - interval.first_step)
        own_traffic = self.stream.stats.snapshot() - interval.traffic
        shares = self.world.gather((own_terms, result.n_frames, interval.n_frames, own_traffic))
        batch_frames = sum(frames for _, frames, _, _ in shares)
        traffic = StreamCounts.total(counts for _, _, _, counts in shares)
        numbers: dict[str, Any] = {
            "step": step,
            **{
                name: sum(own[name] * frames for own, frames, _, _ in shares) / batch_frames
                for name in own_terms
            },
            "grad_norm": float(result.grad_norm),
            "seconds_per_step": seconds,
            "learning_rate": result.learning_rate,
            "trials_per_second": self.config.dataset.batch_size / seconds,
            "frames_per_second": sum(frames for _, _, frames, _ in shares) / elapsed,
            "data_wait_share": traffic.wait_seconds / elapsed,
            "cache_hit_rate": traffic.hit_rate,
            **dataclasses.asdict(traffic),
        }
        if self.objective.is_joint:
            numbers["phoneme_weight"] = result.alpha
        if self.device.type == "cuda":
            numbers["gpu_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        peak = peak_flops(self.device, self.config)
        if peak is not None:
            flops = training_flops(self.config, interval.n_bins, interval.n_frames)
            numbers["mfu"] = flops / elapsed / peak
        self.log.info(train_line(numbers))
        self.log.metrics("train", **numbers)
        self.state.seconds += elapsed
        self._check_refusals()
        self._mark_interval(step + 1)

    def _ask_for_traffic(self) -> None:
        """Learn what the other ranks read, at a point that all of them reach."""
        self._traffic_of_others = self.world.gather(self.stream.stats.snapshot())[1:]

    def _say_traffic(self) -> None:
        """The last words on the data, however the run ended, after everything was read."""
        known = [self.stream.stats.snapshot(), *self._traffic_of_others]
        whose = "Streaming" if len(known) == self.world.size else "Streaming by the first process"
        priced = is_s3(self.data_url)
        self.log.info(f"{whose}: {StreamCounts.total(known).describe(priced)}")

    def _check_refusals(self) -> None:
        """Say that updates were refused; stop where too many in a row were. Waits for the device.

        Raises:
            TrainingError: at any time since the last check, `non_finite_patience` in a row were.
        """
        health = self.train_step.health()
        if health.refused_total > self._refused_said:
            self._refused_said = health.refused_total
            self.log.warning(
                f"{health.refused_total} updates were refused so far, last at step "
                f"{health.last_refused_step}: loss or gradients were not finite"
            )
        if health.refused_in_a_row >= self.config.non_finite_patience:
            raise self._diverged(health)

    def _diverged(self, health: Health) -> TrainingError:
        """What happened, in which trials, with the batch saved and the way back."""
        step = health.last_refused_step
        trials = [self.manifest.trials[index] for index in self.train_set.plan.trials(step)]
        bad = self.train_set[step]
        path = self.paths.output_data_dir / "offending_batch.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"step": bad.step, "features": bad.features, "labels": bad.labels}
        save_atomically({**content, "trials": [trial.name for trial in trials]}, path)
        saved = []
        if self.world.is_main:
            self.checkpoints.wait()
            saved = self.checkpoints.steps()
        good = self.checkpoints.state_path(saved[-1]) if saved else "none yet"
        names = [f"{t.session} block {t.block_num} trial {t.trial_num}" for t in trials]
        return TrainingError(
            f"Training diverged: loss or gradients were not finite in {health.refused_in_a_row} "
            f"updates in a row, last at step {health.last_refused_step} with {len(names)} trials "
            f"({', '.join(names[:3])}, …), saved in {path}; the last good checkpoint is {good}; "
            "lower lr_max, or look for bad trials with prepare_dataset.py validate."
        )

    def _log_validation(self, step: int, result: ValidationResult) -> None:
        numbers = {"step": step, **result.as_dict()}
        self.log.info(validation_line(numbers, self.config.primary_metric))
        if self.config.log_individual_day_val_PER:
            for session, rates in result.per_session.items():
                text = " ".join(f"{k}: {v:.4f}" for k, v in rates.items() if isinstance(v, float))
                self.log.info(f"  {session} {text}")
        self.state.validations.append(numbers)
        self.log.metrics("validation", **numbers)
        if self.config.save_val_metrics and self.world.is_main:
            self._write_validations()

    # --- keeping what happened --------------------------------------------------------------------

    def _write_model(self, path: Path, result: ValidationResult | None) -> None:
        """The model as users take it away: with averaged weights, where weights are averaged."""
        if not self.world.is_main:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.train_step.averaged_weights():
            weights = state_to_cpu(folded(self.model))
        content = {
            "model_state_dict": weights,
            "step": self.state.step,
            "val_DER": None if result is None else result.der,
            "val_PER": None if result is None else result.per,
            "val_loss": None if result is None else result.ctc_loss,
            "sessions": list(self.selection.sessions),
            "label_form": self.manifest.label_form,
        }
        save_atomically(content, path)

    def _write_best(self, result: ValidationResult) -> None:
        """Into the model folder, and beside the states so that a later job still has it."""
        if not self.world.is_main:
            return
        self._write_model(self.paths.best_checkpoint, result)
        copy_atomically(self.paths.best_checkpoint, self._kept_best)
        if result.logits is not None:
            save_atomically(result.logits, self.paths.output_data_dir / "val_logits.pt")

    def _restore_best(self) -> None:
        state = self.state
        if state.best_step >= 0 and self.config.save_best_checkpoint:
            try:
                load_verified(self._kept_best)
                copy_atomically(self._kept_best, self.paths.best_checkpoint)
            except CheckpointError as error:
                self.log.warning(f"{error} The next validation chooses a best model anew.")
                state.best_value, state.best_step = float("inf"), -1
                if state.finished:
                    self._write_model(self.paths.best_checkpoint, None)
        if self.state.validations and self.config.save_val_metrics:
            self._write_validations()

    def _write_validations(self) -> None:
        path = self.paths.model_dir / "checkpoint" / "val_metrics.pkl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(self.state.validations))

    @property
    def _kept_best(self) -> Path:
        return self.paths.checkpoint_dir / "best_checkpoint"

    def _checkpoint_due(self) -> bool:
        if not self.world.is_main:
            return False
        every = self.config.batches_per_save
        if every and self.state.step and self.state.step % every == 0:
            return self.state.step not in self.checkpoints.steps()[-1:]
        return time.monotonic() >= self._next_save

    def _save_state(self, *, wait: bool = False) -> None:
        if not self.world.is_main:
            return
        self._check_refusals()
        started = time.monotonic()
        self.checkpoints.save(self._state_dict(), self.state.step, wait=wait)
        blocked = time.monotonic() - started
        interval = max(self.config.checkpoint_interval_seconds, blocked / CHECKPOINT_SHARE)
        self._next_save = time.monotonic() + interval

    def _state_dict(self) -> dict[str, Any]:
        """The whole run as tensors and plain values."""
        return {
            "run": dataclasses.asdict(self.state),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "train_step": self.train_step.state_dict(),
            "rng": _rng_state(self.device),
            "log": self.log.snapshot(),
            "identity": self._identity(),
        }

    def _load_state(self, saved: dict[str, Any]) -> None:
        state = self.state = RunState(**saved["run"])
        ended = state.stopped_early or state.step >= self.config.num_training_batches
        state.finished = state.finished and ended  # accepted changes may ask for more steps
        self.model.load_state_dict(saved["model"])
        restore(self.optimizer, self.scheduler, saved["optimizer"], saved["scheduler"])
        self.train_step.load_state_dict(saved["train_step"])
        _set_rng_state(saved["rng"], self.device)
        self.log.restore(saved["log"])

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one that stopped."""
        return {
            "config": self.config.to_dict(),
            "dataset": self.manifest.fingerprint(),
            "code": code_fingerprint(),
            "versions": {
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "numpy": str(np.__version__),
            },
        }

    def _check_identity(self, saved: dict[str, Any]) -> None:
        """Name every difference; refuse those that change what is computed, unless accepted.

        Raises:
            CheckpointError: config, dataset or code differ and changes were not accepted.
        """
        own = self._identity()
        changes = differences(config_from_dict(saved["config"]), self.config)
        may_differ = {name for name, _, entry in config_keys() if entry.metadata["free_on_resume"]}
        free = [line for line in changes if line.split(":")[0] in may_differ]
        binding = [line for line in changes if line not in free]
        if saved["dataset"] != own["dataset"]:
            binding.append("dataset: the trials or their bytes changed")
        binding += [
            f"code: {name} changed"
            for name in sorted(saved["code"].keys() | own["code"].keys())
            if saved["code"].get(name) != own["code"].get(name)
        ]
        for line in free:
            self.log.info(f"Changed since the checkpoint, without effect on results: {line}")
        for name, version in own["versions"].items():
            if saved["versions"].get(name) != version:
                self.log.warning(
                    f"{name} was {saved['versions'].get(name)} and is {version}: results may "
                    "differ in the last digits"
                )
        if binding and not self.accept_changes:
            raise CheckpointError(
                f"The checkpoint in {self.paths.checkpoint_dir} belongs to a different run "
                f"({'; '.join(binding)}): give this run its own checkpoint location, or accept "
                "the changes with --accept-changes true."
            )
        for line in binding:
            self.log.warning(f"Resuming although changed: {line}")


def match_day_layers(
    weights: dict[str, torch.Tensor], theirs: Sequence[str], ours: Sequence[str]
) -> dict[str, torch.Tensor]:
    """`weights` with day layers renumbered from the order `theirs` to `ours`, by session name.

    Sessions that the checkpoint does not know get an identity layer; ones we do not use are left
    out.
    """
    matched = {name: value for name, value in weights.items() if not name.startswith("day_")}
    width = weights["day_biases.0"].shape[1]
    for day, session in enumerate(ours):
        known = theirs.index(session) if session in theirs else None
        matched[f"day_weights.{day}"] = (
            torch.eye(width) if known is None else weights[f"day_weights.{known}"]
        )
        matched[f"day_biases.{day}"] = (
            torch.zeros(1, width) if known is None else weights[f"day_biases.{known}"]
        )
    return matched


def code_fingerprint(folders: Sequence[str] = COMPUTING_FOLDERS) -> dict[str, str]:
    """SHA-256 (16 digits) of every file that decides what is computed, by its path in the library.

    Args:
        folders: below `brain_to_text`; every Python file in them counts.

    Raises:
        CheckpointError: a folder holds no Python file, so that no change in it could be seen.
    """
    library = Path(__file__).parents[1]
    fingerprint: dict[str, str] = {}
    for folder in folders:
        files = sorted((library / folder).rglob("*.py"))
        if not files:
            raise CheckpointError(
                f"{library / folder} holds no Python file, so that a resumed run could not tell "
                "whether its code changed: build the image again from a whole checkout."
            )
        for file in files:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
            fingerprint[file.relative_to(library).as_posix()] = digest
    return fingerprint


def _rng_state(device: torch.device) -> dict[str, Any]:
    """Every random state of this process as tensors and plain values."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],  # type: ignore[union-attr]
        "python": random.getstate(),
    }


def _set_rng_state(saved: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(saved["torch"])
    if saved["device"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(saved["device"], device)
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words), gauss))
