"""Data against configuration: what does not fit, and which trials a run or an evaluation uses.

The trainer, the launcher's checks and evaluation all ask here, before anything is computed.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..config import TrainingConfig
from ..errors import ConfigError, DataError, Finding, error, warning
from .manifest import TrialManifest
from .trial_record import TrialRecord

_NONE = np.array([], dtype=np.int64)


@dataclass(frozen=True)
class TrialSelection:
    """Trials by index into `TrialManifest.trials`.

    Attributes:
        sessions: day-layer order.
        train: per session, the trials batches are drawn from.
        val: per session, the trials validation scores; empty where it is switched off or absent.
        excluded: one sentence per trial left out on purpose, with its reason.
        val_skipped: sessions that have validation trials but are switched off.
        warnings: one sentence per thing in the configuration that matched nothing.
    """

    sessions: tuple[str, ...]
    train: tuple[np.ndarray, ...]
    val: tuple[np.ndarray, ...]
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
    found = list(against_config(manifest, config))
    for finding in found:
        if finding.severity == "error":
            raise ConfigError(finding.reason)
    sessions = tuple(dataset.sessions or manifest.sessions)
    _fill_in(config, manifest, sessions)

    excluded: list[str] = []

    def usable(session: str, split: str) -> np.ndarray:
        return _usable(manifest, config, session, split, _infeasible, excluded)

    train = tuple(usable(session, "train") for session in sessions)
    for session, trials in zip(sessions, train, strict=True):
        if len(trials) == 0:
            raise DataError(
                f"Session {session} has no training trials: leave it out of dataset.sessions, or "
                f"check {session}/data_train.hdf5."
            )
    skipped = _switched_off(manifest, config, sessions)
    val = tuple(_NONE if session in skipped else usable(session, "val") for session in sessions)
    if not any(len(trials) for trials in val):
        raise DataError(
            "No session has validation trials: upload data_val.hdf5 files, or switch a session on "
            "in dataset.dataset_probability_val."
        )
    warnings = tuple(finding.reason for finding in found)
    return TrialSelection(sessions, train, val, tuple(excluded), skipped, warnings)


def select_for_evaluation(
    manifest: TrialManifest, config: TrainingConfig, sessions: Sequence[str], split: str
) -> tuple[tuple[np.ndarray, ...], tuple[str, ...]]:
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
        _NONE if session in off else _usable(manifest, config, session, split, _short, left_out)
        for session in sessions
    )
    strangers = [s for s in manifest.sessions if s not in sessions]
    lost = len(manifest.select(split, strangers)) if strangers else 0
    if lost:
        left_out.append(
            f"{lost} trials of {len(strangers)} sessions that the model has no day layer for "
            f"({strangers[0]}{' …' if len(strangers) > 1 else ''})"
        )
    if not any(len(trials) for trials in chosen):
        raise DataError(
            f"The dataset has no {split} trials of the model's {len(sessions)} sessions "
            f"({sessions[0]} … {sessions[-1]}): choose another --split or dataset."
        )
    return chosen, tuple(f"Left out: {what}" for what in left_out)


def against_config(manifest: TrialManifest, config: TrainingConfig) -> Iterator[Finding]:
    """Everything in a configuration that this data does not have, errors first."""
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
    if dataset.days_per_batch > n:
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
        for record in manifest.trials:
            if record.session == session:
                known[record.block_num].add(record.trial_num)
        listed = {block: set(trials) for block, trials in blocks.items()}
        if not known:
            what = f"session {session}{_nearest(session, manifest.sessions)}"
        elif absent := sorted(listed.keys() - known.keys()):
            what = f"block {absent[0]} of session {session}, whose blocks are {_some(known)}"
        elif strange := [
            (block, trial) for block in listed for trial in sorted(listed[block] - known[block])
        ]:
            block, trial = strange[0]
            more = f" (nor {len(strange) - 1} more)" if len(strange) > 1 else ""
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
    trial: TrialRecord, patch_size: int, patch_stride: int, random_cut: int
) -> str | None:
    """Why CTC has no path for a labelled trial, or None.

    Each label needs a frame of its own, and a blank between two equal ones; the random cut may take
    leading bins.
    """
    labels = trial.class_ids
    if labels is None:
        return "it has no labels"
    needed = max(len(labels) + int(np.count_nonzero(labels[1:] == labels[:-1])), 1)
    bins = trial.n_time_steps - max(random_cut - 1, 0)
    frames = max((bins - patch_size) // patch_stride + 1, 0)
    if frames >= needed:
        return None
    return (
        f"{trial.n_time_steps} bins give {frames} frames at patches of {patch_size} bins every "
        f"{patch_stride}, but CTC needs {needed} for its {len(labels)} labels"
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
    problem: Callable[[TrialRecord, TrainingConfig], str | None],
    left_out: list[str],
) -> np.ndarray:
    """The trials without a problem that are not listed as bad; `left_out` gets the others."""
    bad = (config.dataset.bad_trials_dict or {}).get(session, {})
    kept = []
    for index in manifest.select(split, [session]):
        trial = manifest.trials[index]
        if trial.trial_num in bad.get(trial.block_num, ()):
            left_out.append(f"{trial.name}, listed in dataset.bad_trials_dict")
        elif reason := problem(trial, config):
            left_out.append(f"{trial.name}{reason}")
        else:
            kept.append(index)
    return np.array(kept, dtype=np.int64)


def _short(trial: TrialRecord, config: TrainingConfig) -> str | None:
    size = config.model.patch_size
    return f", shorter than one patch of {size} bins" if trial.n_time_steps < size else None


def _infeasible(trial: TrialRecord, config: TrainingConfig) -> str | None:
    limit = config.dataset.max_seq_elements
    model, cut = config.model, config.dataset.data_transforms.random_cut
    reason = ctc_problem(trial, model.patch_size, model.patch_stride, cut)
    if trial.class_ids is not None and len(trial.class_ids) > limit:
        reason = f"{len(trial.class_ids)} labels exceed dataset.max_seq_elements ({limit})"
    if reason and config.dataset.on_damaged_trial != "exclude":
        raise DataError(
            f"Trial {trial.name} cannot be used: {reason}; list it in dataset.bad_trials_dict, or "
            "set dataset.on_damaged_trial to exclude."
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
