"""The reader between trials and S3's clients, with clients that are made up."""

from __future__ import annotations

import asyncio

import fsspec.asyn
import pytest
from brain_to_text.streaming.s3_reads import S3RangedReader


class Client:
    """Answers its first read alone, and the others only once all of them are there."""

    def __init__(self, others: int) -> None:
        self.asked: list[str] = []
        self._together = asyncio.Barrier(others)

    async def get(self, key: str, offset: int, length: int, etag: str | None) -> tuple[str, bytes]:
        self.asked.append(key)
        if len(self.asked) > 1:
            await asyncio.wait_for(self._together.wait(), timeout=10)
        else:
            await asyncio.sleep(0.01)  # time enough for others to ask as well
            self.asked_before_the_first_answer = len(self.asked)
        return "", key.encode()


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> S3RangedReader:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secretsecretsecret")
    return S3RangedReader("s3://bucket/data", concurrency=8, read_timeout_seconds=1.0)


def test_the_first_answer_is_waited_for_and_all_others_come_together(
    reader: S3RangedReader,
) -> None:
    client = Client(others=7)
    reader._client = client  # type: ignore[assignment]
    keys = [f"file-{i}" for i in range(8)]

    async def first_wave() -> list[bytearray | memoryview]:
        return await asyncio.gather(*(reader.read(key, 0, 6, "") for key in keys))

    assert [bytes(span).decode() for span in fsspec.asyn.sync(reader.loop, first_wave)] == keys
    assert client.asked_before_the_first_answer == 1
    assert sorted(client.asked) == keys
