"""Trains the diphone decoder on batches streamed from S3: the whole run, top to bottom."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch

from ..config import TrainingConfig
from ..errors import TrainingError
from ..gpus import training_flops
from ..log_lines import best_line, train_line, validation_line
from ..model.device import peak_flops
from ..model.train_step import Health, StepResult
from ..model.weights_file import save_atomically, writing
from ..scoring.decoding import DecodedSplit, Inference, decode
from ..storage.ownership import claim_folder
from ..streaming.stream_stats import StreamCounts
from .build_run import build_run, try_largest_batches
from .checkpoints import CheckpointFolder
from .container import Interruption, RunInterrupted
from .distributed import World
from .log_files import RunLog, process_seconds
from .outputs import bring_back, write_best, write_model, write_validations
from .resume import already_finished, snapshot
from .run import MODEL_FILES, OUTPUT_FILES, Interval, Run, RunPaths, RunState
from .trackers import open_trackers

__all__ = ["BrainToTextDecoder_Trainer_S3", "RunPaths", "RunState"]

NEXT_TO_NOTHING = 0.01  # decoded labels per reference label, of a model that answers with blanks


class BrainToTextDecoder_Trainer_S3:
    """One training run: build, resume, train, validate, checkpoint, leave a model.

    Args:
        config: what to compute.
        data_url: `s3://bucket/prefix` or a folder with SESSION/data_{train,val}.hdf5.
        paths: where results go.
        log_url: object-store folder that gets a live copy of the log; None for none.
        accept_changes: resume even when config, dataset or code differ from the checkpoint's.
        started: called on the main rank once the run holds its folders. None for nothing.
        report: called with the run when its best model is final; writes the report. None for none.
    """

    def __init__(
        self,
        config: TrainingConfig,
        data_url: str,
        paths: RunPaths,
        *,
        log_url: str | None = None,
        accept_changes: bool = False,
        started: Callable[[], None] | None = None,
        report: Callable[[Run], None] | None = None,
    ) -> None:
        self.config = config
        self.data_url = data_url
        self.paths = paths
        self.log_url = log_url
        self.accept_changes = accept_changes
        self.started = started
        self.report = report
        self.interruption = Interruption()

    def train(self) -> RunState:
        """Run to the last step, to early stopping, or to a stop signal; resume where one ended.

        Returns:
            The state at the end; `finished` is False after a stop signal.

        Raises:
            BrainToTextError: bad configuration, data, storage or checkpoints; divergence.
        """
        world, log = World(), RunLog(None, None)
        with self.interruption, ExitStack() as closing:
            closing.callback(lambda: log.close())
            try:
                with self.interruption.immediate():
                    slowest_read = 2 * self.config.dataset.retry_budget_seconds
                    world = World.join(max(self.config.rank_timeout_seconds, slowest_read))
                    closing.push(lambda kind, error, trace: world.leave(error))
                    # held before the first byte is written: another run's log may lie here
                    checkpoints = self._hold_checkpoints(world, closing)
                    log.close()
                    log = self._open_log(world)
                    if world.is_main and self.started is not None:
                        self.started()
                    run = build_run(
                        self.config,
                        self.data_url,
                        self.paths,
                        world=world,
                        log=log,
                        checkpoints=checkpoints,
                        accept_changes=self.accept_changes,
                        closing=closing,
                    )
                    self._open_outputs(run, closing)
            except RunInterrupted:
                world.announce_stop()
                said = self.interruption.requested or "another process"
                log.info(f"Stopped by {said} before training")
                return RunState()
            self._loop(run)
            world.meet()
        return run.state

    # --- the loop ---------------------------------------------------------------------------------

    def _loop(self, run: Run) -> None:
        """Whatever is due at this step, then one more step."""
        state, last = run.state, run.config.num_training_batches
        first_step = state.step
        try:
            if state.finished:
                run.log.info(already_finished(run))
                return self._finish(run)
            try_largest_batches(run)
            run.interval = self._new_interval(run)
            while True:
                if self._validation_due(run):
                    self._validate(run)
                if run.world.any(self.interruption.requested is not None):
                    self._ask_for_traffic(run)
                    return self._stop_on_signal(run)
                if state.stopped_early or state.step == last:
                    return self._finish(run)
                if self._checkpoint_due(run):
                    self._save_state(run)

                with self._waiting(run):
                    batch = next(run.batches)
                if state.step == first_step:
                    age = process_seconds()
                    read = age - (time.perf_counter() - run.batches.first_ready)
                    run.log.info(f"First batch after {age:.2f} s, read after {read:.2f} s")
                result = run.train_step(batch, state.step, run.config.dataset.batch_size)
                run.interval.n_bins += int(batch.n_time_steps.sum())
                run.interval.n_frames += result.n_frames
                if state.step % run.config.batches_per_train_log == 0:
                    self._log_step(run, result)
                state.step += 1
        except RunInterrupted:
            self._stop_on_signal(run)

    def _waiting(self, run: Run) -> AbstractContextManager[None]:
        """Waiting for data: a signal ends it at once, unless other ranks would wait for us."""
        return self.interruption.immediate() if run.world.size == 1 else nullcontext()

    def _validation_due(self, run: Run) -> bool:
        """After step 0 (so that trouble shows at once), every so often, and after the last step."""
        done, config = run.state.step, run.config
        if done == 0 or done == run.state.validated_step:
            return False
        return (done - 1) % config.batches_per_val_step == 0 or done == config.num_training_batches

    def _validate(self, run: Run) -> None:
        """Score the validation set; keep the model if it is the best so far."""
        state, config = run.state, run.config
        step = state.step - 1
        self._check_refusals(run)
        self._check_finite(run)
        run.log.info(f"Running test after training batch: {step}")
        with run.train_step.averaged_weights():
            result = decode(
                Inference(
                    run.model,
                    run.train_step.augmentation,
                    run.train_step.autocast,
                    config.objective.ctc_kernel,
                ),
                run.val_set,
                loss=True,
                keep_logits=config.save_val_logits,
                stop=lambda: run.world.size == 1 and self.interruption.requested is not None,
                gather=run.world.gather,
            )
            if result is None:  # interrupted: the next job validates this step again
                return
            self._log_validation(run, step, result)
            metric = config.primary_metric
            value = result.numbers[metric.lower()]
            if config.save_all_val_steps:
                write_model(run, run.paths.validated(step), result, keep=True)
            if value < state.best_value:
                run.log.info(best_line(metric, state.best_value, value))
                if (said := blank_remark(result)) is not None:
                    run.log.info(said)
                state.best_value, state.best_step = value, state.step
                run.best = DecodedSplit(result.trials, result.seconds)
                state.validations_without_improvement = 0
                if config.save_best_checkpoint:
                    run.log.info("Checkpointing model")
                    write_best(run, result)
            else:
                state.validations_without_improvement += 1
        if (
            config.early_stopping
            and state.validations_without_improvement >= config.early_stopping_val_steps
        ):
            state.stopped_early = True
            run.log.info(
                f"Stopping early: {config.early_stopping_val_steps} validations without a better "
                f"{metric}"
            )
        state.validated_step = state.step
        self._save_state(run)
        run.interval = self._new_interval(run)

    def _finish(self, run: Run) -> None:
        """The last words of a run that reached its end, and all that it leaves.

        A job that was killed in here, or started again, comes by once more.
        """
        state, config = run.state, run.config
        run.refusals_said = 0  # the last words say it once more
        self._check_refusals(run)
        if config.save_final_model:
            write_model(run, run.paths.best_checkpoint.with_name("final_checkpoint"), None)
        if not state.finished:
            state.finished = True
            self._save_state(run, wait=True)
        run.log.info(
            f"Finished at step {state.step}: best {config.primary_metric} {state.best_value:.4f} "
            f"after training batch {state.best_step - 1}"
        )
        self._ask_for_traffic(run)
        if self.report is not None and config.save_best_checkpoint and run.world.is_main:
            self.report(run)
            run.log.info(f"Report: {run.paths.output_data_dir / 'report.html'}")

    def _stop_on_signal(self, run: Run) -> None:
        """Leave a state to resume from, and a model even when no validation has chosen one yet."""
        self._save_state(run, wait=True)
        if run.world.is_main and not run.paths.best_checkpoint.exists():
            write_model(run, run.paths.best_checkpoint, None)
        run.log.info(
            f"Stopped by {self.interruption.requested or 'another process'} after "
            f"{run.state.step} steps; a job with the same checkpoint location continues from here"
        )

    # --- opening ----------------------------------------------------------------------------------

    def _hold_checkpoints(self, world: World, closing: ExitStack) -> CheckpointFolder | None:
        if not world.is_main:
            return None
        checkpoints = CheckpointFolder(self.paths.checkpoint_dir)
        closing.callback(checkpoints.close)
        claimed = self.paths.checkpoint_dir / ".folders"
        claim_folder(claimed, self.paths.model_dir, MODEL_FILES, "--model-dir")
        claim_folder(claimed, self.paths.output_data_dir, OUTPUT_FILES, "--output-data-dir")
        return checkpoints

    def _open_log(self, world: World) -> RunLog:
        return RunLog(
            self.paths.model_dir / "training_log" if world.is_main else None,
            self.paths.output_data_dir / "metrics.jsonl" if world.is_main else None,
        )

    def _open_outputs(self, run: Run, closing: ExitStack) -> None:
        """On the main rank: what an earlier job left, trackers, the log's live copy, the config."""
        if not run.world.is_main:
            return
        if run.resumed:
            bring_back(run)
            run.log.info(
                f"Resuming after step {run.state.step} from {run.paths.checkpoint_dir} (best "
                f"{run.config.primary_metric} so far {run.state.best_value:.4f})"
            )
        trackers = open_trackers(
            run.log,
            run.paths,
            run.config.to_dict(),
            {"data": self.data_url, "dataset": run.identity["dataset"]},
        )

        def end(kind: Any, error: BaseException | None, trace: Any) -> None:
            for tracker in trackers:
                tracker.close(
                    error, run.state.finished, lambda: self.interruption.requested is not None
                )

        closing.push(end)
        if self.log_url is not None:
            events = run.paths.event_file
            run.log.upload_to(self.log_url, {f"tensorboard/{events.name}": events})
        args = run.paths.best_checkpoint.with_name("args.yaml")
        with writing(args):
            args.write_text(run.config.to_yaml(), encoding="utf-8")

    # --- saying what happens ----------------------------------------------------------------------

    def _new_interval(self, run: Run, first_step: int | None = None) -> Interval:
        """Start counting time and traffic for the log line after the one just written."""
        first = run.state.step if first_step is None else first_step
        return Interval(first, run.stream.stats.snapshot())

    def _log_step(self, run: Run, result: StepResult) -> None:
        """Say how the last step and the interval up to it went; reading results waits for them."""
        step, interval = run.state.step, run.interval
        terms: dict[str, torch.Tensor | None] = {"loss": result.terms.nats_per_frame}
        if run.train_step.objective.is_joint:
            terms["phoneme_loss"] = result.terms.phoneme
        # reading them first makes the time that of the work, not of handing it to the device
        own_terms = {name: float(value) for name, value in terms.items() if value is not None}
        elapsed = time.perf_counter() - interval.started
        seconds = elapsed / (step + 1 - interval.first_step)
        own_traffic = run.stream.stats.snapshot() - interval.traffic
        shares = run.world.gather((own_terms, result.n_frames, interval.n_frames, own_traffic))
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
            "trials_per_second": run.config.dataset.batch_size / seconds,
            "frames_per_second": sum(frames for _, _, frames, _ in shares) / elapsed,
            "data_wait_share": traffic.wait_seconds / elapsed,
            "cache_hit_rate": traffic.hit_rate,
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
        self._check_refusals(run)
        run.interval = self._new_interval(run, step + 1)

    def _log_validation(self, run: Run, step: int, result: DecodedSplit) -> None:
        numbers = {"step": step, **result.numbers}
        run.log.info(validation_line(numbers, run.config.primary_metric))
        if run.config.log_individual_day_val_PER:
            for session, rates in result.numbers["per_session"].items():
                text = " ".join(f"{k}: {v:.4f}" for k, v in rates.items() if isinstance(v, float))
                run.log.info(f"  {session} {text}")
        run.state.validations.append(numbers)
        run.log.metrics("validation", **numbers)
        write_validations(run)

    def _ask_for_traffic(self, run: Run) -> None:
        """Learn what the other ranks read, at a point that all of them reach."""
        run.traffic_of_others[:] = run.world.gather(run.stream.stats.snapshot())[1:]

    def _check_refusals(self, run: Run) -> None:
        """Say that updates were refused; stop where too many in a row were. Waits for the device.

        Raises:
            TrainingError: at any time since the last check, `non_finite_patience` in a row were.
        """
        health = run.train_step.health()
        if health.refused_total > run.refusals_said:
            run.refusals_said = health.refused_total
            run.log.warning(
                f"{health.refused_total} updates were refused so far, last at step "
                f"{health.last_refused_step}: loss or gradients were not finite"
            )
        if health.refused_in_a_row >= run.config.non_finite_patience:
            raise self._diverged(run, health)

    def _check_finite(self, run: Run) -> None:
        """Raise TrainingError for weights or moments that no run can go on from."""
        moments = run.train_step.optimizer.state.values()
        values = [*run.model.parameters(), *(v for state in moments for v in state.values())]
        if all(bool(value.isfinite().all()) for value in values):
            return
        raise TrainingError(
            f"Training diverged: weights are not finite after {run.state.step} steps; "
            f"{self._way_back(run)}."
        )

    def _way_back(self, run: Run) -> str:
        good = None if run.checkpoints is None else run.checkpoints.newest()
        return f"the last good checkpoint is {good or 'none yet'}; lower lr_max"

    def _diverged(self, run: Run, health: Health) -> TrainingError:
        """What happened, in which trials, with the batch saved and the way back."""
        step = health.last_refused_step
        trials = [run.manifest.trials[index] for index in run.train_set.plan.trials(step)]
        bad = run.train_set[step]
        path = run.paths.output_data_dir / "offending_batch.pt"
        content = {"step": bad.step, "features": bad.features, "labels": bad.labels}
        save_atomically({**content, "trials": [trial.name for trial in trials]}, path)
        names = [f"{t.session} block {t.block_num} trial {t.trial_num}" for t in trials]
        return TrainingError(
            f"Training diverged: loss or gradients were not finite in {health.refused_in_a_row} "
            f"updates in a row, last at step {health.last_refused_step} with {len(names)} trials "
            f"({', '.join(names[:3])}, …), saved in {path}; {self._way_back(run)}, or look for bad "
            "trials with prepare_dataset.py validate."
        )

    # --- keeping what happened --------------------------------------------------------------------

    def _checkpoint_due(self, run: Run) -> bool:
        if run.checkpoints is None:
            return False
        every, step = run.config.batches_per_save, run.state.step
        if every and step and step % every == 0:
            return step != run.checkpoints.saved_step
        return time.monotonic() >= run.next_save

    def _save_state(self, run: Run, *, wait: bool = False) -> None:
        if run.checkpoints is None:
            return
        self._check_refusals(run)
        self._check_finite(run)
        run.checkpoints.save(snapshot(run), run.state.step, wait=wait)
        run.next_save = time.monotonic() + run.config.checkpoint_interval_seconds


def blank_remark(result: DecodedSplit) -> str | None:
    """What a best model's error rate does not tell: that nearly all it answers is the blank."""
    counts = result.numbers["counts"]["classes"]
    wanted = counts["reference_labels"]
    decoded = wanted - counts["deletions"] + counts["insertions"]
    if decoded > NEXT_TO_NOTHING * wanted:
        return None
    return (
        f"This model decodes {decoded} labels where {wanted} were spoken: it answers with blanks, "
        "as models do at first; its error rate means nothing yet"
    )
