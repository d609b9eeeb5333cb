"""Decoded trials made by hand, and the record of a trial that was never recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
from brain_to_text.dataset.manifest import TrialManifest
from brain_to_text.dataset.trial_record import TrialRecord
from brain_to_text.scoring.decoding import DecodedTrial
from brain_to_text.storage.locations import ObjectInfo

from . import manifests


def record(
    session: str = "t15.2023.08.11",
    trial: int = 0,
    *,
    split: str = "val",
    block: int = 1,
    corpus: str | None = None,
    sentence: str | None = None,
) -> TrialRecord:
    return TrialRecord(
        session=session,
        split=split,
        key=f"{session}/data_{split}.hdf5",
        trial=f"trial_{trial:04d}",
        n_time_steps=100,
        n_features=4,
        dtype="<f4",
        offset=0,
        length=1600,
        sentence_label=sentence,
        block_num=block,
        trial_num=trial,
        corpus=corpus,
    )


def manifest_of(records: Sequence[TrialRecord]) -> TrialManifest:
    files = {record.key: ObjectInfo(record.key, 1600, "etag") for record in records}
    return manifests.manifest_of(records, files, 4)


def decoded(
    index: int,
    reference: list[int] | None,
    hypothesis: list[int],
    *,
    of: TrialRecord | None = None,
    classes: tuple[list[int], list[int]] | None = None,
    path: list[int] | None = None,
) -> DecodedTrial:
    """A trial with what the model said about it; `classes` are diphones (reference, hypothesis)."""
    return DecodedTrial(
        index=index,
        record=of or record(trial=index),
        reference=reference,
        hypothesis=hypothesis,
        class_reference=classes[0] if classes else None,
        class_hypothesis=classes[1] if classes else None,
        path=path,
        phoneme_log_probs=np.log(np.full((5, 41), 1 / 41, np.float32)),
    )


def dataset_of(
    labelled: Sequence[Any],
    batches: Callable[[], Iterable[Any]] | None = None,
    *,
    form: str = "self_loop",
) -> Any:
    """What `decode` needs of a dataset: batches, and a manifest with the labels of `labelled`."""
    trials = {
        index: SimpleNamespace(
            session="abc"[day],
            class_ids=batch.labels[row].numpy(),
            phoneme_ids=batch.phoneme_labels[row].numpy(),
        )
        for batch in labelled
        for row, (index, day) in enumerate(
            zip(batch.trial_indices.tolist(), batch.day_indices.tolist(), strict=True)
        )
    }
    n_classes = 41 if form == "phoneme" else 1681
    return SimpleNamespace(
        manifest=SimpleNamespace(label_form=form, n_classes=n_classes, trials=trials),
        batches=lambda: nullcontext(iter(labelled if batches is None else batches())),
    )
