"""From data files to a manifest: read each once, whole, and record where its trials lie."""

from __future__ import annotations

import os
import shlex
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from ..errors import DataError, Finding, StorageError
from ..storage.locations import (
    MANIFEST_NAME,
    ObjectInfo,
    data_files,
    not_taken_sentence,
    refuse_archived,
    session_and_split,
    shortened,
)
from ..storage.store import ObjectStore, open_store
from .file_content import FileContent
from .hdf5_reader import FileInspection, inspect_file
from .isolation import Lost, Progress, in_workers, limited
from .lost_data import LOST, lost_sentence
from .manifest import TrialManifest, load_manifest, refuse_unfinished, write_manifest
from .trial_record import TrialRecord
from .trial_table import N_CLASSES

_SMALL_DATASET = 256 * 2**20  # below this, starting worker processes costs more than it saves
_PROGRESS_SECONDS = 10.0
_INDEXING_MEMORY = 6 * 2**30  # bytes of data files held at once, over all worker processes


def load_or_build_manifest(
    store: ObjectStore,
    log: Callable[[str], None],
    *,
    on_damage: Literal["stop", "exclude"] = "stop",
    splits: Collection[str] = ("train", "val", "test"),
    sessions: Collection[str] | None = None,
) -> TrialManifest:
    """The dataset's manifest, checked against one listing; built and kept if there is none.

    Args:
        log: receives one line when the index is built, and one per trial left out.
        on_damage: "stop" refuses a dataset with damaged trials, "exclude" goes on without them.
        splits, sessions: what the run is going to read; None for all sessions.

    Raises:
        StorageError: the place cannot be listed or read.
        DataError: no data there, a stale manifest, damage, or archived files that are to be read.
    """
    listing = store.list()
    overlooked = not_taken_sentence(listing)
    if overlooked:
        log(overlooked)
    manifest = load_manifest(store, listing)
    if manifest is not None:
        read = [
            key
            for key in manifest.files.keys() & listing.keys()
            for session, split in [session_and_split(key)]
            if split in splits and (sessions is None or session in sessions)
        ]
        refuse_archived({key: listing[key] for key in read}, store.url)
        manifest = _current(manifest, store, listing, log)
    else:
        started = time.monotonic()
        files = data_files(listing, store.url)
        size = sum(info.size for info in files.values())
        log(f"No {MANIFEST_NAME} in {store.url}: indexing {len(files)} files, {size / 1e9:.2f} GB")
        manifest = index_dataset(store, listing, progress=_now_and_then(log))
        log(f"Indexed {len(manifest.trials):,} trials in {time.monotonic() - started:.1f} s")
        if not manifest.damaged or on_damage == "exclude":
            try:
                write_manifest(store, manifest)
                log(f"Kept the index as {store.url}/{MANIFEST_NAME} for the next run")
            except StorageError as error:
                log(f"The index serves this run only: {error}")
    if on_damage == "stop":
        refuse_damage(store.url, manifest.damaged, "--dataset.on_damaged_trial exclude")
    for finding in manifest.damaged:
        log(f"Excluded as damaged: {finding}")
    if manifest.damaged:
        log(f"Excluded {len(manifest.damaged)} damaged trials or files in all")
    if manifest.lost:
        log(lost_sentence(manifest.lost, store.url))
    if not manifest.trials:
        raise DataError(
            f"{store.url} has no sound trial: see why with "
            f"'python code/prepare_dataset.py validate {store.url}'."
        )
    return manifest


def _current(
    manifest: TrialManifest,
    store: ObjectStore,
    listing: Mapping[str, ObjectInfo],
    log: Callable[[str], None],
) -> TrialManifest:
    """The manifest with the files as they are listed now, whose labels are those it has."""
    moved = manifest.check_fresh(listing, store.url)
    if not moved:
        return manifest
    log(f"Comparing the labels of {len(moved)} files that were copied or written since indexing")
    manifest.check_labels(store, moved)
    manifest = replace(manifest, files={key: listing[key] for key in manifest.files})
    with suppress(StorageError):  # the next run need not look again
        write_manifest(store, manifest)
    return manifest


def _now_and_then(log: Callable[[str], None]) -> Progress:
    """Progress of indexing as log lines, at most one in `_PROGRESS_SECONDS`."""
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _PROGRESS_SECONDS:
            last = time.monotonic()
            log(f"Indexed {done} of {total} files")

    return progress


def index_dataset(
    store: ObjectStore,
    listing: Mapping[str, ObjectInfo] | None = None,
    processes: int | None = None,
    progress: Progress = lambda done, total: None,
) -> TrialManifest:
    """Read every data file once, whole, into memory, and record where its trials lie.

    Files are read by worker processes: one per CPU, fewer if their files would not fit into 6 GB or
    are small. Nothing is written to disk.

    Args:
        listing: the store's listing, if known already.
        processes: worker processes; None decides by size.

    Raises:
        StorageError: a file cannot be read. DataError: no data files, or an unfinished dataset.
    """
    listing = store.list() if listing is None else listing
    refuse_part(store, listing)
    files = data_files(listing, store.url)
    inspections = inspect_dataset(store, files, processes, progress=progress)
    return manifest_from_inspections(files, inspections)


def inspect_dataset(
    store: ObjectStore,
    files: Mapping[str, ObjectInfo],
    processes: int | None = None,
    look: Callable[[np.ndarray], Any] | None = None,
    progress: Progress = lambda done, total: None,
) -> list[FileInspection]:
    """What every file holds, in the order of `files`; see `index_dataset`."""
    total = sum(info.size for info in files.values())
    if processes is None:
        largest = max(info.size for info in files.values())
        fit = max(1, _INDEXING_MEMORY // max(largest * 2, 1))
        processes = 1 if total < _SMALL_DATASET else min(os.cpu_count() or 1, len(files), fit)
    jobs = {key: (store.url, key, info.size, look) for key, info in files.items()}
    results: dict[str, FileInspection] = {}
    for key, result in in_workers(_inspect_job, jobs, processes):
        if isinstance(result, Lost):
            finding = Finding(key, None, result.damage, "crashing file")
            result = FileInspection(key, files[key].size, findings=[finding])
        results[key] = result
        progress(len(results), len(jobs))
    return [results[key] for key in files]


def manifest_from_inspections(
    files: Mapping[str, ObjectInfo], inspections: Sequence[FileInspection]
) -> TrialManifest:
    """One manifest of many files; trials that do not fit the majority are damaged."""
    forms = Counter(form for i in inspections for form in i.label_forms if form is not None)
    widths = Counter(record.n_features for i in inspections for record in i.records)
    form = forms.most_common(1)[0][0] if forms else "unlabelled"
    width = widths.most_common(1)[0][0] if widths else 0
    damaged = [f for i in inspections for f in i.findings if f.severity == "error"]
    trials: list[TrialRecord] = []
    contents: dict[str, FileContent] = {}
    for inspection in inspections:
        n_before = len(trials)
        for record, own in zip(inspection.records, inspection.label_forms, strict=True):
            if record.n_features != width:
                reason = f"has {record.n_features} features where most trials have {width}"
                damaged.append(Finding(record.key, record.trial, reason, "wrong shape"))
            elif own not in (form, None):
                reason = f"its labels are in the {own} form where most are in the {form} form"
                damaged.append(Finding(record.key, record.trial, reason, "label form"))
            else:
                trials.append(record)
        every = len(trials) - n_before == len(inspection.records)
        contents[inspection.key] = inspection.content if every else FileContent()
    return TrialManifest(
        trials,
        files,
        width,
        N_CLASSES[form],
        form,
        tuple(sorted(damaged, key=lambda f: (f.key, f.trial or ""))),
        contents,
        tuple(f for i in inspections for f in i.findings if f.kind == LOST),
    )


def keep_index(store: ObjectStore, inspections: Sequence[FileInspection]) -> TrialManifest:
    """The manifest of data files that were just written to `store`, kept with them.

    Raises:
        StorageError: listing or writing is not possible.
    """
    files = data_files(store.list(), store.url)
    manifest = manifest_from_inspections(files, sorted(inspections, key=lambda i: i.key))
    write_manifest(store, manifest)
    return manifest


def refuse_part(store: ObjectStore, listing: Mapping[str, ObjectInfo]) -> None:
    """Raise a DataError if the dataset is unfinished, as the command that makes it noted there."""
    if MANIFEST_NAME in listing:
        data = store.read(MANIFEST_NAME, 0, listing[MANIFEST_NAME].size)
        refuse_unfinished(data, store.url)


def missing_files(store: ObjectStore, listing: Mapping[str, ObjectInfo]) -> list[str]:
    """One sentence on files of the manifest before that are gone, one on sessions without train."""
    files = data_files(listing, store.url)
    try:
        before = load_manifest(store, listing)
    except DataError:
        before = None
    sentences = []
    if gone := sorted(before.files.keys() - files.keys() if before else ()):
        sentences.append(
            f"{len(gone)} files that were indexed before are gone ({shortened(gone)}): copy them "
            "again unless you removed them."
        )
    places = [session_and_split(key) for key in files]
    trained = {session for session, split in places if split == "train"}
    if without := sorted({session for session, _ in places} - trained):
        sentences.append(
            f"{len(without)} sessions have no data_train.hdf5 ({shortened(without)}): their day "
            "layers are not trained."
        )
    return sentences


def refuse_damage(url: str, damaged: Sequence[Finding], exclude: str) -> None:
    """Raise a DataError for the first of what is damaged, if anything is.

    Args:
        exclude: the option that leaves damaged trials out.
    """
    if not damaged:
        return
    more = f" (and {len(damaged) - 1} more findings)" if len(damaged) > 1 else ""
    raise DataError(
        f"{url}/{damaged[0]}{more}; see all with "
        f"'python code/prepare_dataset.py validate {shlex.quote(url)}', repair them, or "
        f"leave them out with {exclude}."
    )


def _inspect_job(
    url: str, key: str, size: int, look: Callable[[np.ndarray], Any] | None
) -> FileInspection:
    data = open_store(url).read(key, 0, size)
    with limited(len(data)):
        return inspect_file(key, data, look)
