"""Manifests of datasets that nobody indexed where they lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from brain_to_text.dataset.manifest import IndexedFile, TrialManifest
from brain_to_text.dataset.trial_record import TrialRecord
from brain_to_text.dataset.trial_table import TrialTable
from brain_to_text.storage.locations import ObjectInfo


def manifest_of(
    records: Iterable[TrialRecord],
    files: Mapping[str, ObjectInfo],
    n_features: int,
    label_form: str = "self_loop",
) -> TrialManifest:
    """Of records that were made up; `files` as they are listed."""
    indexed = {info.key: IndexedFile(info.key, info.size, info.etag) for info in files.values()}
    return TrialManifest(TrialTable.of(records, indexed, n_features, label_form), indexed)


def uploaded(manifest: TrialManifest, listing: Mapping[str, ObjectInfo]) -> TrialManifest:
    """As if its files had been indexed where they are listed now."""
    etags = {key: listing[key].etag for key in manifest.files}
    files = {key: dataclasses.replace(manifest.files[key], etag=etags[key]) for key in etags}
    return dataclasses.replace(manifest, files=files)
