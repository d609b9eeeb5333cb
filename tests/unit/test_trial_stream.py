"""One trial's way through the stream, with a store that does as it is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest
from brain_to_text.dataset.manifest import TrialManifest
from brain_to_text.errors import StorageError
from brain_to_text.storage.retry import RequestError, RetryPolicy
from brain_to_text.storage.store import LocalStore
from brain_to_text.streaming.trial_stream import TrialStream


class Store(LocalStore):
    """A folder; before each attempt at a trial it runs the next of `misfortunes`."""

    def __init__(
        self,
        folder: Path,
        misfortunes: Iterator[Callable[[], None]],
        retry: RetryPolicy | None = None,
    ) -> None:
        super().__init__(folder, retry)
        self._misfortunes = misfortunes
        self.reads = 0

    def read_range(self, key: str, offset: int, length: int, etag: str) -> bytes:
        self.reads += 1
        misfortune = next(self._misfortunes, None)
        if misfortune is not None:
            misfortune()
        return super().read_range(key, offset, length, etag)


def throttled() -> None:
    raise RequestError("HTTP 503 SlowDown")


@pytest.fixture
def manifest(tiny_manifest: TrialManifest) -> TrialManifest:
    return tiny_manifest


def test_a_budget_that_is_over_at_once_leaves_three_attempts(
    tiny_dataset, manifest: TrialManifest
) -> None:
    for failures, works in ((2, True), (3, False)):
        store = Store(tiny_dataset.folder, iter([throttled] * failures), RetryPolicy(0.0))
        with TrialStream(store, manifest) as stream:
            if works:
                stream.fetch([0])
            else:
                with pytest.raises(StorageError, match=r"SlowDown, after 3 attempts .*; start the"):
                    stream.fetch([0])
        assert store.reads == 3


def test_a_read_is_shared_between_batches_and_given_up_with_the_last_of_them(
    tiny_dataset, manifest: TrialManifest
) -> None:
    go_on = threading.Event()
    store = Store(tiny_dataset.folder, iter([go_on.wait] * 100))
    with TrialStream(store, manifest, concurrency=1) as stream:
        first, second, third = (stream.submit(batch) for batch in ([0, 1], [1, 0, 1], [2, 0]))
        first.cancel()
        third.cancel()
        with pytest.raises(CancelledError):
            third.result()
        go_on.set()
        arrays = second.result()
        counts = stream.stats.snapshot()
    assert store.reads == counts.trials_read == 2
    for array, index in zip(arrays, [1, 0, 1], strict=True):
        assert np.array_equal(array, tiny_dataset.features[manifest.trials[index].name])


def test_closing_frees_who_waits_while_a_read_is_in_flight(
    tiny_dataset, manifest: TrialManifest
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def silent() -> None:
        begun.set()
        go_on.wait()
        throttled()

    store = Store(tiny_dataset.folder, iter([silent] * 100))
    with TrialStream(store, manifest) as stream:
        reads = stream.submit([0])
        begun.wait()
    with pytest.raises(CancelledError):
        reads.result()
    go_on.set()
    stream._readers.shutdown()  # the read in flight ends, and no other attempt is made
    assert store.reads == 1
