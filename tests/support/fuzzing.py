"""How long fuzzers go on: a fixed number of rounds in the tests, as long as one likes by hand.

    FUZZ_SECONDS=3600 .venv/bin/python -m pytest tests -k fuzz --timeout 0

Round n always does the same thing, so a failure's round number is all one needs to see it again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator


def rounds(usual: int) -> Iterator[int]:
    """0, 1, …: `usual` many, or for FUZZ_SECONDS where that is set."""
    seconds = float(os.environ.get("FUZZ_SECONDS", "0"))
    started, number = time.monotonic(), 0
    while number < usual or time.monotonic() - started < seconds:
        yield number
        number += 1
