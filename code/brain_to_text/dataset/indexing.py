"""From data files to a manifest: read each once, whole, and record where its trials lie."""

from __future__ import annotations

import os
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
    dataset_command,
    not_taken_sentence,
    refuse_archived,
)
from ..storage.store import ObjectStore, open_store
from .file_content import FileContent
from .hdf5_reader import FileInspection, inspect_file
from .isolation import Lost, Progress, in_workers, limited
from .lost_data import LOST, lost_sentence
from .manifest import IndexedFile, TrialManifest, load_manifest, write_manifest
from .trial_record import TrialRecord
from .trial_table import SPLITS, TrialTable

_SMALL_DATASET = 256 * 2**20  # below this, starting worker processes costs more than it saves
_PROGRESS_SECONDS = 10.0
_INDEXING_MEMORY = 6 * 2**30  # bytes of data files held at once, over all worker processes


def load_or_build_manifest(
    store: ObjectStore,
    log: Callable[[str], None],
    *,
    on_damage: Literal["stop", "exclude"] = "stop",
    splits: Collection[str] = SPLITS,
    sessions: Collection[str] | None = None,
) -> TrialManifest:
    """The dataset's manifest, checked against one listing; built and stored if there is none.

    Args:
        log: receives one line when the index is built, and one per trial left out.
        on_damage: "stop" refuses a dataset with damaged trials, "exclude" goes on without them.
        splits, sessions: what the run is going to read; None for all sessions.

    Raises:
        StorageError: the dataset cannot be listed or read.
        DataError: no data there, a stale manifest, damage, or archived files that are to be read.
    """
    listing = store.list()
    overlooked = not_taken_sentence(listing)
    if overlooked:
        log(overlooked)
    manifest = load_manifest(store, listing)
    if manifest is None:
        manifest = _built(store, listing, log, keep_damaged=on_damage == "exclude")
    else:
        read = [
            file.key
            for file in manifest.trials.files
            if file.split in splits and (sessions is None or file.session in sessions)
        ]
        refuse_archived({key: listing[key] for key in read if key in listing}, store.url)
        manifest = _current(manifest, store, listing, log)
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
            f"{dataset_command('validate', store.url)}."
        )
    return manifest


def _built(
    store: ObjectStore,
    listing: Mapping[str, ObjectInfo],
    log: Callable[[str], None],
    *,
    keep_damaged: bool,
) -> TrialManifest:
    """A manifest made now, and written for the next run where that is possible."""
    started = last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _PROGRESS_SECONDS:
            last = time.monotonic()
            log(f"Indexed {done} of {total} files")

    files = data_files(listing, store.url)
    size = sum(info.size for info in files.values())
    log(f"No {MANIFEST_NAME} in {store.url}: indexing {len(files)} files, {size / 1e9:.2f} GB")
    manifest = index_dataset(store, listing, progress=progress)
    log(f"Indexed {len(manifest.trials):,} trials in {time.monotonic() - started:.1f} s")
    if not manifest.damaged or keep_damaged:
        try:
            write_manifest(store, manifest)
            log(f"Wrote the index to {store.url}/{MANIFEST_NAME} for the next run")
        except StorageError as error:
            log(f"The index serves this run only: {error}")
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
    files = {key: replace(file, etag=listing[key].etag) for key, file in manifest.files.items()}
    manifest = replace(manifest, files=files)
    with suppress(StorageError):  # the next run need not look again
        write_manifest(store, manifest)
    return manifest


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
        StorageError: a file cannot be read. DataError: no data files.
    """
    listing = store.list() if listing is None else listing
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
            result = FileInspection(key, findings=[finding])
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
    indexed = {}
    for inspection in inspections:
        fitting = []
        for record, its_form in zip(inspection.records, inspection.label_forms, strict=True):
            if record.n_features != width:
                reason = f"has {record.n_features} features where most trials have {width}"
                damaged.append(Finding(record.key, record.trial, reason, "wrong shape"))
            elif its_form not in (form, None):
                reason = f"its labels are in the {its_form} form where most are in the {form} form"
                damaged.append(Finding(record.key, record.trial, reason, "label form"))
            else:
                fitting.append(record)
        trials += fitting
        every = len(fitting) == len(inspection.records)
        info, content = files[inspection.key], inspection.content if every else FileContent()
        indexed[info.key] = IndexedFile(info.key, info.size, info.etag, content=content)
    return TrialManifest(
        TrialTable.of(trials, files, width, form),
        indexed,
        tuple(sorted(damaged, key=lambda f: (f.key, f.trial or ""))),
        tuple(f for i in inspections for f in i.findings if f.kind == LOST),
    )


def refuse_damage(url: str, damaged: Sequence[Finding], exclude: str) -> None:
    """Raise a DataError for the first of what is damaged, if anything is.

    Args:
        exclude: the option that leaves damaged trials out.
    """
    if not damaged:
        return
    more = f" (and {len(damaged) - 1} more findings)" if len(damaged) > 1 else ""
    raise DataError(
        f"{url}/{damaged[0]}{more}; see all with {dataset_command('validate', url)}, repair them, "
        f"or leave them out with {exclude}."
    )


def _inspect_job(
    url: str, key: str, size: int, look: Callable[[np.ndarray], Any] | None
) -> FileInspection:
    data = open_store(url).read(key, 0, size)
    with limited(len(data)):
        return inspect_file(key, data, look)
