"""What a resume state costs at full size: seconds, bytes, and how long a SIGTERM takes to obey.

    .venv/bin/python tests/benchmarks/bench_checkpoint.py [--sessions 45] [--rounds 3]

The state is the diphone configuration's: model, AdamW moments, counters. "blocked" is what
training waits for when the writing goes on behind; "whole" is copy, write, fsync and rename,
which is what a stop signal has to wait for. The share is of the default checkpoint interval.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "code"))

import torch  # noqa: E402
from brain_to_text.config_reader import load_config  # noqa: E402
from brain_to_text.model.optimizer import build_optimizer  # noqa: E402
from brain_to_text.model.rnn_model import GRUDecoder  # noqa: E402
from brain_to_text.model.weights_file import load_verified  # noqa: E402
from brain_to_text.training.checkpoints import CheckpointFolder  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=45)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    config = load_config(REPOSITORY / "code" / "rnn_args_diphone_sagemaker.yaml")
    model = GRUDecoder(config, options.sessions)
    optimizer = build_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters:,} parameters, {options.sessions} sessions, torch {torch.__version__}")

    with tempfile.TemporaryDirectory() as folder:
        checkpoints = CheckpointFolder(Path(folder))
        print(f"{'round':>5} {'blocked s':>10} {'whole s':>8} {'load s':>7} {'MB':>7} {'share':>7}")
        for number in range(1, options.rounds + 1):
            started = time.perf_counter()
            checkpoints.save(state, number)
            blocked = time.perf_counter() - started
            checkpoints.wait()
            whole = time.perf_counter() - started
            started = time.perf_counter()
            load_verified(checkpoints.newest())
            load = time.perf_counter() - started
            share = blocked / config.checkpoint_interval_seconds
            size = checkpoints.newest().stat().st_size / 1e6
            print(f"{number:5} {blocked:10.2f} {whole:8.2f} {load:7.2f} {size:7.0f} {share:7.2%}")
        checkpoints.close()


if __name__ == "__main__":
    main()
