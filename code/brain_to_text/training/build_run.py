"""Building a run at once: data, a state to continue from, model, optimizer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from ..config import TrainingConfig
from ..dataset.indexing import load_or_build_manifest
from ..dataset.selection import TrialSelection, select_trials
from ..errors import TrainingError
from ..log_lines import total_line
from ..model.device import allow_tf32, notes
from ..model.rnn_model import GRUDecoder, load_public_state_dict
from ..model.train_step import TrainStep, largest_batch
from ..model.trained_model import initial_weights
from ..storage.retry import RetryPolicy
from ..storage.store import open_store
from ..streaming.dataset_s3 import BrainToTextDatasetS3, EvaluationDatasetS3
from ..streaming.stream_stats import StreamCounts
from ..streaming.trial_stream import TrialStream
from .checkpoints import CheckpointFolder
from .distributed import World, sum_gradients
from .log_files import RunLog
from .resume import check_identity, identity, restore_run
from .run import Interval, Run, RunPaths, bring_back


def build_run(
    config: TrainingConfig,
    data_url: str,
    paths: RunPaths,
    *,
    world: World,
    log: RunLog,
    checkpoints: CheckpointFolder | None,
    accept_changes: bool,
    closing: ExitStack,
) -> Run:
    """Everything up to the first step: read the manifest, find a state, build the model, continue.

    What the configuration leaves to the data is filled in.

    Args:
        checkpoints: of this run, held; None on ranks other than the main one.
        closing: gets what must be closed when the run ends, however it ends.

    Raises:
        BrainToTextError: bad configuration, data, storage or checkpoints.
    """
    device = world.device()
    log.info(f"Using device: {device}")
    if world.size > 1:
        log.info(f"Training on {world.size} processes")
    for sentence in notes(config, device):
        log.info(sentence)
    allow_tf32(config.allow_tf32)
    log.info(f"Loading data from: {data_url.removeprefix('s3://')}")
    retry = RetryPolicy(config.dataset.retry_budget_seconds, config.dataset.read_timeout_seconds)
    store = open_store(data_url, retry=retry)
    manifest = world.from_main(
        lambda: load_or_build_manifest(
            store,
            log.info,
            on_damage=config.dataset.on_damaged_trial,
            splits=("train", "val"),
            sessions=config.dataset.sessions,
        )
    )
    selection = select_trials(manifest, config)
    _log_selection(selection, config, log)
    stream = TrialStream.from_config(store, manifest, config.dataset, world.local_size)
    traffic_of_others: list[StreamCounts] = []
    closing.callback(_log_traffic, stream, traffic_of_others, world, log)
    closing.callback(stream.close)
    log.info(f"Cache: {stream.cache.budget_bytes / 1e9:.1f} GB for this process")
    share: dict[str, Any] = {"device": device, "rank": world.rank, "world_size": world.size}
    train_set = BrainToTextDatasetS3.from_config(stream, selection.train, config, **share)
    val_set = EvaluationDatasetS3.from_config(stream, selection.val, config, **share)
    log.info("Successfully initialized S3-backed datasets")
    log.info(total_line(config.num_training_batches))
    log.info(f"Val batches: {len(val_set)}")
    log.info(
        f"Trials: {sum(map(len, selection.train))} train, {sum(map(len, selection.val))} val, "
        f"from {len(selection.sessions)} sessions"
    )

    now = identity(config, manifest.fingerprint(), world.size)
    saved = world.from_main(lambda: _find_state(checkpoints, now, accept_changes, log))
    step = 0 if saved is None else saved["run"]["step"]
    batches = train_set.batches(start=step, stop=config.num_training_batches)  # while we build
    closing.callback(batches.close)

    model = _build_model(config, len(selection.sessions), device, log)
    train_step = TrainStep(
        model,
        config,
        device,
        rank=world.rank,
        after_backward=None
        if world.size == 1
        else lambda batch: sum_gradients(model, world, train_set.days(batch.step)),
        on_every_rank=world.all_on_device,
    )
    run = Run(
        config=config,
        paths=paths,
        world=world,
        device=device,
        log=log,
        manifest=manifest,
        selection=selection,
        stream=stream,
        train_set=train_set,
        val_set=val_set,
        model=model,
        train_step=train_step,
        checkpoints=checkpoints,
        identity=now,
        batches=batches,
        interval=Interval(step, stream.stats.snapshot()),
        next_save=time.monotonic() + config.checkpoint_interval_seconds,
        traffic_of_others=traffic_of_others,
    )
    if saved is not None:
        restore_run(run, saved)
        if world.is_main:
            bring_back(run)
        log.info(
            f"Resuming after step {run.state.step} from {paths.checkpoint_dir} (best "
            f"{config.primary_metric} so far {run.state.best_value:.4f})"
        )
        return run
    if config.init_from_checkpoint:
        _start_from(str(config.init_checkpoint_path), model, selection.sessions, log)
    log.begin()
    return run


def try_largest_batches(run: Run) -> None:
    """Meet out-of-memory in minute one: a step on the longest trials, without an update."""
    choice = run.config.try_largest_batches_first
    steps = run.config.num_training_batches - run.state.step
    short = run.device.type != "cuda" or steps < 20_000  # about an hour on a T4 or A10G
    if choice == "false" or (choice == "auto" and short):
        return
    trials, table = np.concatenate(run.selection.train), run.manifest.trials
    n_bins = int(np.asarray(table.n_time_steps)[trials].max())
    n_labels = int(np.asarray(table.n_labels)[trials].max())
    wanted = run.config.dataset.batch_size
    share = -(-wanted // run.world.size)
    fits = run.world.size * min(
        run.world.gather(largest_batch(run.train_step, share, n_bins, n_labels))
    )
    if fits < wanted:
        raise TrainingError(
            f"A batch of {wanted} trials of {n_bins} bins does not fit the memory of "
            f"{run.device}: start again with --batch-size {fits}."
            if fits
            else f"Not even one trial of {n_bins} bins fits the memory of {run.device}: "
            "lower model.n_units, or take a larger instance type."
        )
    run.log.info(f"The largest batch fits: {wanted} trials of {n_bins} bins")


def _log_selection(selection: TrialSelection, config: TrainingConfig, log: RunLog) -> None:
    for sentence in selection.warnings:
        log.warning(sentence)
    for sentence in selection.excluded:
        log.info(f"Left out: {sentence}")
    if selection.excluded:
        log.warning(f"{len(selection.excluded)} trials are left out of this run")
    if config.log_val_skip_logs:
        for session in selection.val_skipped:
            log.info(f"Validation skips session {session}")


def _log_traffic(
    stream: TrialStream, others: list[StreamCounts], world: World, log: RunLog
) -> None:
    """Say what was read, however the run ended."""
    known = [stream.stats.snapshot(), *others]
    whose = "Streaming" if len(known) == world.size else "Streaming by the first process"
    log.info(f"{whose}: {StreamCounts.total(known).describe()}")


def _find_state(
    checkpoints: CheckpointFolder | None, now: dict[str, Any], accept: bool, log: RunLog
) -> dict[str, Any] | None:
    """On the main rank: the newest valid state of this very run, if there is one."""
    assert checkpoints is not None
    state, passed_over = checkpoints.load_newest()
    for sentence in passed_over:
        log.warning(f"{sentence} The other state in that folder is used.")
    if state is not None:
        check_identity(state["identity"], state["step"], now, checkpoints.path, accept, log)
        return state
    # a run that was killed before its first state starts over; another run does not
    begun = checkpoints.begun_as()
    if begun is not None:
        check_identity(begun, 0, now, checkpoints.path, accept, log)
        log.warning(f"{checkpoints.path} holds no state of this run: it starts over.")
    checkpoints.begin_as(now)
    return None


def _build_model(
    config: TrainingConfig, n_days: int, device: torch.device, log: RunLog
) -> GRUDecoder:
    torch.manual_seed(config.seed)
    model = GRUDecoder(config, n_days, for_training=True).to(device)
    for name, parameter in model.named_parameters():
        frozen = (name.startswith("gru.") and not config.model.rnn_trainable) or (
            name.startswith("day_") and not config.model.input_network.input_trainable
        )
        parameter.requires_grad_(not frozen)
    n_parameters = sum(p.numel() for p in model.parameters())
    n_day = sum(p.numel() for name, p in model.named_parameters() if "day_" in name)
    log.info("Initialized RNN decoding model")
    log.info(f"Model has {n_parameters:,} parameters")
    log.info(f"Model has {n_day:,} day-specific parameters ({100 * n_day / n_parameters:.1f}%)")
    return model


def _start_from(path: str, model: GRUDecoder, sessions: Sequence[str], log: RunLog) -> None:
    """Load `init_checkpoint_path` into a new model.

    Args:
        path: file, folder, model.tar.gz or s3:// URL.
        sessions: of the model's day layers, in order.

    Raises:
        CheckpointError, StorageError: it cannot be read, or does not fit.
    """
    weights, theirs = initial_weights(path)
    if theirs is None:
        log.warning(
            f"{path} does not say whose its day layers are: they are taken in the order of "
            "dataset.sessions."
        )
    else:
        if fresh := [session for session in sessions if session not in theirs]:
            log.info(
                f"{path} has no day layer for {', '.join(fresh)}: these start as the identity."
            )
        start = model.state_dict()
        layers = {name: value for name, value in start.items() if name.startswith("day_")}
        for name in layers:
            layer, _, day = name.partition(".")
            if (session := sessions[int(day)]) in theirs:
                layers[name] = weights[f"{layer}.{theirs.index(session)}"]
        others = {name: value for name, value in weights.items() if not name.startswith("day_")}
        weights = others | layers
    for sentence in load_public_state_dict(model, weights):
        log.info(sentence)
    log.info(f"Initialized weights from {path}")
