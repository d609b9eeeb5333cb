"""Which trials a run uses: sessions, exclusions and feasibility, decided once before step 0."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..config import TrainingConfig
from ..errors import ConfigError, DataError
from .manifest import TrialManifest, TrialRecord


@dataclass(frozen=True)
class TrialSelection:
    """Trials by index into `TrialManifest.trials`.

    Attributes:
        sessions: day-layer order.
        train: per session, the trials batches are drawn from.
        val: per session, the trials validation scores; empty where it is switched off or absent.
        excluded: one sentence per trial left out on purpose, with its reason.
        val_skipped: sessions that have validation trials but are switched off.
    """

    sessions: tuple[str, ...]
    train: tuple[np.ndarray, ...]
    val: tuple[np.ndarray, ...]
    excluded: tuple[str, ...] = field(default=())
    val_skipped: tuple[str, ...] = field(default=())


def select_trials(manifest: TrialManifest, config: TrainingConfig) -> TrialSelection:
    """Apply the dataset section of the configuration to a manifest.

    Raises:
        ConfigError: sessions, classes or features that the dataset does not have.
        DataError: a trial that CTC cannot align, or nothing left to train on.
    """
    dataset = config.dataset
    _check_shape(manifest, config)
    sessions = tuple(dataset.sessions or manifest.sessions)
    for session in sessions:
        if session not in manifest.sessions:
            close = difflib.get_close_matches(session, manifest.sessions, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(
                f"dataset.sessions lists {session}, which the dataset does not have{hint}: it has "
                f"{len(manifest.sessions)} sessions, from {manifest.sessions[0]} to "
                f"{manifest.sessions[-1]}."
            )
    if dataset.days_per_batch > len(sessions):
        raise ConfigError(
            f"dataset.days_per_batch is {dataset.days_per_batch} but the run has {len(sessions)} "
            f"sessions: set it to at most {len(sessions)}."
        )
    beyond = [day for day in dataset.must_include_days or () if not 0 <= day < len(sessions)]
    if beyond:
        raise ConfigError(
            f"dataset.must_include_days names session {beyond[0]} but sessions are numbered from 0 "
            f"to {len(sessions) - 1}."
        )

    excluded: list[str] = []
    train = tuple(_usable(manifest, config, s, "train", excluded) for s in sessions)
    for session, trials in zip(sessions, train, strict=True):
        if len(trials) == 0:
            raise DataError(
                f"Session {session} has no training trials: leave it out of dataset.sessions, or "
                f"check {session}/data_train.hdf5."
            )
    val = [_usable(manifest, config, s, "val", excluded) for s in sessions]
    switches = dataset.dataset_probability_val or [1.0] * len(sessions)
    skipped = tuple(
        session
        for session, trials, switch in zip(sessions, val, switches, strict=True)
        if switch == 0 and len(trials)
    )
    none = np.array([], dtype=np.int64)
    val = [none if switch == 0 else trials for trials, switch in zip(val, switches, strict=True)]
    if not any(len(trials) for trials in val):
        raise DataError(
            "No session has validation trials: upload data_val.hdf5 files, or switch a session on "
            "in dataset.dataset_probability_val."
        )
    return TrialSelection(sessions, train, tuple(val), tuple(excluded), skipped)


def frames_of(n_time_steps: int, config: TrainingConfig) -> int:
    """Model frames that a trial is sure to have: the random cut may take its leading bins."""
    cut = max(config.dataset.data_transforms.random_cut - 1, 0)
    return (n_time_steps - cut - config.model.patch_size) // config.model.patch_stride + 1


def bad_trials(config: TrainingConfig, session: str) -> set[tuple[int, int]]:
    """(block, trial number) of every trial of a session that dataset.bad_trials_dict lists.

    Raises:
        ConfigError: what it lists is not blocks with trial numbers.
    """
    blocks = (config.dataset.bad_trials_dict or {}).get(session, {})
    if not isinstance(blocks, dict):
        raise ConfigError(
            f"dataset.bad_trials_dict.{session} must map block numbers to lists of trial numbers."
        )
    pairs = set()
    for block, trials in blocks.items():
        listed_trials: Sequence = trials if isinstance(trials, list) else [trials]
        try:
            pairs |= {(int(block), int(trial)) for trial in listed_trials}
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"dataset.bad_trials_dict.{session}.{block} must list trial numbers, "
                f"not {trials!r}."
            ) from error
    return pairs


def _usable(
    manifest: TrialManifest,
    config: TrainingConfig,
    session: str,
    split: str,
    excluded: list[str],
) -> np.ndarray:
    bad = bad_trials(config, session)
    kept = []
    for index in manifest.select(split, [session]):
        trial = manifest.trials[index]
        if (trial.block_num, trial.trial_num) in bad:
            excluded.append(f"{trial.name}: listed in dataset.bad_trials_dict")
            continue
        problem = _infeasible(trial, config)
        if problem is None:
            kept.append(index)
        elif config.dataset.on_damaged_trial == "exclude":
            excluded.append(f"{trial.name}: {problem}")
        else:
            raise DataError(
                f"Trial {trial.name} cannot be used: {problem}; list it in "
                "dataset.bad_trials_dict, or set dataset.on_damaged_trial to exclude."
            )
    return np.array(kept, dtype=np.int64)


def _infeasible(trial: TrialRecord, config: TrainingConfig) -> str | None:
    """Why CTC has no path for this trial, or None."""
    if trial.class_ids is None:
        return "it has no labels"
    labels = trial.class_ids
    if len(labels) > config.dataset.max_seq_elements:
        return f"{len(labels)} labels exceed dataset.max_seq_elements"
    needed = len(labels) + int(np.count_nonzero(labels[1:] == labels[:-1]))
    frames = frames_of(trial.n_time_steps, config)
    if frames < max(needed, 1):
        return (
            f"{trial.n_time_steps} bins give {max(frames, 0)} frames but its {len(labels)} labels "
            f"need {max(needed, 1)}"
        )
    return None


def _check_shape(manifest: TrialManifest, config: TrainingConfig) -> None:
    if manifest.n_classes != config.dataset.n_classes:
        other = "phoneme" if manifest.n_classes == 41 else "diphone"
        raise ConfigError(
            f"dataset.n_classes is {config.dataset.n_classes} but the dataset's labels have "
            f"{manifest.n_classes} classes: use rnn_args_{other}_sagemaker.yaml"
            + (", or prepare_dataset.py encode." if manifest.n_classes == 41 else ".")
        )
    if manifest.n_features != config.dataset.neural_dim:
        raise ConfigError(
            f"dataset.neural_dim is {config.dataset.neural_dim} but the dataset has "
            f"{manifest.n_features} features per bin: set dataset.neural_dim, "
            f"model.n_input_features and model.input_network.input_layer_sizes to "
            f"{manifest.n_features}."
        )
