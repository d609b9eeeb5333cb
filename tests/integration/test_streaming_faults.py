"""Whatever goes wrong between S3 and the stream, batches are bit-identical or the run says why."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import botocore.utils
import numpy as np
import pytest
import torch
from brain_to_text.dataset.manifest import TrialManifest
from brain_to_text.errors import DataError, StorageError
from brain_to_text.storage import s3_clients
from brain_to_text.storage.retry import RetryPolicy
from brain_to_text.storage.store import open_store
from brain_to_text.streaming.batch import Batch
from brain_to_text.streaming.dataset_s3 import BrainToTextDatasetS3
from brain_to_text.streaming.trial_stream import TrialStream
from support.fault_proxy import FaultProxy, Faults
from support.local_s3 import LocalS3

N_BATCHES = 24
# As the defaults, with shorter pauses; a busy machine has all the time that it needs.
PATIENT = RetryPolicy(600, 60, first_delay_seconds=0.01, longest_delay_seconds=0.1)
ONCE = dataclasses.replace(PATIENT, budget_seconds=0)  # three attempts, however long they take


@pytest.fixture(params=["obstore", "s3fs"])
def either_client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to S3, for what each of them does by itself."""
    if request.param == "s3fs":
        monkeypatch.setattr(s3_clients, "_obstore_will_do", lambda bucket: False)
    return request.param


@pytest.fixture
def manifest(tiny_manifest_s3: TrialManifest) -> TrialManifest:
    return tiny_manifest_s3


@contextmanager
def training_batches(
    url: str, manifest: TrialManifest, retry: RetryPolicy = PATIENT
) -> Iterator[BrainToTextDatasetS3]:
    stream = TrialStream(open_store(url, retry=retry), manifest)
    trials = [np.array(manifest.select("train", [s])) for s in manifest.sessions]
    dataset = BrainToTextDatasetS3(
        stream, trials, batch_size=8, days_per_batch=2, n_batches=N_BATCHES, seed=5
    )
    try:
        yield dataset
    finally:
        dataset.close()


@pytest.fixture(scope="module")
def expected(tiny_dataset, tiny_manifest) -> list[Batch]:
    """The same batches, read from the folder that was uploaded."""
    with training_batches(str(tiny_dataset.folder), tiny_manifest) as dataset:
        return list(dataset.batches())


def assert_identical(batches: list[Batch], expected: list[Batch]) -> None:
    assert len(batches) == len(expected) == N_BATCHES
    for batch, other in zip(batches, expected, strict=True):
        for name in ("features", "labels", "n_time_steps", "day_indices", "trial_indices"):
            assert torch.equal(getattr(batch, name), getattr(other, name)), name


def test_batches_are_identical_under_all_faults_at_once_over_tls(
    either_client: str, expected, tiny_dataset_s3: str, manifest, tls_fault_proxy: FaultProxy
) -> None:
    tls_fault_proxy.faults = Faults(
        slow_down=0.15, reset=0.1, truncate=0.1, short_body=0.1, flip=0.05, stall=0.02, trickle=0.02
    )
    retry = dataclasses.replace(PATIENT, read_timeout_seconds=1, slowest_bytes_per_second=1e8)
    with training_batches(tiny_dataset_s3, manifest, retry) as dataset:
        batches = list(dataset.batches())
        counts = dataset.stats.snapshot()
    assert_identical(batches, expected)
    faults = tls_fault_proxy.counts.faults
    assert len(faults) == 7, "a fault never happened"
    assert counts.retries >= faults.total()


def test_batches_are_identical_after_the_server_was_gone(
    expected, tiny_dataset_s3: str, manifest, fault_proxy: FaultProxy
) -> None:
    with training_batches(tiny_dataset_s3, manifest) as dataset:
        batches = dataset.batches()
        received = [next(batches) for _ in range(4)]
        fault_proxy.go_away(1)
        received += list(batches)
        assert dataset.stats.snapshot().retries, "the server was not needed while it was gone"
    assert_identical(received, expected)


@pytest.fixture
def provider(fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """Credentials come from the proxy, as a container's do; asking in vain takes no long pause."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", fault_proxy.credentials_url)
    monkeypatch.setattr(botocore.utils.ContainerMetadataFetcher, "SLEEP_TIME", 0.05)
    monkeypatch.setattr(s3_clients, "_RENEWAL_INTERVAL_SECONDS", 0.1)
    return fault_proxy


@pytest.mark.parametrize("provider_failures", [0, 7])
def test_expired_credentials_are_renewed_by_a_provider_that_may_fail_for_a_while(
    provider_failures: int,
    either_client: str,
    expected,
    tiny_dataset_s3: str,
    manifest,
    provider: FaultProxy,
) -> None:
    with training_batches(tiny_dataset_s3, manifest) as dataset:
        batches = dataset.batches()
        received = [next(batches) for _ in range(3)]
        # the token is refused although the provider believes that it is good for another hour
        provider.faults = Faults(
            rejected_tokens=tuple(provider.tokens), no_credentials=provider_failures
        )
        received += list(batches)
    assert provider.counts.faults["expired"] > 0
    assert provider.counts.faults["no_credentials"] == provider_failures
    assert len(provider.tokens) >= 2
    assert_identical(received, expected)


def test_a_provider_that_fails_beyond_the_budget_is_the_cause(
    tiny_dataset_s3: str, manifest, provider: FaultProxy
) -> None:
    with training_batches(tiny_dataset_s3, manifest, ONCE) as dataset:
        batches = dataset.batches()
        next(batches)
        provider.faults = Faults(rejected_tokens=tuple(provider.tokens), no_credentials=10**6)
        with pytest.raises(StorageError, match=r"cannot be renewed.* 500.*aws sso login"):
            list(batches)


def test_credentials_near_their_end_are_renewed_before_a_request_fails(
    expected, tiny_dataset_s3: str, manifest, provider: FaultProxy
) -> None:
    provider.token_seconds = 300  # within the provider's own margin: a new token every time
    with training_batches(tiny_dataset_s3, manifest) as dataset:
        batches = list(dataset.batches())
        assert dataset.stats.snapshot().retries == 0
    assert len(provider.tokens) > 1
    assert_identical(batches, expected)


def test_a_fault_that_outlasts_the_budget_is_one_sentence(
    tiny_dataset_s3: str, manifest, fault_proxy: FaultProxy
) -> None:
    fault_proxy.faults = Faults(slow_down=1.0)
    with training_batches(tiny_dataset_s3, manifest, ONCE) as dataset:
        with pytest.raises(StorageError) as raised:
            next(dataset.batches())
    assert re.fullmatch(
        r"Cannot read trial_\d{4} \(bytes \d+-\d+\) of "
        r"s3://bucket-\d+/data/t15\.\S+/data_train\.hdf5: HTTP 503 SlowDown.*, after 3 attempts "
        r"in .* s; start the job again to resume, or raise dataset\.retry_budget_seconds\.",
        str(raised.value),
    )


def test_bytes_that_stay_wrong_are_reported(
    tiny_dataset_s3: str, manifest, fault_proxy: FaultProxy
) -> None:
    fault_proxy.faults = Faults(flip=1.0)
    with training_batches(tiny_dataset_s3, manifest, ONCE) as dataset:
        with pytest.raises(DataError, match=r"CRC-32 is .*, expected .*prepare_dataset.py index"):
            next(dataset.batches())


@pytest.mark.parametrize("etag_hidden", [False, True], ids=["by_etag", "by_crc"])
def test_a_file_replaced_during_the_run_is_detected_and_never_mixed_in(
    etag_hidden: bool,
    expected,
    tiny_dataset_s3: str,
    manifest,
    s3_environment: LocalS3,
    fault_proxy: FaultProxy,
) -> None:
    fault_proxy.faults = Faults(hide_etag=etag_hidden)
    with training_batches(tiny_dataset_s3, manifest) as dataset:
        batches = dataset.batches()
        received = [next(batches) for _ in range(2)]
        served = s3_environment.root / tiny_dataset_s3.removeprefix("s3://")
        for path in served.rglob("data_train.hdf5"):
            content = bytearray(path.read_bytes())
            for trial in manifest.trials:
                if trial.key == path.relative_to(served).as_posix():
                    content[trial.offset + 5] ^= 1
            path.write_bytes(content)
        with pytest.raises(DataError, match=r"data_train\.hdf5.*prepare_dataset\.py index s3://b"):
            received += list(batches)
    for batch, other in zip(received, expected, strict=False):
        assert torch.equal(batch.features, other.features)


def test_data_indexed_in_a_folder_streams_from_s3_after_an_upload(
    tiny_manifest, expected, tiny_dataset_s3: str, fault_proxy: FaultProxy
) -> None:
    with training_batches(tiny_dataset_s3, tiny_manifest) as dataset:
        assert_identical(list(dataset.batches()), expected)


def test_leaving_a_run_does_not_wait_for_reads_in_flight(
    tiny_dataset_s3: str, manifest, fault_proxy: FaultProxy
) -> None:
    fault_proxy.faults = Faults(stall=1.0)
    retry = RetryPolicy(budget_seconds=10_000, read_timeout_seconds=10_000)
    with training_batches(tiny_dataset_s3, manifest, retry) as dataset, dataset.batches():
        while fault_proxy.counts.ranged_gets < 1:
            time.sleep(0.01)
