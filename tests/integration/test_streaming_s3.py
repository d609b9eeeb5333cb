"""Streaming from a real S3 server without faults: what is asked for, how often, by which client."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from brain_to_text.dataset.indexing import index_dataset, load_or_build_manifest
from brain_to_text.dataset.manifest import TrialManifest, write_manifest
from brain_to_text.errors import StorageError
from brain_to_text.storage import s3_clients
from brain_to_text.storage.store import open_store
from brain_to_text.streaming.dataset_s3 import BrainToTextDatasetS3
from brain_to_text.streaming.trial_cache import TrialCache
from brain_to_text.streaming.trial_stream import TrialStream
from support.fault_proxy import FaultProxy, Faults
from support.tiny_data import write_dataset


@pytest.fixture
def manifest(tiny_manifest_s3: TrialManifest) -> TrialManifest:
    return tiny_manifest_s3


def open_training(url: str, manifest: TrialManifest, **options) -> BrainToTextDatasetS3:
    trials = [np.array(manifest.select("train", [s])) for s in manifest.sessions]
    stream = TrialStream(open_store(url), manifest, **options)
    return BrainToTextDatasetS3(
        stream, trials, batch_size=8, days_per_batch=2, n_batches=10, seed=5
    )


@pytest.mark.parametrize("obstore", [True, False], ids=["obstore", "s3fs"])
def test_one_get_per_distinct_trial_and_nothing_else(
    obstore: bool,
    tiny_dataset_s3: str,
    manifest: TrialManifest,
    tls_fault_proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3_clients, "_obstore_will_do", lambda bucket: obstore)
    dataset = open_training(tiny_dataset_s3, manifest, concurrency=4)
    tls_fault_proxy.reset_counts()
    distinct = 0
    with dataset.batches() as batches:
        for batch in batches:
            distinct += len(np.unique(batch.trial_indices))
    counts, ours = tls_fault_proxy.counts, dataset.stats.snapshot()
    dataset.close()
    assert counts.requests == counts.ranged_gets == ours.requests <= distinct
    assert counts.body_bytes == ours.bytes_fetched == ours.bytes_needed
    assert counts.connections < counts.requests / 2, "connections are not reused"


def test_a_job_starts_with_one_listing_and_one_manifest_and_reads_a_cached_trial_once(
    tiny_dataset_s3: str, manifest: TrialManifest, fault_proxy: FaultProxy
) -> None:
    write_manifest(open_store(tiny_dataset_s3), manifest)
    fault_proxy.reset_counts()
    lines: list[str] = []
    manifest = load_or_build_manifest(open_store(tiny_dataset_s3), lines.append)
    dataset = open_training(tiny_dataset_s3, manifest, cache=TrialCache(10**8))
    assert fault_proxy.counts.requests == 2 and fault_proxy.counts.lists == 1 and not lines
    first, again = list(dataset.batches()), list(dataset.batches())
    seen = {i for batch in first for i in batch.trial_indices.tolist()}
    assert fault_proxy.counts.requests == 2 + len(seen)
    assert dataset.stats.snapshot().trials_read == len(seen)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.features, b.features)  # type: ignore[arg-type]
    dataset.close()


@pytest.mark.parametrize(
    ("reason", "faults"),
    [
        ("the server answers a byte range with status 200", None),  # as rclone does by itself
        (
            "the bucket is in another region than AWS_REGION",
            Faults(bucket_region="eu-west-1"),
        ),
    ],
)
def test_what_obstore_cannot_read_is_read_through_s3fs(
    reason: str,
    faults: Faults | None,
    request: pytest.FixtureRequest,
    tiny_dataset,
    tiny_dataset_s3: str,
    manifest: TrialManifest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if faults is not None:
        request.getfixturevalue("fault_proxy").faults = faults
    with caplog.at_level(logging.INFO, "brain_to_text"):
        with TrialStream(open_store(tiny_dataset_s3), manifest, concurrency=4) as stream:
            arrays = stream.fetch(range(len(manifest.trials)))
            counts = stream.stats.snapshot()
    for trial, features in zip(manifest.trials, arrays, strict=True):
        assert np.array_equal(features, tiny_dataset.features[trial.name])
    # an answer of no use is counted too: to each of the reads that were first
    assert 1 <= counts.retries <= 4
    assert [r.message for r in caplog.records] == [f"Reading through s3fs: {reason}"]


def test_what_only_botocore_knows_is_read_through_s3fs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = tmp_path / "config"
    monkeypatch.setenv("AWS_CONFIG_FILE", str(profile))
    profile.write_text("[default]\nregion = us-east-1\n")
    assert s3_clients._obstore_will_do("bucket")
    assert not s3_clients._obstore_will_do("arn:aws:s3:us-east-1:111122223333:accesspoint/data")
    assert not s3_clients._obstore_will_do("bucket--use1-az4--x-s3")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "obstore", None)  # as where it is not installed
        assert not s3_clients._obstore_will_do("bucket")
    monkeypatch.setenv("AWS_USE_FIPS_ENDPOINT", "true")
    assert not s3_clients._obstore_will_do("bucket")


def test_an_endpoint_from_a_profile_is_used(
    tiny_dataset_s3: str,
    manifest: TrialManifest,
    fault_proxy: FaultProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    profile = tmp_path / "config"
    profile.write_text(f"[default]\nendpoint_url = {fault_proxy.url}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(profile))
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    fault_proxy.reset_counts()
    with TrialStream(open_store(tiny_dataset_s3), manifest) as stream:
        stream.fetch([0, 1])
    assert fault_proxy.counts.ranged_gets == 2
    assert open_store(tiny_dataset_s3).list()
    assert fault_proxy.counts.lists == 1


def test_no_credentials_is_one_sentence(
    tiny_dataset_s3: str, manifest: TrialManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    store = open_store(tiny_dataset_s3)
    with pytest.raises(StorageError, match=r"no AWS credentials.*aws configure"):
        store.list()
    with TrialStream(store, manifest) as stream:
        with pytest.raises(StorageError, match=r"no AWS credentials.*aws configure"):
            stream.fetch([0])


def test_gzipped_half_precision_is_still_one_get_per_trial(
    s3_prefix: str, upload, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    written = write_dataset(tmp_path, layout="gzip", dtype="<f2")
    upload(tmp_path, s3_prefix)
    manifest = index_dataset(open_store(s3_prefix))
    fault_proxy.reset_counts()
    with TrialStream(open_store(s3_prefix), manifest) as stream:
        arrays = stream.fetch(range(len(manifest.trials)))
    assert fault_proxy.counts.requests == len(manifest.trials)
    for trial, features in zip(manifest.trials, arrays, strict=True):
        assert np.array_equal(features, written[trial.name])
