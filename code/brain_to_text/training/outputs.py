"""What a run leaves, the same whichever way it went: models, scores, logits.

What a later job could not make again is kept beside the resume states and brought back by the job
that goes on, whose folders are empty. Only the main rank writes.
"""

from __future__ import annotations

import pickle
from pathlib import Path

from ..errors import CheckpointError
from ..model.classifier import folded
from ..model.weights_file import save_atomically, state_to_cpu, writing
from ..scoring.decoding import DecodedSplit
from .run import Run


def write_model(run: Run, path: Path, result: DecodedSplit | None, *, keep: bool = False) -> None:
    """The model as users take it away: with averaged weights, where weights are averaged.

    Args:
        result: the validation that it is kept for, if any.
        keep: also beside the states.

    Raises:
        CheckpointError: it cannot be written.
    """
    if run.checkpoints is None:
        return
    with run.train_step.averaged_weights():
        weights = state_to_cpu(folded(run.model))
    numbers = {} if result is None else result.numbers
    content = {
        "model_state_dict": weights,
        "step": run.state.step,
        "val_DER": numbers.get("der"),
        "val_PER": numbers.get("per"),
        "val_loss": numbers.get("ctc_loss"),
        "sessions": list(run.selection.sessions),
        "label_form": run.manifest.label_form,
    }
    save_atomically(content, path)
    if keep:
        run.checkpoints.keep(path)


def write_best(run: Run, result: DecodedSplit) -> None:
    """The best model so far, and its logits where they were asked for."""
    write_model(run, run.paths.best_checkpoint, result, keep=True)
    if result.logits is not None and run.checkpoints is not None:
        save_atomically(result.logits, run.paths.val_logits)
        run.checkpoints.keep(run.paths.val_logits)


def write_validations(run: Run) -> None:
    """`val_metrics.pkl`: one dict of numbers per validation."""
    path = run.paths.best_checkpoint.with_name("val_metrics.pkl")
    if run.config.save_val_metrics and run.checkpoints is not None and run.state.validations:
        with writing(path):
            path.write_bytes(pickle.dumps(run.state.validations))


def bring_back(run: Run) -> None:
    """Put what earlier jobs of this run wrote into the folders that this job found empty."""
    state, config = run.state, run.config
    write_validations(run)
    if config.save_all_val_steps:
        for validation in state.validations:
            _bring_back(run, run.paths.validated(validation["step"]))
    if state.best_step < 0 or not config.save_best_checkpoint:
        return
    if not _bring_back(run, run.paths.best_checkpoint):
        run.log.warning("The next validation chooses a best model anew.")
        state.best_value, state.best_step = float("inf"), -1
        if state.finished:
            write_model(run, run.paths.best_checkpoint, None)
    elif config.save_val_logits:
        _bring_back(run, run.paths.val_logits)


def _bring_back(run: Run, output: Path) -> bool:
    assert run.checkpoints is not None
    try:
        run.checkpoints.bring_back(output)
    except CheckpointError as error:
        run.log.warning(str(error))
        return False
    return True
