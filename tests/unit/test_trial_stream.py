"""One trial's way through the stream, with a reader that does as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from brain_to_text.dataset.indexing import index_dataset
from brain_to_text.dataset.manifest import TrialManifest
from brain_to_text.errors import StorageError
from brain_to_text.storage.retry import ReadError, RetryPolicy
from brain_to_text.storage.store import open_store
from brain_to_text.streaming.trial_stream import LocalRangedReader, TrialStream


class Reader(LocalRangedReader):
    """Reads a folder; before each attempt it runs the next of `misfortunes`."""

    def __init__(self, folder: Path, misfortunes: Iterator[Callable[[], Awaitable[None]]]) -> None:
        super().__init__(folder, concurrency=4)
        self._misfortunes = misfortunes

    async def read(self, key: str, offset: int, length: int, etag: str) -> bytes:
        misfortune = next(self._misfortunes, None)
        if misfortune is not None:
            await misfortune()
        return await super().read(key, offset, length, etag)


async def throttled() -> None:
    raise ReadError("HTTP 503 SlowDown")


async def silent() -> None:
    await asyncio.sleep(3600)


@pytest.fixture
def manifest(tiny_dataset) -> TrialManifest:
    return index_dataset(open_store(tiny_dataset.folder))


@pytest.mark.parametrize(
    ("misfortunes", "sentence"),
    [
        ((throttled, silent), "after 2 attempts .*, last cause: HTTP 503 SlowDown;"),
        ((silent,), "after 1 attempts .*, last cause: no complete answer within 0.5 s;"),
    ],
)
def test_an_attempt_cut_short_by_the_budget_does_not_hide_the_cause(
    misfortunes: tuple, sentence: str, tiny_dataset, manifest: TrialManifest
) -> None:
    reader = Reader(tiny_dataset.folder, iter(misfortunes))
    retry = RetryPolicy(budget_seconds=0.5, read_timeout_seconds=60)
    store = open_store(tiny_dataset.folder)
    with TrialStream(store, manifest, reader=reader, retry=retry) as stream:
        with pytest.raises(StorageError, match=sentence):
            stream.fetch([0])
