"""Which corpus each recorded block came from, and how many sentences it holds.

The public description of the Brain-to-Text '25 copy-task data: 45 sessions over 20 months, 265
blocks, 11,162 sentences. Blocks are recorded either for training or for validation and test.
"""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import NamedTuple


class RecordingBlock(NamedTuple):
    """One block of one session; `held_out` blocks are shared by validation and test."""

    session: str
    block: int
    sentences: int
    corpus: str
    held_out: bool


@cache
def recording_blocks() -> tuple[RecordingBlock, ...]:
    """Every block in order of date and block number."""
    with Path(__file__).with_name("recording_blocks.csv").open(encoding="utf-8") as file:
        return tuple(
            RecordingBlock(session, int(block), int(sentences), corpus, split != "train")
            for session, block, sentences, corpus, split in list(csv.reader(file))[1:]
        )


@cache
def _corpora() -> dict[tuple[str, int], str]:
    return {(block.session, block.block): block.corpus for block in recording_blocks()}


def corpus_of(session: str, block: int) -> str | None:
    """The corpus a block's sentences came from, None for blocks that are not in the description."""
    return _corpora().get((session, block))
