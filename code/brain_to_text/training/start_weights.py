"""Starting from the weights of an earlier run or of the public baseline, by session name."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..model.rnn_model import GRUDecoder, load_public_state_dict
from ..scoring.trained_model import initial_weights
from .run_log import RunLog


def start_from(path: str, model: GRUDecoder, sessions: Sequence[str], log: RunLog) -> None:
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
        weights = match_day_layers(weights, theirs, sessions)
    for sentence in load_public_state_dict(model, weights):
        log.info(sentence)
    log.info(f"Initialized weights from {path}")


def match_day_layers(
    weights: dict[str, torch.Tensor], theirs: Sequence[str], ours: Sequence[str]
) -> dict[str, torch.Tensor]:
    """`weights` with day layers renumbered from the order `theirs` to `ours`, by session name.

    Sessions that the checkpoint does not know get an identity layer; ones we do not use are left
    out.
    """
    matched = {name: value for name, value in weights.items() if not name.startswith("day_")}
    width = weights["day_biases.0"].shape[1]
    for day, session in enumerate(ours):
        known = theirs.index(session) if session in theirs else None
        matched[f"day_weights.{day}"] = (
            torch.eye(width) if known is None else weights[f"day_weights.{known}"]
        )
        matched[f"day_biases.{day}"] = (
            torch.zeros(1, width) if known is None else weights[f"day_biases.{known}"]
        )
    return matched
