"""What a run says of its steps and validations, and when it has to stop because it diverged."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from ..errors import TrainingError
from ..gpus import training_flops
from ..log_lines import train_line, validation_line
from ..model.device import peak_flops
from ..model.train_step import Health, StepResult
from ..model.weights_file import save_atomically
from ..scoring.decoding import DecodedSplit
from ..streaming.stream_stats import StreamCounts
from .run import Interval, Run, write_validations

NEXT_TO_NOTHING = 0.01  # decoded labels per reference label, of a model that answers with blanks


def new_interval(run: Run, first_step: int | None = None) -> Interval:
    """Start counting time and traffic for the log line after the one just written."""
    first = run.state.step if first_step is None else first_step
    return Interval(first, run.stream.stats.snapshot())


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
    run.interval = new_interval(run, step + 1)


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
        f"({', '.join(names[:3])}, …), saved in {path}; {_way_back(run)}, or look for bad "
        "trials with prepare_dataset.py validate."
    )


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
