"""Diphone classes: pairs (previous phoneme, current phoneme), numbered 41 x previous + current.

Two label forms are in use. For phonemes p1 … pn:

- self_loop, 2n + 1 labels: 0→p1, p1→p1, p1→p2, p2→p2, …, pn→pn, pn→0
- transition, n or n + 1 labels: 0→p1, p1→p2, …, p(n-1)→pn, and pn→0 if closed
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from ..errors import DataError
from .phonemes import BLANK, N_PHONEMES

if TYPE_CHECKING:
    import numpy as np
    import torch

N_DIPHONES = N_PHONEMES * N_PHONEMES
LabelForm = Literal["self_loop", "transition"]
LABEL_FORMS: tuple[LabelForm, ...] = ("self_loop", "transition")


def encode_diphones(
    phonemes: Iterable[int] | np.ndarray, form: LabelForm = "self_loop", closing: bool = True
) -> np.ndarray:
    """Diphone class ids [2n + 1] or [n + 1] int32 of phoneme ids [n].

    Args:
        closing: end with pn→0; the transition form may go without.

    Raises:
        DataError: a phoneme id is outside 1 … 40 (a blank is no label), or the form is unknown.
    """
    import numpy as np  # the launcher, which reads manifests, has none

    current = np.asarray(phonemes, dtype=np.int32).reshape(-1)
    if form not in LABEL_FORMS:
        raise DataError(f"Label form '{form}' is unknown: use one of {', '.join(LABEL_FORMS)}.")
    if not current.size:
        return current
    if current.min() <= BLANK or current.max() >= N_PHONEMES:
        position = int(np.flatnonzero((current <= BLANK) | (current >= N_PHONEMES))[0])
        raise DataError(
            f"Phoneme label {position} is {current[position]}, outside 1 … {N_PHONEMES - 1}."
        )
    step = 2 if form == "self_loop" else 1
    labels = np.empty(step * current.size + bool(closing), dtype=np.int32)
    changes = labels[: step * current.size : step]
    changes[:] = current
    changes[1:] += N_PHONEMES * current[:-1]
    if form == "self_loop":
        labels[1 : 2 * current.size : 2] = (N_PHONEMES + 1) * current
    if closing:
        labels[-1] = N_PHONEMES * current[-1] + BLANK
    return labels


def decode_diphones(diphones: Iterable[int] | np.ndarray, form: LabelForm) -> np.ndarray:
    """Phoneme ids [n] int32 of a diphone label sequence; the inverse of `encode_diphones`.

    Raises:
        DataError: the ids are not a label sequence of that form.
    """
    import numpy as np

    ids = np.asarray(diphones, dtype=np.int32).reshape(-1)
    closing = form == "self_loop" or bool(ids.size and ids[-1] % N_PHONEMES == BLANK)
    phonemes = (ids[:-1] if closing else ids)[:: 2 if form == "self_loop" else 1] % N_PHONEMES
    if not phonemes.all() or not np.array_equal(ids, encode_diphones(phonemes, form, closing)):
        raise DataError(f"Diphone labels {ids.tolist()} are not in the {form} form.")
    return phonemes


def collapse_to_phonemes(
    diphones: Iterable[int], form: LabelForm | None = "self_loop"
) -> list[int]:
    """Phonemes that a decoded, possibly inconsistent diphone sequence stands for.

    A change p→c emits c (unless c is the boundary). In the self-loop form a repeated phoneme shows
    as a run of L self-loops, which stands for (L - 1) // 2 more phonemes; in the transition form
    every class emits its current phoneme. Exact inverse of `encode_diphones` on its own output.
    """
    phonemes: list[int] = []
    for diphone, run in groupby(diphones):
        length = sum(1 for _ in run)
        previous, current = divmod(int(diphone), N_PHONEMES)
        if current == BLANK:
            continue
        if form == "transition" or previous != current:
            phonemes += [current] * length
        else:
            phonemes += [current] * ((length - 1) // 2)
    return phonemes


def marginalise_log_probs(log_probs: torch.Tensor) -> torch.Tensor:
    """Phoneme log-probabilities [..., 41] of *normalised* diphone log-probabilities [..., 1681].

    P(c) = sum over p of P(41 p + c): the blank and every boundary class p→0 become blank.
    """
    return log_probs.unflatten(-1, (N_PHONEMES, N_PHONEMES)).logsumexp(-2)
