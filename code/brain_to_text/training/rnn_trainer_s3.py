"""Trains the diphone decoder on batches streamed from S3: the whole run, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext

from ..config import TrainingConfig
from ..log_lines import best_line
from ..model.weights_file import writing
from ..scoring.decoding import DecodedSplit, Inference, decode
from ..storage.ownership import claim_folder, give_back_folder
from . import trackers
from .build_run import build_run, try_largest_batches
from .checkpoints import CheckpointFolder
from .container import Interruption, RunInterrupted
from .distributed import World
from .log_files import RunLog, process_seconds
from .resume import already_finished, snapshot
from .run import (
    MODEL_FILES,
    OUTPUT_FILES,
    Run,
    RunPaths,
    RunState,
    ask_for_traffic,
    check_finite,
    check_refusals,
    log_step,
    log_validation,
    write_best,
    write_model,
)

__all__ = ["BrainToTextDecoder_Trainer_S3", "RunPaths", "RunState"]


class BrainToTextDecoder_Trainer_S3:
    """One training run: build, resume, train, validate, checkpoint, leave a model.

    Args:
        config: what to compute.
        data_url: `s3://bucket/prefix` or a folder with SESSION/data_{train,val}.hdf5.
        paths: where results go.
        log_url: object-store folder that gets a live copy of the log; None for none.
        accept_changes: resume even when config, dataset or code differ from the checkpoint's.
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
        report: Callable[[Run], None] | None = None,
    ) -> None:
        self.config = config
        self.data_url = data_url
        self.paths = paths
        self.log_url = log_url
        self.accept_changes = accept_changes
        self.report = report
        self.interruption = Interruption()

    def train(self) -> RunState:
        """Run to the last step, to early stopping, or to a stop signal; resume where one ended.

        Returns:
            The state at the end; `finished` is False after a stop signal.

        Raises:
            BrainToTextError: bad configuration, data, storage or checkpoints; divergence.
        """
        world, log = World(), RunLog()
        with self.interruption, ExitStack() as closing:
            closing.callback(lambda: log.close())
            refused = closing.enter_context(ExitStack())  # undoes what a refused start has done
            try:
                with self.interruption.immediate():
                    slowest_read = 2 * self.config.dataset.retry_budget_seconds
                    world = World.join(max(self.config.rank_timeout_seconds, slowest_read))
                    closing.push(lambda kind, error, trace: world.leave(error))
                    # held before the first byte is written: another run's log may lie here
                    checkpoints = self._hold_checkpoints(world, closing, refused)
                    log.close()
                    log = self._open_log(world)
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
                    refused.pop_all()
                    self._open_outputs(run, closing)
            except RunInterrupted:
                world.announce_stop()
                reason = self.interruption.requested or "another process"
                log.info(f"Stopped by {reason} before training")
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
            run.begin_interval(state.step)
            while True:
                if self._validation_due(run):
                    self._validate(run)
                if run.world.any(self.interruption.requested is not None):
                    ask_for_traffic(run)
                    return self._stop_on_signal(run)
                if state.stopped_early or state.step == last:
                    return self._finish(run)
                if self._checkpoint_due(run):
                    self._save_state(run)

                # a signal ends the wait at once, unless other ranks would wait for us
                alone = run.world.size == 1
                with self.interruption.immediate() if alone else nullcontext():
                    batch = next(run.batches)
                if state.step == first_step:
                    age = process_seconds()
                    read = age - (time.perf_counter() - run.batches.first_ready)
                    run.log.info(f"First batch after {age:.2f} s, read after {read:.2f} s")
                result = run.train_step(
                    batch,
                    state.step,
                    run.config.dataset.batch_size,
                    run.train_set.plan.bins_over_mean(state.step),
                )
                run.interval.n_bins += int(batch.n_time_steps.sum())
                run.interval.n_frames += result.n_frames
                if state.step % run.config.batches_per_train_log == 0:
                    log_step(run, result)
                state.step += 1
        except RunInterrupted:
            self._stop_on_signal(run)

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
        check_refusals(run)
        check_finite(run)
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
            log_validation(run, step, result)
            metric = config.primary_metric
            value = result.numbers[metric.lower()]
            if config.save_all_val_steps:
                write_model(run, run.paths.validated(step), result, keep=True)
            if value < state.best_value:
                run.log.info(best_line(metric, state.best_value, value))
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
        run.begin_interval(state.step)

    def _finish(self, run: Run) -> None:
        """The last words of a run that reached its end, and all that it leaves.

        A job that was killed in here, or started again, comes by once more.
        """
        state, config = run.state, run.config
        run.refusals_logged = 0  # the last words say it once more
        check_refusals(run)
        if config.save_final_model:
            write_model(run, run.paths.best_checkpoint.with_name("final_checkpoint"), None)
        if not state.finished:
            state.finished = True
            self._save_state(run, wait=True)
        run.log.info(
            f"Finished at step {state.step}: best {config.primary_metric} {state.best_value:.4f} "
            f"after training batch {state.best_step - 1}"
        )
        ask_for_traffic(run)
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

    def _hold_checkpoints(
        self, world: World, closing: ExitStack, refused: ExitStack
    ) -> CheckpointFolder | None:
        if not world.is_main:
            return None
        checkpoints = CheckpointFolder(self.paths.checkpoint_dir)
        closing.callback(checkpoints.close)
        claimed = self.paths.checkpoint_dir / ".folders"
        for folder, files, option in (
            (self.paths.model_dir, MODEL_FILES, "--model-dir"),
            (self.paths.output_data_dir, OUTPUT_FILES, "--output-data-dir"),
        ):
            if claim_folder(claimed, folder, files, option):
                refused.callback(give_back_folder, claimed, folder)
        return checkpoints

    def _open_log(self, world: World) -> RunLog:
        return RunLog(
            self.paths.model_dir / "training_log" if world.is_main else None,
            self.paths.output_data_dir / "metrics.jsonl" if world.is_main else None,
        )

    def _open_outputs(self, run: Run, closing: ExitStack) -> None:
        """On the main rank: trackers, the log's live copy, the configuration."""
        if not run.world.is_main:
            return
        facts = {"data": self.data_url, "dataset": run.identity["dataset"]}
        tracked = trackers.follow(run.log, run.paths, run.config.to_dict(), facts)
        if tracked is not None:
            closing.push(lambda kind, error, trace: tracked.close(error, run.state.finished))
        if self.log_url is not None:
            events = run.paths.event_file
            run.log.upload_to(self.log_url, {f"tensorboard/{events.name}": events})
        args = run.paths.best_checkpoint.with_name("args.yaml")
        with writing(args):
            args.write_text(run.config.to_yaml(), encoding="utf-8")

    # --- saving -----------------------------------------------------------------------------------

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
        check_refusals(run)
        check_finite(run)
        run.checkpoints.save(snapshot(run), run.state.step, wait=wait)
        run.next_save = time.monotonic() + run.config.checkpoint_interval_seconds
