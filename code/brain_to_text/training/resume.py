"""Continuing a run: whether a saved state is this run's, and how it becomes this run again."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import TrainingConfig, changed, free_on_resume
from ..errors import CheckpointError
from .log_files import RunLog
from .run import Run

# Settings below `dataset` that decide which trials are validated, and how they are scored.
VALIDATION_KEYS = (
    *("bad_trials_dict", "dataset_probability_val", "n_classes", "feature_subset"),
    "on_damaged_trial",
)
LIBRARY = Path(__file__).parents[1]


def snapshot(run: Run) -> dict[str, Any]:
    """The whole run as tensors and plain values.

    No random state: all that is drawn is a function of (seed, step, rank).
    """
    return {
        "run": dataclasses.asdict(run.state),
        "model": run.model.state_dict(),
        "optimizer": {"state": run.train_step.optimizer.state_dict()["state"]},
        "parameters": _optimized(run),
        "train_step": run.train_step.state_dict(),
        "log": run.log.snapshot(),
        "identity": run.identity,
    }


def restore_run(run: Run, saved: Mapping[str, Any]) -> None:
    """Make a newly built run the one that was saved.

    Raises:
        CheckpointError: the saved weights do not fit this model.
    """
    try:
        run.model.load_state_dict(saved["model"])
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip(" \t.")  # below a heading, one line per weight
        raise CheckpointError(
            f"The checkpoint in {run.paths.checkpoint_dir} does not fit this model ({first}): set "
            "the model section as it was, or give this run its own checkpoint location."
        ) from None
    if saved["parameters"] != _optimized(run):
        raise CheckpointError(
            f"The checkpoint in {run.paths.checkpoint_dir} trained other parts of the model: set "
            "model.rnn_trainable and model.input_network.input_trainable as they were, or "
            f"{_start_from(run.paths.checkpoint_dir)}."
        )
    groups = run.train_step.optimizer.state_dict()["param_groups"]  # decays as they are set now
    moments = saved["optimizer"]["state"]
    run.train_step.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    run.train_step.load_state_dict(saved["train_step"])
    _restore_progress(run, saved["run"])
    _forget_best_of_other_trials(run, saved["identity"])
    run.log.begin(saved["log"])


def _restore_progress(run: Run, saved: Mapping[str, Any]) -> None:
    state, config = run.state, run.config
    for name, value in saved.items():
        setattr(state, name, value)
    # accepted changes may ask for more steps, or for more patience
    patient = state.validations_without_improvement < config.early_stopping_val_steps
    state.stopped_early = state.stopped_early and config.early_stopping and not patient
    ended = state.stopped_early or state.step >= config.num_training_batches
    state.finished = state.finished and ended


def _forget_best_of_other_trials(run: Run, before: Mapping[str, Any]) -> None:
    """After accepted changes of what validation scores, earlier error rates mean nothing here.

    Raises:
        CheckpointError: the run has finished, so that no model of the new settings would follow.
    """
    state, now = run.state, run.identity
    old, new = before["config"]["dataset"], now["config"]["dataset"]
    alike = all(old.get(name) == new.get(name) for name in VALIDATION_KEYS)
    if before["dataset"] == now["dataset"] and alike:
        return
    if state.finished:
        raise CheckpointError(
            f"The run in {run.paths.checkpoint_dir} has finished on other trials: "
            "raise num_training_batches to train it on, or give this run its own checkpoint "
            "location."
        )
    if state.best_step >= 0:
        run.log.warning(
            "The best model so far was scored on other trials: the next validation chooses anew."
        )
    state.best_value, state.best_step = float("inf"), -1
    state.validations_without_improvement = 0


def already_finished(run: Run) -> str:
    """What to say, and how to train on, when nothing is left to do."""
    more = (
        "Raise early_stopping_val_steps, or set early_stopping to false,"
        if run.state.stopped_early
        else "Raise num_training_batches,"
    )
    return (
        f"This run already finished at step {run.state.step}; its model is in "
        f"{run.paths.model_dir}. {more} with --accept-changes true, to train on."
    )


def identity(config: TrainingConfig, dataset: str, world_size: int) -> dict[str, Any]:
    """What a resumed run must share with the one that stopped.

    Args:
        dataset: the manifest's fingerprint.
    """
    return {
        "config": config.to_dict(),
        "dataset": dataset,
        "code": code_fingerprint(),
        "processes": world_size,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": str(np.__version__),
        },
    }


def check_identity(
    before: Mapping[str, Any],
    done: int,
    now: Mapping[str, Any],
    folder: Path,
    accept: bool,
    log: RunLog,
) -> None:
    """Name every difference; refuse those that change what is computed, unless accepted.

    Args:
        before, now: the `identity` of the run in `folder`, and of this one.
        done: steps that the former has done.

    Raises:
        CheckpointError: it has done more steps than are asked for, or has other sessions; or
            config, dataset or code differ and changes were not accepted.
    """
    wanted = now["config"]["num_training_batches"]
    if wanted < done:
        raise CheckpointError(
            f"The checkpoint in {folder} has done {done} steps and num_training_batches is "
            f"{wanted}: ask for at least {done}, or give this run its own checkpoint location."
        )
    if before["config"]["dataset"]["sessions"] != now["config"]["dataset"]["sessions"]:
        raise CheckpointError(
            f"The checkpoint in {folder} belongs to a run on other sessions: list these as "
            f"dataset.sessions, or {_start_from(folder)}; each session's day layer is found by its "
            "name."
        )
    settings = changed(before["config"], now["config"])
    binding = [
        f"{name}: {old!r} -> {new!r}"
        for name, (old, new) in settings.items()
        if name not in free_on_resume()
    ]
    if before["dataset"] != now["dataset"]:
        binding.append("dataset: the trials or their bytes changed")
    binding += [f"code: {name} changed" for name in changed(before["code"], now["code"])]
    for name, version in now["versions"].items():
        if before["versions"].get(name) != version:
            log.warning(
                f"{name} was {before['versions'].get(name)} and is {version}: results may differ "
                "in the last digits"
            )
    if before["processes"] != now["processes"]:
        log.warning(
            f"The run had {before['processes']} processes and has {now['processes']}: its batches "
            "stay the same, noise and dropout do not (each process draws its own)"
        )
    if binding and not accept:
        raise CheckpointError(
            f"The checkpoint in {folder} belongs to a different run ({'; '.join(binding)}): give "
            "this run its own checkpoint location, or accept the changes with "
            "--accept-changes true."
        )
    for line in binding:
        log.warning(f"Resuming although changed: {line}")


def _start_from(folder: Path) -> str:
    """The advice for a run that can take over weights alone."""
    return (
        "start a new run, with its own checkpoint location, from its weights with "
        f"--init-from-checkpoint true --init-checkpoint-path {folder / 'best_checkpoint'} (to "
        "launch a job: --init-from-checkpoint and the s3:// URL of that file)"
    )


def code_fingerprint(library: Path = LIBRARY) -> dict[str, str]:
    """SHA-256 (16 digits) of every file that a run may use, by its path in the library."""
    names = [path.relative_to(library) for path in sorted(library.rglob("*.py"))]
    return {
        name.as_posix(): hashlib.sha256((library / name).read_bytes()).hexdigest()[:16]
        for name in names
        if name.parts[0] != "launch"
    }


def _optimized(run: Run) -> list[str]:
    """Parameter names in the order of the optimizer's state."""
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    return [
        names[id(p)] for group in run.train_step.optimizer.param_groups for p in group["params"]
    ]
