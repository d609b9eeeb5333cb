"""Soak one training process: faults and validations for minutes, then look at memory and files.

    .venv/bin/python tests/benchmarks/soak.py --minutes 20

A small run streams from a real S3 server through a proxy that injects every fault, validates and
checkpoints often, and is stopped and resumed between two halves. Resident memory and open file
descriptors of the process are sampled; after a warm-up of a tenth of the time they must not grow.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
CODE = TESTS.parent / "code"
sys.path[:0] = [str(TESTS), str(CODE)]

from integration.kill_harness import SETTINGS  # noqa: E402
from support.fault_proxy import Faults, run_proxy  # noqa: E402
from support.local_s3 import serve_s3  # noqa: E402
from support.tiny_data import write_dataset  # noqa: E402
from support.training_examples import newest_state  # noqa: E402

FAULTS = Faults(slow_down=0.1, reset=0.05, truncate=0.05, short_body=0.05, flip=0.03, stall=0.005)
MEMORY_GROWTH = 1.10  # allowed last/first sample after the warm-up
SAMPLE_SECONDS = 5.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_dataset(root / "data", n_features=16, bins=(80, 140))
        (root / "s3" / "bucket").mkdir(parents=True)
        shutil.copytree(root / "data", root / "s3" / "bucket" / "data")
        with serve_s3(root / "s3") as s3, run_proxy(s3.endpoint_url) as proxy:
            proxy.faults = FAULTS
            environment = {**os.environ, **s3.environment(), "OMP_NUM_THREADS": "1"}
            environment |= {"AWS_ENDPOINT_URL_S3": proxy.url, "AWS_ENDPOINT_URL": proxy.url}
            environment["SAGEMAKER_BASE_DIR"] = str(root / "ml")
            (root / "ml" / "output").mkdir(parents=True)
            grew = False
            for half in (1, 2):
                samples, steps = soak(environment, root / "ml", options.minutes * 30)
                grew |= report(half, samples, steps)
            print(f"faults injected: {dict(proxy.counts.faults)}")
    return 1 if grew else 0


def soak(environment: dict[str, str], ml: Path, seconds: float) -> tuple[list[tuple], int]:
    """Train for `seconds`, then SIGTERM; (seconds, resident MB, descriptors) samples and steps."""
    settings = {
        **SETTINGS,
        "num_training_batches": 10_000_000,
        "batches_per_val_step": 50,
        "batches_per_train_log": 100,
        "batches_per_save": 100,
        "cache_gb": 0,
        "read_timeout_seconds": 1,
    }
    words = [w for name, value in settings.items() for w in (f"--{name}", str(value))]
    command = [sys.executable, str(CODE / "train_model_sagemaker.py"), "--s3-bucket", "bucket"]
    command += ["--s3-data-prefix", "data", *words]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    started, samples = time.monotonic(), []
    while time.monotonic() - started < seconds:
        time.sleep(SAMPLE_SECONDS)
        assert process.poll() is None, (ml / "output" / "failure").read_text()
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        descriptors = sum(1 for _ in Path(f"/proc/{process.pid}/fd").iterdir())
        samples.append((time.monotonic() - started, pages * 4096 / 1e6, descriptors))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    return samples, newest_state(ml / "checkpoints")[1]["step"]


def report(half: int, samples: list[tuple], steps: int) -> bool:
    """Print the half's numbers; True if memory or descriptors grew."""
    settled = samples[max(len(samples) // 10, 1) :]
    quarter = max(len(settled) // 4, 1)
    first = max(s[1] for s in settled[:quarter]), max(s[2] for s in settled[:quarter])
    last = max(s[1] for s in settled[-quarter:]), max(s[2] for s in settled[-quarter:])
    print(
        f"half {half}: {samples[-1][0]:.0f} s, step {steps}; peak of the first and last quarter: "
        f"memory {first[0]:.0f} and {last[0]:.0f} MB, descriptors {first[1]} and {last[1]}"
    )
    return last[0] > first[0] * MEMORY_GROWTH or last[1] > first[1] + 8


if __name__ == "__main__":
    sys.exit(main())
