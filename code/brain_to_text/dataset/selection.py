"""Data against configuration: what does not fit, and which trials a run or an evaluation uses.

The trainer, the launcher's checks and evaluation all ask here, before anything is computed. The
launcher has Python's own library alone, so nothing here needs another package.
"""

from __future__ import annotations

import copy
import difflib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ..config import TrainingConfig
from ..config_checks import check_combinations
from ..errors import BrainToTextError, ConfigError, DataError, Finding, error, warning
from ..labels.phonemes import N_PHONEMES
from ..storage.locations import shortened
from .manifest import TrialManifest
from .trial_table import TrialTable

if TYPE_CHECKING:
    import numpy as np

Indices: TypeAlias = "array[int] | np.ndarray"  # of trials, 64 bits each; numpy takes both


@dataclass(frozen=True)
class TrialSelection:
    """Trials by index into `TrialManifest.trials`, in arrays of 64-bit numbers.

    Attributes:
        sessions: day-layer order.
        train: per session, the trials batches are drawn from.
        val: per session, the trials validation scores; empty where it is switched off or absent.
        excluded: one sentence per trial left out on purpose, with its reason.
        val_skipped: sessions that have validation trials but are switched off.
        warnings: one sentence per thing in the configuration that matched nothing.
    """

    sessions: tuple[str, ...]
    train: tuple[Indices, ...]
    val: tuple[Indices, ...]
    excluded: tuple[str, ...]
    val_skipped: tuple[str, ...]
    warnings: tuple[str, ...]


def select_trials(manifest: TrialManifest, config: TrainingConfig) -> TrialSelection:
    """Apply the dataset section of the configuration to a manifest.

    What the configuration leaves to the data is filled in: widths and sessions that are null, days
    counted from the end.

    Raises:
        ConfigError: sessions, classes or features that the dataset does not have.
        DataError: a trial that CTC cannot align, or nothing left to train on.
    """
    sessions = _fill_in(config, manifest)
    excluded: list[str] = []

    def usable(session: str, split: str) -> Indices:
        return _usable(manifest, config, session, split, _infeasible, excluded)

    train = tuple(usable(session, "train") for session in sessions)
    for session, trials in zip(sessions, train, strict=True):
        if not trials:
            raise DataError(
                f"Session {session} has no training trials: leave it out of dataset.sessions, or "
                f"check {session}/data_train.hdf5."
            )
    skipped = _switched_off(manifest, config, sessions)
    val = tuple(
        array("q") if session in skipped else usable(session, "val") for session in sessions
    )
    if not any(val):
        raise DataError(
            "No session has validation trials: upload data_val.hdf5 files, or switch a session on "
            "in dataset.dataset_probability_val."
        )
    warnings = _exclusions_of_nothing(manifest, config)
    return TrialSelection(sessions, train, val, tuple(excluded), skipped, warnings)


def select_for_evaluation(
    manifest: TrialManifest, config: TrainingConfig, sessions: Sequence[str], split: str
) -> tuple[tuple[Indices, ...], tuple[str, ...]]:
    """The trials of a split that a model with these day layers can decode.

    Returns:
        (trials by day index, one sentence for everything left out)

    Raises:
        DataError: none at all, or features of another width.
    """
    if manifest.n_features != config.dataset.neural_dim:
        raise DataError(
            f"The data has {manifest.n_features} features per bin and the model takes "
            f"{config.dataset.neural_dim}: give the dataset the model was trained on."
        )
    off = _switched_off(manifest, config, sessions) if split == "val" else ()
    left_out = [f"{session}, 0 in dataset.dataset_probability_val" for session in off]
    chosen = tuple(
        array("q")
        if session in off
        else _usable(manifest, config, session, split, _short, left_out)
        for session in sessions
    )
    others = [s for s in manifest.sessions if s not in sessions]
    lost = len(manifest.select(split, others)) if others else 0
    if lost:
        left_out.append(
            f"{lost} trials of {len(others)} sessions that the model has no day layer for "
            f"({others[0]}{' …' if len(others) > 1 else ''})"
        )
    if not any(chosen):
        raise DataError(
            f"The dataset has no {split} trials of the model's {len(sessions)} sessions "
            f"({sessions[0]} … {sessions[-1]}): choose another --split or dataset."
        )
    return chosen, tuple(f"Left out: {what}" for what in left_out)


def against_config(manifest: TrialManifest, config: TrainingConfig) -> Iterator[Finding]:
    """What would stop a run of this configuration on this data, or else what looks odd."""
    try:
        selection = select_trials(manifest, copy.deepcopy(config))
    except BrainToTextError as problem:
        yield error("data", str(problem))
    else:
        yield from (warning("data", sentence) for sentence in selection.warnings)


def _fill_in(config: TrainingConfig, manifest: TrialManifest) -> tuple[str, ...]:
    """Set what the configuration leaves to the data; returns the sessions.

    Raises:
        ConfigError: the data has something else than the configuration says.
    """
    dataset, model, present = config.dataset, config.model, manifest.sessions
    if manifest.n_classes == 0:
        raise ConfigError("The dataset has no labels to train on: upload labelled train files.")
    if manifest.n_classes != dataset.n_classes:
        other = "phoneme" if manifest.n_classes == N_PHONEMES else "diphone"
        raise ConfigError(
            f"dataset.n_classes is {dataset.n_classes} but the dataset's labels have "
            f"{manifest.n_classes} classes: use --config-file rnn_args_{other}_sagemaker.yaml"
            + (", or prepare_dataset.py encode." if other == "phoneme" else ".")
        )
    if dataset.neural_dim not in (None, manifest.n_features):
        raise ConfigError(
            f"dataset.neural_dim is {dataset.neural_dim} but the dataset has "
            f"{manifest.n_features} features per bin: set dataset.neural_dim, "
            "model.n_input_features and model.input_network.input_layer_sizes to null, and they "
            "are taken from the data."
        )
    sessions = dataset.sessions or present
    absent = [session for session in sessions if session not in present]
    if absent:
        close = difflib.get_close_matches(absent[0], present, n=1)
        raise ConfigError(
            f"dataset.sessions lists {shortened(absent)}, which the dataset does not have"
            f"{f' (did you mean {close[0]}?)' if close else ''}: it has {len(present)} sessions, "
            f"from {present[0]} to {present[-1]}."
        )
    n = len(sessions)
    if dataset.days_per_batch > n:
        raise ConfigError(
            f"dataset.days_per_batch is {dataset.days_per_batch} but the run has {n} sessions: "
            f"use --dataset.days_per_batch {n}."
        )
    for day in dataset.must_include_days or ():
        if not -n <= day < n:
            raise ConfigError(
                f"dataset.must_include_days names session {day} but sessions are numbered from 0 "
                f"to {n - 1} (or from -1, the last, down to {-n})."
            )
    dataset.sessions, dataset.neural_dim = list(sessions), manifest.n_features
    if dataset.must_include_days:
        dataset.must_include_days = [day % n for day in dataset.must_include_days]
    check_combinations(config)
    model.n_input_features = len(dataset.feature_subset or range(manifest.n_features))
    model.input_network.input_layer_sizes = [model.n_input_features]
    return tuple(sessions)


def _exclusions_of_nothing(manifest: TrialManifest, config: TrainingConfig) -> tuple[str, ...]:
    """One sentence if dataset.bad_trials_dict lists trials that are not there."""
    bad, trials = config.dataset.bad_trials_dict or {}, manifest.trials
    known = {
        (file.session, trials.block_num[row], trials.trial_num[row])
        for file in trials.files
        if file.session in bad
        for row in file.rows
    }
    nothing = [
        f"{session} block {block} trial {number}"
        for session, blocks in bad.items()
        for block, numbers in blocks.items()
        for number in numbers
        if (session, block, number) not in known
    ]
    if not nothing:
        return ()
    return (
        f"dataset.bad_trials_dict lists trials that are not in the dataset ({shortened(nothing)}): "
        "correct it, or a bad trial is used.",
    )


def ctc_problem(
    table: TrialTable, row: int, patch_size: int, patch_stride: int, random_cut: int
) -> str | None:
    """Why CTC has no path for a trial, or None.

    Each label needs a frame of its own, and a blank between two equal ones; the random cut may take
    leading bins.
    """
    bins, needed = table.n_time_steps[row], table.frames_needed[row]
    if not needed:
        return "it has no labels"
    frames = max((bins - max(random_cut - 1, 0) - patch_size) // patch_stride + 1, 0)
    if frames >= needed:
        return None
    return (
        f"{bins} bins give {frames} frames at patches of {patch_size} bins every {patch_stride}, "
        f"but CTC needs {needed} for its {table.n_labels[row]} labels"
    )


def _switched_off(
    manifest: TrialManifest, config: TrainingConfig, sessions: Sequence[str]
) -> tuple[str, ...]:
    """Sessions that have validation trials, and 0 in dataset.dataset_probability_val."""
    switches = config.dataset.dataset_probability_val or [1.0] * len(sessions)
    return tuple(
        session
        for session, switch in zip(sessions, switches, strict=True)
        if switch == 0 and manifest.select("val", [session])
    )


def _usable(
    manifest: TrialManifest,
    config: TrainingConfig,
    session: str,
    split: str,
    problem: Callable[[TrialTable, int, TrainingConfig], str | None],
    left_out: list[str],
) -> Indices:
    """The trials without a problem that are not listed as bad; `left_out` gets the others."""
    bad = (config.dataset.bad_trials_dict or {}).get(session, {})
    table = manifest.trials
    usable = array("q")
    for row in manifest.select(split, [session]):
        if bad and table.trial_num[row] in bad.get(table.block_num[row], ()):
            left_out.append(f"{table.name(row)}, listed in dataset.bad_trials_dict")
        elif reason := problem(table, row, config):
            left_out.append(f"{table.name(row)}{reason}")
        else:
            usable.append(row)
    return usable


def _short(table: TrialTable, row: int, config: TrainingConfig) -> str | None:
    """Why a model cannot decode a trial, or None."""
    size = config.model.patch_size
    return f", shorter than one patch of {size} bins" if table.n_time_steps[row] < size else None


def _infeasible(table: TrialTable, row: int, config: TrainingConfig) -> str | None:
    """Why a trial cannot be trained on, or None.

    Raises:
        DataError: where such trials are not to be left out.
    """
    limit, model = config.dataset.max_seq_elements, config.model
    cut = config.dataset.data_transforms.random_cut
    reason = ctc_problem(table, row, model.patch_size, model.patch_stride, cut)
    if table.n_labels[row] > limit:
        reason = f"{table.n_labels[row]} labels exceed dataset.max_seq_elements ({limit})"
    if reason and config.dataset.on_damaged_trial != "exclude":
        raise DataError(
            f"Trial {table.name(row)} cannot be used: {reason}; list it in "
            "dataset.bad_trials_dict, or set dataset.on_damaged_trial to exclude."
        )
    return f": {reason}" if reason else None
