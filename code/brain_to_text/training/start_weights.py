"""Starting from the weights of an earlier run or of the public baseline, by session name."""

from __future__ import annotations

from collections.abc import Sequence

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
        own = model.state_dict()
        days = {name: name_there(name, theirs, sessions) for name in own if name.startswith("day_")}
        rest = {name: value for name, value in weights.items() if not name.startswith("day_")}
        weights = rest | {n: weights[there] if there else own[n] for n, there in days.items()}
    for sentence in load_public_state_dict(model, weights):
        log.info(sentence)
    log.info(f"Initialized weights from {path}")


def name_there(name: str, theirs: Sequence[str], ours: Sequence[str]) -> str | None:
    """A parameter's name in a model whose day layers are those of `theirs`; None if it has none."""
    layer, _, day = name.partition(".")
    if not layer.startswith("day_"):
        return name
    session = ours[int(day)]
    return f"{layer}.{theirs.index(session)}" if session in theirs else None
