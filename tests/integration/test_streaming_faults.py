"""Whatever goes wrong between S3 and the stream, batches are bit-identical or the run says why."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import botocore.utils
import numpy as np
import pytest
import torch
from brain_to_text.dataset.indexing import index_dataset
from brain_to_text.dataset.manifest import TrialManifest
from brain_to_text.errors import DataError, StorageError
from brain_to_text.storage import s3_store
from brain_to_text.storage.retry import RetryPolicy
from brain_to_text.storage.store import open_store
from brain_to_text.streaming import s3_reads
from brain_to_text.streaming.batch import Batch
from brain_to_text.streaming.dataset_s3 import BrainToTextDatasetS3
from brain_to_text.streaming.trial_stream import TrialStream
from support.fault_proxy import FaultProxy, Faults
from support.local_s3 import LocalS3
from support.tiny_data import write_dataset

N_BATCHES = 24
# As the defaults, with shorter pauses, so that a whole matrix of faults takes seconds.
QUICK = RetryPolicy(budget_seconds=60, first_delay_seconds=0.01, longest_delay_seconds=0.1)
IMPATIENT = dataclasses.replace(QUICK, read_timeout_seconds=0.7)


@pytest.fixture(params=["obstore", "s3fs"])
def either_client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to S3, for what each of them does by itself."""
    if request.param == "s3fs":
        monkeypatch.setattr(s3_reads, "_obstore_will_do", lambda bucket: False)
    return request.param


@pytest.fixture
def manifest(tiny_manifest_s3: TrialManifest) -> TrialManifest:
    return tiny_manifest_s3


@contextmanager
def training_batches(
    url: str, manifest: TrialManifest, retry: RetryPolicy = QUICK
) -> Iterator[BrainToTextDatasetS3]:
    stream = TrialStream(open_store(url), manifest, retry=retry)
    trials = [np.array(manifest.select("train", [s])) for s in manifest.sessions]
    dataset = BrainToTextDatasetS3(
        stream, trials, batch_size=8, days_per_batch=2, n_batches=N_BATCHES, seed=5
    )
    try:
        yield dataset
    finally:
        dataset.close()


def expected_batches(folder: Path) -> list[Batch]:
    """The same batches, read from the folder that was uploaded."""
    manifest = index_dataset(open_store(folder))
    with training_batches(str(folder), manifest) as dataset:
        return list(dataset.batches())


def assert_identical(batches: list[Batch], expected: list[Batch]) -> None:
    assert len(batches) == len(expected) == N_BATCHES
    for batch, other in zip(batches, expected, strict=True):
        for name in ("features", "labels", "n_time_steps", "day_indices", "trial_indices"):
            assert torch.equal(getattr(batch, name), getattr(other, name)), name


@pytest.mark.parametrize(
    ("fault", "share"),
    [
        ("slow_down", 0.30),
        ("reset", 0.20),
        ("truncate", 0.20),
        ("short_body", 0.10),
        ("flip", 0.05),
        ("stall", 0.04),
        ("trickle", 0.04),
    ],
)
def test_batches_are_identical_under(
    fault: str, share: float, tiny_dataset, tiny_dataset_s3: str, manifest, fault_proxy: FaultProxy
) -> None:
    fault_proxy.faults = Faults(**{fault: share})
    retry = IMPATIENT if fault in ("stall", "trickle") else QUICK
    with training_batches(tiny_dataset_s3, manifest, retry) as dataset:
        batches = list(dataset.batches())
        counts = dataset.stats.snapshot()
    assert fault_proxy.counts.faults[fault] > 0, "the fault never happened"
    assert_identical(batches, expected_batches(tiny_dataset.folder))
    assert counts.retries >= fault_proxy.counts.faults[fault]
    assert counts.requests == counts.trials_read + counts.retries


def test_batches_are_identical_under_all_faults_at_once_over_tls(
    either_client: str, tiny_dataset, tiny_dataset_s3: str, manifest, tls_fault_proxy: FaultProxy
) -> None:
    tls_fault_proxy.faults = Faults(
        slow_down=0.15, reset=0.1, truncate=0.1, short_body=0.1, flip=0.05, stall=0.02
    )
    with training_batches(tiny_dataset_s3, manifest, IMPATIENT) as dataset:
        batches = list(dataset.batches())
    assert len(tls_fault_proxy.counts.faults) >= 5
    assert_identical(batches, expected_batches(tiny_dataset.folder))


@pytest.mark.slow
def test_batches_are_identical_after_the_server_was_gone_for_20_seconds(
    tiny_dataset, tiny_dataset_s3: str, manifest, fault_proxy: FaultProxy
) -> None:
    with training_batches(
        tiny_dataset_s3, manifest, RetryPolicy(budget_seconds=60, read_timeout_seconds=5)
    ) as dataset:
        batches = dataset.batches()
        received = [next(batches) for _ in range(4)]
        gone = time.monotonic()
        fault_proxy.go_away(20)
        received += list(batches)
        assert time.monotonic() - gone >= 20, "the server was not needed while it was gone"
    assert_identical(received, expected_batches(tiny_dataset.folder))


@pytest.fixture
def provider(fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """Credentials come from the proxy, as a container's do; asking in vain takes no long pause."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", fault_proxy.credentials_url)
    monkeypatch.setattr(botocore.utils.ContainerMetadataFetcher, "SLEEP_TIME", 0.05)
    monkeypatch.setattr(s3_store, "_RENEWAL_INTERVAL_SECONDS", 0.1)
    return fault_proxy


def test_expired_credentials_are_renewed_by_the_provider(
    either_client: str, tiny_dataset, tiny_dataset_s3: str, manifest, provider: FaultProxy
) -> None:
    with training_batches(tiny_dataset_s3, manifest) as dataset:
        batches = dataset.batches()
        received = [next(batches) for _ in range(3)]
        # the token is refused although the provider believes that it is good for another hour
        provider.faults = Faults(rejected_tokens=tuple(provider.tokens))
        received += list(batches)
    assert provider.counts.faults["expired"] > 0
    assert len(provider.tokens) >= 2
    assert_identical(received, expected_batches(tiny_dataset.folder))


def test_a_provider_that_fails_for_a_while_is_asked_again(
    tiny_dataset, tiny_dataset_s3: str, manifest, provider: FaultProxy
) -> None:
    with training_batches(tiny_dataset_s3, manifest) as dataset:
        batches = dataset.batches()
        received = [next(batches) for _ in range(3)]
        provider.faults = Faults(rejected_tokens=tuple(provider.tokens), no_credentials=7)
        received += list(batches)
    assert provider.counts.faults["no_credentials"] == 7
    assert_identical(received, expected_batches(tiny_dataset.folder))


def test_a_provider_that_fails_beyond_the_budget_is_the_cause(
    tiny_dataset_s3: str, manifest, provider: FaultProxy
) -> None:
    retry = dataclasses.replace(QUICK, budget_seconds=6)
    with training_batches(tiny_dataset_s3, manifest, retry) as dataset:
        batches = dataset.batches()
        next(batches)
        provider.faults = Faults(rejected_tokens=tuple(provider.tokens), no_credentials=10**6)
        with pytest.raises(StorageError, match=r"6 s budget, last cause: .*container-role.* 500"):
            list(batches)


def test_credentials_near_their_end_are_renewed_before_a_request_fails(
    tiny_dataset, tiny_dataset_s3: str, manifest, provider: FaultProxy
) -> None:
    provider.token_seconds = 300  # within the provider's own margin: a new token every time
    with training_batches(tiny_dataset_s3, manifest) as dataset:
        batches = list(dataset.batches())
        assert dataset.stats.snapshot().retries == 0
    assert len(provider.tokens) > 1
    assert_identical(batches, expected_batches(tiny_dataset.folder))


@pytest.mark.parametrize(
    ("faults", "cause", "read_timeout"),
    [
        (Faults(slow_down=1.0), "HTTP 503 SlowDown", 30),
        (Faults(short_body=1.0), r"(got \d+ of \d+ bytes|Content-Range)", 30),
        (Faults(stall=1.0), ".", 0.4),
        (Faults(truncate=1.0), ".", 30),
        (Faults(reset=1.0), ".", 30),
    ],
    ids=["throttled", "short", "stalled", "truncated", "reset"],
)
def test_a_fault_that_outlasts_the_budget_is_one_sentence(
    faults: Faults,
    cause: str,
    read_timeout: float,
    tiny_dataset_s3: str,
    manifest,
    fault_proxy: FaultProxy,
) -> None:
    fault_proxy.faults = faults
    retry = RetryPolicy(1.0, read_timeout_seconds=read_timeout, longest_delay_seconds=0.2)
    with training_batches(tiny_dataset_s3, manifest, retry) as dataset:
        with pytest.raises(StorageError) as raised:
            next(dataset.batches())
    assert re.fullmatch(
        r"Reading trial trial_\d{4} of t15\.\S+/data_train\.hdf5 under s3://bucket-\d+/data "
        rf"\(bytes \d+-\d+\) failed after \d+ attempts .*, last cause: .*{cause}.*\.",
        str(raised.value),
    )


def test_a_vanished_server_is_one_sentence_within_the_budget(
    tiny_dataset_s3: str, manifest, fault_proxy: FaultProxy
) -> None:
    fault_proxy.go_away(60)
    time.sleep(0.1)
    with training_batches(tiny_dataset_s3, manifest, RetryPolicy(1.0)) as dataset:
        with pytest.raises(StorageError, match=r"last cause: .*onnect"):
            next(dataset.batches())


def test_bytes_that_stay_wrong_are_reported_after_three_reads(
    tiny_dataset_s3: str, manifest, fault_proxy: FaultProxy
) -> None:
    fault_proxy.faults = Faults(flip=1.0)
    with training_batches(tiny_dataset_s3, manifest) as dataset:
        with pytest.raises(DataError, match=r"CRC-32 is .*, expected .*prepare_dataset.py index"):
            next(dataset.batches())


@pytest.mark.parametrize("etag_hidden", [False, True], ids=["by_etag", "by_crc"])
def test_a_file_replaced_during_the_run_is_detected_and_never_mixed_in(
    etag_hidden: bool,
    tiny_dataset,
    tiny_dataset_s3: str,
    manifest,
    s3_environment: LocalS3,
    fault_proxy: FaultProxy,
    tmp_path: Path,
) -> None:
    fault_proxy.faults = Faults(hide_etag=etag_hidden)
    # the same shapes and sizes, other values
    write_dataset(tmp_path, seed=0)
    expected = expected_batches(tiny_dataset.folder)
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
        with pytest.raises(DataError, match=r"data_train\.hdf5.*prepare_dataset\.py index"):
            received += list(batches)
    for batch, other in zip(received, expected, strict=False):
        assert torch.equal(batch.features, other.features)


def test_data_indexed_in_a_folder_streams_from_s3_after_an_upload(
    tiny_dataset, tiny_dataset_s3: str, fault_proxy: FaultProxy
) -> None:
    manifest = index_dataset(open_store(tiny_dataset.folder))
    with training_batches(tiny_dataset_s3, manifest) as dataset:
        assert_identical(list(dataset.batches()), expected_batches(tiny_dataset.folder))


def test_a_missing_object_is_said_at_once(
    tiny_dataset_s3: str, manifest, s3_environment: LocalS3, fault_proxy: FaultProxy
) -> None:
    served = s3_environment.root / tiny_dataset_s3.removeprefix("s3://")
    for path in served.rglob("data_train.hdf5"):
        path.unlink()
    with training_batches(tiny_dataset_s3, manifest) as dataset:
        with pytest.raises(StorageError, match=r"after 1 attempt .*NoSuchKey.* exists"):
            next(dataset.batches())


def test_leaving_a_run_does_not_wait_for_reads_in_flight(
    tiny_dataset_s3: str, manifest, fault_proxy: FaultProxy
) -> None:
    fault_proxy.faults = Faults(stall=1.0)
    retry = RetryPolicy(budget_seconds=300, read_timeout_seconds=300)
    with training_batches(tiny_dataset_s3, manifest, retry) as dataset, dataset.batches():
        while fault_proxy.counts.ranged_gets < 1:
            time.sleep(0.01)
