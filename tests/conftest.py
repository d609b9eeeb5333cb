"""Fixtures that several test files share: an S3 server, a place in it, small datasets, faults."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from brain_to_text.dataset.indexing import index_dataset
from brain_to_text.dataset.manifest import TrialManifest
from brain_to_text.storage.locations import ObjectInfo
from brain_to_text.storage.store import open_store
from support.fault_proxy import FaultProxy, run_proxy
from support.local_s3 import LocalS3, make_certificate, serve_s3
from support.manifests import uploaded
from support.tiny_data import write_dataset

# a loaded machine is slow, not wrong; and the same examples everywhere
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")

_numbers = itertools.count()


@dataclass(frozen=True)
class TinyDataset:
    """A dataset in a folder, and what was written there.

    Attributes:
        folder: SESSION/data_{train,val}.hdf5; three sessions of 8 and 3 trials.
        features: by trial name, "SESSION/data_train.hdf5:trial_0000".
    """

    folder: Path
    features: dict[str, np.ndarray]


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name no case by its bytes: gzip writes the time there, and workers must agree on names."""
    return "bytes" if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """The toolkit writes PYTHONPATH and more into the process it runs in: not for the next test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    """rclone's S3 server over an empty folder, for the whole session."""
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_environment(s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch) -> LocalS3:
    """Sends the standard provider chain of this process to `s3_server`."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def s3_bucket(s3_environment: LocalS3) -> str:
    """The name of an empty bucket of this test's own."""
    name = f"bucket-{next(_numbers)}"
    s3_environment.make_bucket(name)
    return name


@pytest.fixture
def s3_prefix(s3_bucket: str) -> str:
    """ "s3://BUCKET/data": an empty prefix of this test's own."""
    return f"s3://{s3_bucket}/data"


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> TinyDataset:
    """Contiguous float32; read only."""
    folder = tmp_path_factory.mktemp("tiny")
    return TinyDataset(folder, write_dataset(folder))


@pytest.fixture
def upload(s3_environment: LocalS3) -> Callable[[Path, str], None]:
    """upload(folder, "s3://bucket/prefix"): puts a folder's files where the server serves them."""

    def copy(folder: Path, url: str) -> None:
        target = s3_environment.root / url.removeprefix("s3://")
        shutil.copytree(folder, target, dirs_exist_ok=True)

    return copy


@pytest.fixture
def tiny_dataset_s3(
    tiny_dataset: TinyDataset, s3_prefix: str, upload: Callable[[Path, str], None]
) -> str:
    """The tiny dataset under a prefix of this test's own: its URL."""
    upload(tiny_dataset.folder, s3_prefix)
    return s3_prefix


@pytest.fixture(scope="session")
def tiny_manifest(tiny_dataset: TinyDataset) -> TrialManifest:
    """The manifest of the tiny dataset in its folder."""
    return index_dataset(open_store(tiny_dataset.folder))


@pytest.fixture(scope="session")
def tiny_manifest_s3(tiny_dataset: TinyDataset, tiny_manifest: TrialManifest) -> TrialManifest:
    """The manifest as if the dataset had been indexed on S3, whose ETags are MD5 sums."""
    store = open_store(tiny_dataset.folder)
    sums = {key: hashlib.md5(store.read(key)).hexdigest() for key in tiny_manifest.files}
    listing = {key: ObjectInfo(key, 0, etag) for key, etag in sums.items()}
    return uploaded(tiny_manifest, listing)


@pytest.fixture
def fault_proxy(s3_environment: LocalS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy without faults in front of `s3_server`, and this process's endpoint set to it."""
    with run_proxy(s3_environment.endpoint_url) as proxy:
        _use_endpoint(monkeypatch, proxy.url)
        yield proxy


@pytest.fixture
def tls_fault_proxy(
    s3_environment: LocalS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[FaultProxy]:
    """As `fault_proxy`, over TLS with a certificate that this process trusts."""
    certificate = make_certificate(tmp_path, "127.0.0.1")
    with run_proxy(s3_environment.endpoint_url, certificate=certificate) as proxy:
        _use_endpoint(monkeypatch, proxy.url)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate[0]))
        yield proxy


def _use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
