"""Data against configuration: what does not fit, and which trials a run or an evaluation uses.

The trainer, the launcher's checks and evaluation all ask here, before anything is computed. The
launcher has Python's own library alone, so nothing here needs another package.
"""

from __future__ import annotations

import copy
import difflib
from array import array
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ..config import TrainingConfig
from ..errors import BrainToTextError, ConfigError, DataError, Finding, error, warning
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
    dataset = config.dataset
    found = list(_disagreements(manifest, config))
    for finding in found:
        if finding.severity == "error":
            raise ConfigError(finding.reason)
    sessions = tuple(dataset.sessions or manifest.sessions)
    _fill_in(config, manifest, sessions)

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
    warnings = tuple(finding.reason for finding in found)
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
    """Everything that would stop a run of this configuration on this data, and what looks odd."""
    found = list(_disagreements(manifest, config))
    yield from found
    if all(finding.severity != "error" for finding in found):
        try:
            select_trials(manifest, copy.deepcopy(config))
        except BrainToTextError as problem:
            yield error("data-trials", str(problem))


def _disagreements(manifest: TrialManifest, config: TrainingConfig) -> Iterator[Finding]:
    """Everything in a configuration that this data does not have."""
    yield from _classes_and_width(manifest, config)
    yield from _sessions(manifest, config)
    yield from _exclusions(manifest, config)


def _classes_and_width(manifest: TrialManifest, config: TrainingConfig) -> Iterator[Finding]:
    dataset = config.dataset
    if manifest.n_classes == 0:
        yield error(
            "data-classes", "The dataset has no labels to train on: upload labelled train files."
        )
    elif manifest.n_classes != dataset.n_classes:
        other = "phoneme" if manifest.n_classes == 41 else "diphone"
        yield error(
            "data-classes",
            f"dataset.n_classes is {dataset.n_classes} but the dataset's labels have "
            f"{manifest.n_classes} classes: use --config-file rnn_args_{other}_sagemaker.yaml"
            + (", or prepare_dataset.py encode." if manifest.n_classes == 41 else "."),
        )
    if dataset.neural_dim not in (None, manifest.n_features):
        yield error(
            "data-features",
            f"dataset.neural_dim is {dataset.neural_dim} but the dataset has "
            f"{manifest.n_features} features per bin: set dataset.neural_dim, "
            "model.n_input_features and model.input_network.input_layer_sizes to null, and they "
            "are taken from the data.",
        )
        return
    beyond = [f for f in dataset.feature_subset or () if f >= manifest.n_features]
    if beyond:
        yield error(
            "data-features",
            f"dataset.feature_subset lists {beyond[0]} but features are numbered from 0 to "
            f"{manifest.n_features - 1}.",
        )
    used = len(dataset.feature_subset or range(manifest.n_features))
    for key, value, right in (
        ("model.n_input_features", config.model.n_input_features, used),
        (
            "model.input_network.input_layer_sizes",
            config.model.input_network.input_layer_sizes,
            [used],
        ),
    ):
        if value not in (None, right):
            yield error(
                "data-features",
                f"{key} is {value} but the dataset gives {used} features per bin: set it to null.",
            )


def _sessions(manifest: TrialManifest, config: TrainingConfig) -> Iterator[Finding]:
    dataset, present = config.dataset, manifest.sessions
    absent = [session for session in dataset.sessions or () if session not in present]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        yield error(
            "data-sessions",
            f"dataset.sessions lists {absent[0]}{more}, which the dataset does not have"
            f"{_nearest(absent[0], present)}: it has {len(present)} sessions, from {present[0]} to "
            f"{present[-1]}.",
        )
    usable = [session for session in dataset.sessions or present if session in present]
    n = len(usable)
    if dataset.days_per_batch > n > 0:
        yield error(
            "data-few-sessions",
            f"dataset.days_per_batch is {dataset.days_per_batch} but the run has {n} "
            f"sessions: use --dataset.days_per_batch {max(n, 1)}.",
        )
    beyond = [day for day in dataset.must_include_days or () if not -n <= day < n]
    if beyond:
        yield error(
            "data-days",
            f"dataset.must_include_days names session {beyond[0]} but sessions are numbered from 0 "
            f"to {n - 1} (or from -1, the last, down to {-n}).",
        )
    weights = dataset.dataset_probability_val or ()
    for session, weight in zip(dataset.sessions or (), weights, strict=False):
        if weight and session in present and not manifest.select("val", [session]):
            yield warning(
                "data-no-val-trials",
                f"dataset.dataset_probability_val is {weight:g} for {session}, which has no "
                "validation trials: nothing of it is validated; write 0.",
            )


def _exclusions(manifest: TrialManifest, config: TrainingConfig) -> Iterator[Finding]:
    """Each session, block or trial of dataset.bad_trials_dict that excludes nothing."""
    for session, blocks in (config.dataset.bad_trials_dict or {}).items():
        known: dict[int, set[int]] = defaultdict(set)
        for file in manifest.table.files:
            for row in file.rows if file.session == session else ():
                known[manifest.table.block_num[row]].add(manifest.table.trial_num[row])
        listed = {block: set(trials) for block, trials in blocks.items()}
        if not known:
            what = f"session {session}{_nearest(session, manifest.sessions)}"
        elif absent := sorted(listed.keys() - known.keys()):
            what = f"block {absent[0]} of session {session}, whose blocks are {_some(known)}"
        elif unknown := [
            (block, trial) for block in listed for trial in sorted(listed[block] - known[block])
        ]:
            block, trial = unknown[0]
            more = f" (nor {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            what = (
                f"trial {trial} in block {block} of session {session}{more}, whose trials are "
                f"{_some(known[block])}"
            )
        else:
            continue
        yield warning(
            "data-exclusions",
            f"dataset.bad_trials_dict excludes nothing by {what}: correct it, or a bad trial is "
            "used.",
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


def _fill_in(config: TrainingConfig, manifest: TrialManifest, sessions: Sequence[str]) -> None:
    dataset, model = config.dataset, config.model
    dataset.sessions = list(sessions)
    if dataset.must_include_days:
        dataset.must_include_days = [day % len(sessions) for day in dataset.must_include_days]
    dataset.neural_dim = manifest.n_features
    model.n_input_features = len(dataset.feature_subset or range(manifest.n_features))
    model.input_network.input_layer_sizes = [model.n_input_features]


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
    table = manifest.table
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


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _some(numbers: Collection[int]) -> str:
    """Numbers for a sentence: all of a few, else the first and the last."""
    ordered = sorted(numbers)
    if len(ordered) <= 6:
        return ", ".join(map(str, ordered))
    return f"{len(ordered)} from {ordered[0]} to {ordered[-1]}"
