"""The promise of the data side: the batch at a step is the same, however it came about."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from brain_to_text.config import TrainingConfig
from brain_to_text.dataset.indexing import index_dataset
from brain_to_text.dataset.manifest import TrialManifest
from brain_to_text.errors import DataError, StorageError
from brain_to_text.storage.store import open_store
from brain_to_text.streaming.batch import Batch
from brain_to_text.streaming.dataset_s3 import (
    BrainToTextDatasetS3,
    EvaluationDatasetS3,
    StreamedBatches,
)
from brain_to_text.streaming.prefetch import PrefetchLimits
from brain_to_text.streaming.trial_cache import TrialCache
from brain_to_text.streaming.trial_stream import TrialStream
from support.small_data import LAYOUTS
from support.tiny_data import append_in_turns, write_dataset

N_BATCHES = 8
Open = Callable[..., BrainToTextDatasetS3]


@pytest.fixture
def manifest(tiny_manifest: TrialManifest) -> TrialManifest:
    return tiny_manifest


def by_session(manifest: TrialManifest, split: str = "train") -> list[np.ndarray]:
    return [np.array(manifest.select(split, [s]), np.int64) for s in manifest.sessions]


@pytest.fixture
def open_dataset(tiny_dataset, manifest: TrialManifest) -> Iterator[Open]:
    """open_dataset(threads=…, cache_bytes=…, …): a training set over the tiny dataset."""
    opened = []

    def open_it(threads: int = 4, cache_bytes: int = 0, **options):
        stream = TrialStream(
            open_store(tiny_dataset.folder),
            manifest,
            cache=TrialCache(cache_bytes),
            threads=threads,
            concurrency=threads,
        )
        defaults = {
            "batch_size": 12,
            "days_per_batch": 2,
            "n_batches": N_BATCHES,
            "seed": 7,
            "limits": PrefetchLimits(threads=threads),
        }
        dataset = BrainToTextDatasetS3(stream, by_session(manifest), **{**defaults, **options})
        opened.append(dataset)
        return dataset

    yield open_it
    for dataset in opened:
        dataset.close()


def assert_equal(batches: list[Batch], expected: list[Batch]) -> None:
    assert [b.step for b in batches] == [b.step for b in expected]
    for batch, other in zip(batches, expected, strict=True):
        for field in dataclasses.fields(Batch):
            mine, theirs = getattr(batch, field.name), getattr(other, field.name)
            if isinstance(theirs, torch.Tensor):
                assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), field.name


def trials_of(batch: Batch) -> list[tuple[int, bytes]]:
    """Index and feature bytes of every trial, without the padding."""
    return [
        (int(index), features[:n_bins].numpy().tobytes())
        for index, features, n_bins in zip(
            batch.trial_indices, batch.features, batch.n_time_steps, strict=True
        )
    ]


@pytest.fixture
def expected(open_dataset: Open) -> list[Batch]:
    dataset = open_dataset(threads=1)
    return [dataset[step] for step in range(N_BATCHES)]


def test_a_batch_holds_what_the_files_hold(
    tiny_dataset, manifest: TrialManifest, expected: list[Batch]
) -> None:
    for batch in expected:
        assert batch.labels is not None
        for row, index in enumerate(batch.trial_indices.tolist()):
            trial = manifest.trials[index]
            features = tiny_dataset.features[trial.name]
            n_bins, n_labels = int(batch.n_time_steps[row]), int(batch.label_lengths[row])
            assert n_bins == len(features)
            assert np.array_equal(batch.features[row, :n_bins].numpy(), features)
            assert not batch.features[row, n_bins:].any()
            assert np.array_equal(batch.labels[row, :n_labels].numpy(), trial.class_ids)
            assert not batch.labels[row, n_labels:].any()
            assert manifest.sessions[int(batch.day_indices[row])] == trial.session
        assert batch.features.shape[1] == int(batch.n_time_steps.max())
        assert batch.features.dtype == torch.float32 and batch.labels.dtype == torch.int64


@pytest.mark.parametrize(("threads", "cache_bytes"), [(16, 0), (4, 200_000), (4, 10**8)])
def test_batches_are_the_same_on_any_threads_and_cache(
    threads: int, cache_bytes: int, open_dataset: Open, expected: list[Batch]
) -> None:
    dataset = open_dataset(threads=threads, cache_bytes=cache_bytes)
    assert_equal(list(dataset.batches()), expected)
    assert_equal(list(dataset.batches()), expected)  # now from the cache
    counts = dataset.stats.snapshot()
    assert counts.requests == counts.trials_read
    if cache_bytes == 10**8:
        assert counts.requests == len({i for b in expected for i in b.trial_indices.tolist()})


def test_batches_are_the_same_after_a_restart(open_dataset: Open, expected: list[Batch]) -> None:
    assert_equal(list(open_dataset().batches(start=3)), expected[3:])


def test_the_union_over_ranks_is_the_same_batch_and_each_trial_is_read_once(
    open_dataset: Open, expected: list[Batch]
) -> None:
    ranks = [open_dataset(rank=r, world_size=3) for r in range(3)]
    for step in range(N_BATCHES):
        parts = [trial for dataset in ranks for trial in trials_of(dataset[step])]
        assert sorted(parts) == sorted(trials_of(expected[step]))
    read = sum(dataset.stats.snapshot().trials_read for dataset in ranks)
    assert read == sum(len(np.unique(batch.trial_indices)) for batch in expected)


@pytest.mark.parametrize("ram", [0.5, 2.0], ids=["too_little", "enough"])
def test_a_validation_pass_leaves_training_trials_their_cache(
    ram: float, tiny_dataset, manifest: TrialManifest
) -> None:
    config = TrainingConfig(num_training_batches=200)
    config.dataset.batch_size, config.dataset.days_per_batch = 6, 2
    everything = sum(manifest.trials[i].feature_bytes for i in manifest.select("train"))
    config.dataset.cache_gb = ram * everything / 1e9
    store = open_store(tiny_dataset.folder)
    hits = []
    for validate_first in (True, False):
        stream = TrialStream.from_config(store, manifest, config.dataset)
        training = BrainToTextDatasetS3.from_config(stream, by_session(manifest), config)
        val = manifest.select("val")
        if validate_first:
            stream.fetch(val)
        list(training.batches(0, 100))
        before = stream.stats.snapshot()
        list(training.batches(100))
        hits.append((stream.stats.snapshot() - before).hit_rate)
        before = stream.stats.snapshot()
        stream.fetch(val)
        stream.fetch(val)
        again = stream.stats.snapshot() - before
        expected_hits = len(val) * (1 + validate_first) if ram > 1 else 0
        assert again.cache_hits == expected_hits
        training.close()
    assert hits[0] == pytest.approx(hits[1], abs=0.1) and hits[0] > 0.4 * min(ram, 2)


@pytest.mark.parametrize(
    ("layout", "dtype"), [*((layout, "<f4") for layout in LAYOUTS), ("gzip", "<f2")]
)
def test_every_layout_is_one_read_per_trial(layout: str, dtype: str, tmp_path: Path) -> None:
    written = write_dataset(tmp_path, layout=layout, dtype=dtype)
    manifest = index_dataset(open_store(tmp_path))
    with TrialStream(open_store(tmp_path), manifest) as stream:
        arrays = stream.fetch(range(len(manifest.trials)))
        counts = stream.stats.snapshot()
    for trial, features in zip(manifest.trials, arrays, strict=True):
        assert np.array_equal(features, written[trial.name])
        assert features.dtype == np.dtype(dtype) and not features.flags.writeable
    assert counts.requests == len(manifest.trials)
    assert counts.bytes_fetched == sum(trial.length for trial in manifest.trials)


def test_what_lies_between_a_trials_chunks_is_fetched_but_not_needed(tmp_path: Path) -> None:
    written = write_dataset(tmp_path)
    for path in tmp_path.rglob("*.hdf5"):
        append_in_turns(path)
    manifest = index_dataset(open_store(tmp_path))
    with TrialStream(open_store(tmp_path), manifest) as stream:
        arrays = stream.fetch(range(len(manifest.trials)))
        counts = stream.stats.snapshot()
    for trial, features in zip(manifest.trials, arrays, strict=True):
        assert np.array_equal(features, written[trial.name])
    stored = 0
    for path in tmp_path.rglob("*.hdf5"):
        with h5py.File(path) as file:
            stored += sum(t["input_features"].id.get_storage_size() for t in file.values())
    assert counts.bytes_needed == stored
    assert counts.bytes_fetched == sum(trial.length for trial in manifest.trials) > 2 * stored


def test_a_trial_drawn_twice_is_read_once(tiny_dataset, manifest: TrialManifest) -> None:
    with TrialStream(open_store(tiny_dataset.folder), manifest) as stream:
        a, b, c = stream.fetch([3, 5, 3])
        assert a is c and a is not b
        assert stream.stats.snapshot().requests == 2


def test_feature_subset_picks_columns_in_order(
    manifest: TrialManifest, open_dataset: Open, expected: list[Batch]
) -> None:
    subset = [30, 2, 7]
    for batch, whole in zip(open_dataset(feature_subset=subset).batches(), expected, strict=True):
        assert torch.equal(batch.features, whole.features[..., subset])


def held_bytes(manifest: TrialManifest, batches: list[np.ndarray]) -> int:
    """Memory of batches under way: padded to the longest trial, and each trial read or decoded."""
    held = 0
    for trials in batches:
        records = [manifest.trials[i] for i in trials]
        held += len(records) * max(record.feature_bytes for record in records)
        distinct = {r.name: max(r.feature_bytes, r.length) for r in records}
        held += sum(distinct.values())
    return held


def begun(dataset: StreamedBatches, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Trials of the batches that are under way before the first one is taken."""
    submitted: list[np.ndarray] = []

    def submit(indices: np.ndarray) -> concurrent.futures.Future[list[np.ndarray]]:
        submitted.append(indices)
        return concurrent.futures.Future()

    with monkeypatch.context() as patch:
        patch.setattr(dataset.stream, "submit", submit)
        dataset.batches().close()
    return submitted


def test_training_and_validation_share_the_bytes_of_decoded_batches_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path, layout="gzip", scale=0)
    manifest = index_dataset(open_store(tmp_path))
    config = TrainingConfig(num_training_batches=100)
    config.dataset.batch_size, config.dataset.days_per_batch = 2, 2
    config.dataset.prefetch_batches, config.dataset.prefetch_mb = 100, 0.4
    stream = TrialStream.from_config(open_store(tmp_path), manifest, config.dataset)
    datasets = {
        0.75: BrainToTextDatasetS3.from_config(stream, by_session(manifest), config),
        0.25: EvaluationDatasetS3.from_config(stream, by_session(manifest, "val"), config),
    }
    for share, dataset in datasets.items():
        ahead = begun(dataset, monkeypatch)
        following = dataset.trial_indices(len(ahead))
        held = [held_bytes(manifest, batches) for batches in (ahead, [*ahead, following])]
        assert held[0] <= share * 400_000 < held[1]
    assert len(datasets[0.75]) == 100
    with pytest.raises(IndexError):
        datasets[0.75][100]
    stream.close()


def test_validation_holds_every_trial_once_on_any_number_of_ranks(
    tiny_dataset, manifest: TrialManifest
) -> None:
    with TrialStream(open_store(tiny_dataset.folder), manifest) as stream:
        trials = by_session(manifest, "val")
        alone = list(EvaluationDatasetS3(stream, trials, batch_size=2).batches())
        assert sorted(i for b in alone for i in b.trial_indices.tolist()) == sorted(
            np.concatenate(trials).tolist()
        )
        ranks = [
            list(EvaluationDatasetS3(stream, trials, batch_size=2, rank=r, world_size=3))
            for r in range(3)
        ]
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
    for i, batch in enumerate(alone):
        assert torch.equal(batch.features, ranks[i % 3][i // 3].features)


def test_a_copied_folder_is_the_same_data_and_a_changed_byte_is_not(tmp_path: Path) -> None:
    write_dataset(tmp_path / "here")
    manifest = index_dataset(open_store(tmp_path / "here"))
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copyfile)
    there = open_store(tmp_path / "there")
    manifest.check_fresh(there.list(), there.url)
    trial = manifest.trials[0]
    with TrialStream(there, manifest) as stream:
        stream.fetch(range(len(manifest.trials)))
        path = tmp_path / "there" / trial.key
        content = bytearray(path.read_bytes())
        content[trial.offset + 5] ^= 1
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"are not those in the manifest.*dataset\.py index"):
            stream.fetch([0])


def test_a_closed_stream_and_a_fork_are_refused(tiny_dataset, manifest: TrialManifest) -> None:
    stream = TrialStream(open_store(tiny_dataset.folder), manifest)
    stream.close()
    stream.close()
    with pytest.raises(StorageError, match="closed"):
        stream.fetch([0])
    stream._process += 1  # what a fork looks like, without forking a process with threads
    with pytest.raises(StorageError, match="forked"):
        stream.fetch([0])
