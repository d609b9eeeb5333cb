"""Streaming from a real S3 server without faults: what is asked for, how often, by which client."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from brain_to_text.dataset.indexing import index_dataset, load_or_build_manifest
from brain_to_text.dataset.manifest import TrialManifest, write_manifest
from brain_to_text.errors import StorageError
from brain_to_text.storage.store import open_store
from brain_to_text.streaming import s3_reads
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
    monkeypatch.setattr(s3_reads, "_obstore_will_do", lambda bucket: obstore)
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


def test_a_cached_trial_is_never_asked_for_again(
    tiny_dataset_s3: str, manifest: TrialManifest, fault_proxy: FaultProxy
) -> None:
    dataset = open_training(tiny_dataset_s3, manifest, cache=TrialCache(10**8))
    first = list(dataset.batches())
    seen = {i for batch in first for i in batch.trial_indices.tolist()}
    fault_proxy.reset_counts()
    again = list(dataset.batches())
    assert fault_proxy.counts.requests == 0
    assert dataset.stats.snapshot().trials_read == len(seen)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.features, b.features)  # type: ignore[arg-type]
    dataset.close()


def test_a_job_starts_with_one_listing_and_one_manifest(
    tiny_dataset_s3: str, manifest: TrialManifest, fault_proxy: FaultProxy
) -> None:
    store = open_store(tiny_dataset_s3)
    write_manifest(store, manifest)
    fault_proxy.reset_counts()
    lines: list[str] = []
    store = open_store(tiny_dataset_s3)
    manifest = load_or_build_manifest(store, lines.append)
    dataset = open_training(tiny_dataset_s3, manifest)
    assert fault_proxy.counts.requests == 2 and fault_proxy.counts.lists == 1 and not lines
    distinct = len(np.unique(dataset[0].trial_indices))
    dataset.close()
    assert fault_proxy.counts.requests == 2 + distinct


def test_a_server_that_answers_ranges_with_200_is_read_through_s3fs(
    tiny_dataset, tiny_dataset_s3: str, manifest: TrialManifest, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "brain_to_text"):
        with TrialStream(open_store(tiny_dataset_s3), manifest, concurrency=4) as stream:
            arrays = stream.fetch(range(len(manifest.trials)))
            counts = stream.stats.snapshot()
    for trial, features in zip(manifest.trials, arrays, strict=True):
        assert np.array_equal(features, tiny_dataset.features[trial.name])
    # an answer of no use is counted too: to each of the reads that were first
    assert counts.requests == len(manifest.trials) + counts.retries and counts.retries >= 1
    assert [r.message for r in caplog.records] == [
        "Reading through s3fs: the server answers a byte range with status 200"
    ]


def test_a_bucket_of_another_region_is_read_through_s3fs_which_follows(
    tiny_dataset,
    tiny_dataset_s3: str,
    manifest: TrialManifest,
    fault_proxy: FaultProxy,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fault_proxy.faults = Faults(bucket_region="eu-west-1")
    with caplog.at_level(logging.INFO, "brain_to_text"):
        with TrialStream(open_store(tiny_dataset_s3), manifest, concurrency=4) as stream:
            arrays = stream.fetch(range(len(manifest.trials)))
            counts = stream.stats.snapshot()
    for trial, features in zip(manifest.trials, arrays, strict=True):
        assert np.array_equal(features, tiny_dataset.features[trial.name])
    assert [r.message for r in caplog.records] == [
        "Reading through s3fs: the bucket is in another region than AWS_REGION"
    ]
    # s3fs's client learns the region from its first answers and keeps it
    assert counts.requests == len(manifest.trials) + counts.retries
    assert fault_proxy.counts.faults["redirect"] < 2 * len(manifest.trials)


def test_what_only_botocore_knows_is_read_through_s3fs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = tmp_path / "config"
    monkeypatch.setenv("AWS_CONFIG_FILE", str(profile))
    profile.write_text("[default]\nregion = us-east-1\n")
    assert s3_reads._obstore_will_do("bucket")
    assert not s3_reads._obstore_will_do("arn:aws:s3:us-east-1:111122223333:accesspoint/data")
    assert not s3_reads._obstore_will_do("bucket--use1-az4--x-s3")
    profile.write_text("[default]\nendpoint_url = http://127.0.0.1:9000\n")
    assert not s3_reads._obstore_will_do("bucket")
    profile.write_text("[default]\nregion = us-east-1\n")
    monkeypatch.setenv("AWS_USE_FIPS_ENDPOINT", "true")
    assert not s3_reads._obstore_will_do("bucket")


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


def test_no_credentials_is_one_sentence_at_once(
    tiny_dataset_s3: str, manifest: TrialManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match=r"credentials.*aws configure"):
        TrialStream(open_store(tiny_dataset_s3), manifest)


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


def test_counts_of_an_interval_are_a_difference() -> None:
    from brain_to_text.streaming.stream_stats import StreamStats

    stats = StreamStats()
    stats.add(requests=3, cache_hits=1)
    before = stats.snapshot()
    stats.add(requests=2, cache_misses=1, cache_hits=3)
    interval = stats.snapshot() - before
    assert interval.requests == 2 and interval.hit_rate == 0.75
    assert "2 GETs" in interval.describe()
