"""Damage small HDF5 files for a while; print every one that ends in anything but a sentence.

python tests/benchmarks/fuzz_hdf5.py --minutes 60
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "code"), str(ROOT / "tests")]

from brain_to_text.dataset.workers import Lost, in_workers  # noqa: E402
from support.hdf5_fuzz import look_at, mutations  # noqa: E402


def main() -> int:
    """1 if any mutation ended in a traceback."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first thousand")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    counts: Counter[str] = Counter()
    seed = options.seed
    while time.monotonic() < deadline:
        left = {name: (data,) for name, data in mutations(seed, 1000)}
        while left:
            try:
                for name, answer in in_workers(look_at, left, options.processes):
                    del left[name]
                    kind = "a sentence" if answer != "sound" else answer
                    if isinstance(answer, Lost):
                        kind = f"signal {answer.signal} as a sentence"
                        print(f"{name}: {answer.damage}", flush=True)
                    counts[kind] += 1
            except Exception as error:  # noqa: BLE001 - what is looked for
                name = error.__notes__[0].removeprefix("of ")
                print(f"{name}: TRACEBACK {error}", flush=True)
                del left[name]
                counts["traceback"] += 1
        seed += 1
        print(f"{sum(counts.values()):,} mutations: {dict(counts)}", flush=True)
    return int(counts["traceback"] > 0)


if __name__ == "__main__":
    sys.exit(main())
