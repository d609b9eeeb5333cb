"""Combinations of settings that are fine alone and cannot work together."""

from __future__ import annotations

import itertools
import math

from .config import ObjectiveConfig, TrainingConfig
from .errors import ConfigError
from .gpus import GPUS, MEAN_BINS, frame_weights

BYTES_PER_WEIGHT = 16  # the weight, its gradient and two moments, float32
MOST_GPUS = 64


def check_combinations(config: TrainingConfig) -> None:
    """Raise ConfigError for values that are fine alone and impossible together."""
    _check_memory(config)
    _check_widths(config)
    _check_sessions(config)
    _check_objective(config)
    for suffix in ("", "_day"):
        low, high = getattr(config, f"lr_min{suffix}"), getattr(config, f"lr_max{suffix}")
        if low > high:
            raise ConfigError(f"lr_min{suffix} ({low}) exceeds lr_max{suffix} ({high}).")
    if config.init_from_checkpoint and not config.init_checkpoint_path:
        raise ConfigError("init_from_checkpoint is true but init_checkpoint_path is not given.")


def _check_memory(config: TrainingConfig) -> None:
    """Sizes that nothing holds, before memory is taken for them."""
    model, dataset = config.model, config.dataset
    most = max(gpu.memory_gib for gpu in GPUS.values()) * 2**30
    weights = BYTES_PER_WEIGHT * (frame_weights(config) + config.width**2)
    if weights > most:
        raise ConfigError(
            f"A model of model.n_units {model.n_units}, model.n_layers {model.n_layers}, "
            f"model.patch_size {model.patch_size} and {config.width} features needs "
            f"{weights / 1e9:,.0f} GB for weights, gradients and moments, and no GPU has more than "
            f"{most / 1e9:,.0f} GB: lower them."
        )
    copies = 1 + model.patch_size / model.patch_stride  # bins, and the patches they are part of
    batch = 4 * dataset.batch_size * MEAN_BINS * config.width * copies
    if batch > MOST_GPUS * most:
        raise ConfigError(
            f"A batch of dataset.batch_size {dataset.batch_size} trials of {config.width} features "
            f"needs about {batch / 1e9:,.0f} GB, more than {MOST_GPUS} GPUs have: lower it."
        )


def _check_widths(config: TrainingConfig) -> None:
    model, dataset = config.model, config.dataset
    subset, dim = dataset.feature_subset, dataset.neural_dim
    used = dim if subset is None else len(subset)
    if subset is not None:
        bad = [f for f in subset if f < 0 or (dim is not None and f >= dim)]
        if bad or len(set(subset)) != len(subset) or not subset:
            last = "the last feature" if dim is None else str(dim - 1)
            raise ConfigError(
                f"dataset.feature_subset must list distinct indices from 0 to {last}"
                f"{f'; {bad[0]} is outside' if bad else ''}."
            )
    if None not in (model.n_input_features, used) and model.n_input_features != used:
        raise ConfigError(
            f"model.n_input_features is {model.n_input_features} but the dataset gives {used} "
            "(dataset.neural_dim, or the length of dataset.feature_subset): make them equal, or "
            "null to take the data's."
        )
    sizes = model.input_network.input_layer_sizes
    width = used if model.n_input_features is None else model.n_input_features
    if sizes is not None and (len(sizes) != 1 or (width is not None and sizes != [width])):
        raise ConfigError(
            f"model.input_network.input_layer_sizes is {sizes} but the day layer is square: write "
            f"{'null' if width is None else [width]}."
        )


def _check_sessions(config: TrainingConfig) -> None:
    dataset = config.dataset
    if dataset.days_per_batch > dataset.batch_size:
        raise ConfigError(
            f"dataset.days_per_batch ({dataset.days_per_batch}) exceeds dataset.batch_size "
            f"({dataset.batch_size}): every session drawn must give at least one trial."
        )
    if dataset.must_include_days and len(dataset.must_include_days) > dataset.days_per_batch:
        raise ConfigError(
            f"dataset.must_include_days lists {len(dataset.must_include_days)} sessions but a "
            f"batch has dataset.days_per_batch = {dataset.days_per_batch}."
        )
    val = dataset.dataset_probability_val
    if dataset.sessions is None:
        if val is not None:
            raise ConfigError("dataset.dataset_probability_val needs dataset.sessions listed too.")
        return
    repeated = sorted({s for s in dataset.sessions if dataset.sessions.count(s) > 1})
    if repeated:
        raise ConfigError(f"dataset.sessions lists {repeated[0]} more than once: list it once.")
    if not dataset.sessions:
        raise ConfigError("dataset.sessions is empty: list sessions, or null for all.")
    if val is not None and len(val) != len(dataset.sessions):
        raise ConfigError(
            f"dataset.dataset_probability_val has {len(val)} entries for "
            f"{len(dataset.sessions)} sessions: give one per session, or null."
        )


def _check_objective(config: TrainingConfig) -> None:
    objective, schedule = config.objective, config.objective.schedule
    weighted = objective.phoneme_weight > 0 or schedule is not None
    if weighted and config.dataset.n_classes != 1681:
        raise ConfigError(
            "objective.phoneme_weight and objective.schedule need dataset.n_classes 1681: "
            "with 41 classes the phoneme loss is the only one."
        )
    if objective.phoneme_weight > 0 and schedule is not None:
        raise ConfigError(
            "Give objective.phoneme_weight or objective.schedule, not both: set the weight to 0, "
            "or the schedule to null."
        )
    _check_schedule(objective, config.num_training_batches)


def _check_schedule(objective: ObjectiveConfig, n_steps: int) -> None:
    if objective.schedule is None:
        return
    example = "write it like [[0.3, 1.0], [0.7, 0.4]]"
    pairs = all(len(point) == 2 for point in objective.schedule)
    if not objective.schedule or not pairs:
        raise ConfigError(
            f"objective.schedule is {objective.schedule} but must list pairs of a step (or a share "
            f"of the run, up to 1) and a weight: {example}."
        )
    for at, weight in objective.schedule:
        if not (math.isfinite(at) and at >= 0 and 0 <= weight <= 1):
            raise ConfigError(
                f"objective.schedule has [{at:g}, {weight:g}] but a step is at least 0 and a "
                f"weight from 0 to 1: {example}."
            )
    steps = [step for step, _ in objective.phoneme_weights(n_steps)]
    if max(steps) > n_steps:
        raise ConfigError(
            f"objective.schedule names step {max(steps):g} but the run has num_training_batches = "
            f"{n_steps}: name steps up to that, or shares of the run, which fit any length."
        )
    for before, after in itertools.pairwise(steps):
        if after <= before:
            raise ConfigError(
                f"objective.schedule goes from step {before:g} to step {after:g} (of "
                f"num_training_batches = {n_steps}): list its steps in ascending order."
            )
