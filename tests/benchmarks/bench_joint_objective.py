"""Does a joint diphone model decode phonemes better than a phoneme model of the same budget?

    python tests/benchmarks/bench_joint_objective.py --folder FOLDER [--seeds 0 1 2 3 4 5]

For each seed: a synthetic dataset with coarticulation of its own, and two decoders trained on it by
the real trainer with the same units, steps, batches, augmentation and learning rates: one of 41
phoneme classes, one of 1681 diphone classes whose loss moves from diphones to marginalised phonemes
(weight 0 to 0.6 in equal steps). Both decode the same validation trials. What is in FOLDER already
is not done again, so the command can be stopped and repeated; `--at-most N` ends it after N
trainings. The table comes last.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "code"))

import numpy as np
import torch
from brain_to_text.config import load_config
from brain_to_text.dataset.manifest import load_or_build_manifest
from brain_to_text.dataset.store import open_store
from brain_to_text.dataset.synthetic import SyntheticDataset, synthesize
from brain_to_text.scoring.evaluate import run_model
from brain_to_text.scoring.statistics import PairedComparison, bootstrap_interval, compare_paired
from brain_to_text.scoring.tables import trial_row
from brain_to_text.scoring.trained_model import open_model
from brain_to_text.streaming.trial_stream import TrialStream
from brain_to_text.training.rnn_trainer_s3 import BrainToTextDecoder_Trainer_S3, RunPaths

CODE = Path(__file__).resolve().parents[2] / "code"
PHONEMES, DIPHONES, JOINT = "phonemes", "diphones", "joint"
ARMS = (PHONEMES, JOINT)
SESSIONS, ELECTRODES = 2, 24
SCHEDULE_STEPS = 6  # of 0.1 each, spread over the first three quarters of the run


def overrides(arm: str, options: argparse.Namespace, seed: int) -> dict[str, object]:
    """What differs from rnn_args_smoke.yaml; between the arms, classes and objective alone."""
    shared = {
        "seed": seed,
        "dataset.seed": seed,
        "num_training_batches": options.steps,
        "batches_per_val_step": max(options.steps // 4, 1),
        "objective.phoneme_weight": 0.0,
        "model.n_input_features": 2 * ELECTRODES,
        "model.input_network.input_layer_sizes": [2 * ELECTRODES],
        "dataset.neural_dim": 2 * ELECTRODES,
        "dataset.batch_size": 16,
        "dataset.days_per_batch": SESSIONS,
        "dataset.n_classes": 41 if arm == PHONEMES else 1681,
    }
    if arm != JOINT:
        return shared
    interval = max(3 * options.steps // (4 * SCHEDULE_STEPS), 1)
    schedule = {"start": 0.0, "end": 0.6, "step_size": 0.1, "interval": interval}
    return shared | {f"objective.schedule.{key}": value for key, value in schedule.items()}


def data_folder(options: argparse.Namespace, seed: int, phonemes: bool) -> Path:
    """A dataset of this seed; the two forms have the same features and sentences."""
    folder = options.folder / f"seed-{seed}" / ("data-phonemes" if phonemes else "data-diphones")
    if not (folder / "trial_manifest.json.gz").exists():
        dataset = SyntheticDataset(
            sessions=SESSIONS,
            train_trials=options.train_trials,
            val_trials=options.val_trials,
            test_trials=0,
            electrodes=ELECTRODES,
            gain=options.gain,
            coarticulation=options.coarticulation,
            bins_per_phoneme=options.bins_per_phoneme,
            seed=seed,
            phoneme_set=phonemes,
        )
        synthesize(open_store(folder), dataset)
    return folder


def train_and_decode(arm: str, options: argparse.Namespace, seed: int, result: Path) -> None:
    """Train one decoder, decode the validation trials of its last weights, keep the counts."""
    data = data_folder(options, seed, arm == PHONEMES)
    place = options.folder / f"seed-{seed}" / arm
    config = load_config(CODE / "rnn_args_smoke.yaml", overrides(arm, options, seed))
    paths = RunPaths(place / "model", place / "output", place / "checkpoints")
    started = time.perf_counter()
    state = BrainToTextDecoder_Trainer_S3(config, str(data), paths).train()
    assert state.finished
    seconds = time.perf_counter() - started
    store = open_store(str(data_folder(options, seed, phonemes=False)))
    stream = TrialStream(store, load_or_build_manifest(store, print))
    try:
        artefact = open_model(str(paths.model_dir))
        decoded = run_model(artefact, stream, "val", torch.device("cpu"), progress=False)
    finally:
        stream.close()
    rows = [
        {"trial": row["file"], "errors": row["errors"], "phonemes": row["phonemes"]}
        for row in map(trial_row, decoded.trials)
    ]
    numbers = {"seed": seed, "arm": arm, "seconds": seconds, "trials": rows}
    result.write_text(json.dumps(numbers), encoding="utf-8")


def compared(runs: list[tuple[dict, dict]]) -> PairedComparison:
    """The second of each pair against the first, over all trials of all pairs."""

    def column(which: int, name: str) -> np.ndarray:
        return np.concatenate([[t[name] for t in pair[which]["trials"]] for pair in runs])

    for one, other in runs:
        assert [t["trial"] for t in one["trials"]] == [t["trial"] for t in other["trials"]]
    return compare_paired(column(0, "errors"), column(1, "errors"), column(0, "phonemes"))


def rate(run: dict) -> tuple[float, float, float]:
    errors, phonemes = ([t[name] for t in run["trials"]] for name in ("errors", "phonemes"))
    interval = bootstrap_interval(errors, phonemes)
    return interval.value, interval.low, interval.high


def report(options: argparse.Namespace, results: dict[tuple[int, str], Path]) -> None:
    runs = {
        key: json.loads(path.read_text(encoding="utf-8"))
        for key, path in results.items()
        if path.exists()
    }
    rival = options.arms[-1]
    print(f"\n{'seed':>5} {PHONEMES:>24} {rival:>24} {'difference':>11} {'p':>8} {'wall s':>12}")
    pairs = []
    for seed in options.seeds:
        if (seed, PHONEMES) not in runs or (seed, rival) not in runs:
            continue
        pair = (runs[seed, PHONEMES], runs[seed, rival])
        pairs.append(pair)
        own = compared([pair])
        shown = ["{:.4f} ({:.4f}–{:.4f})".format(*rate(run)) for run in pair]
        times = " ".join(f"{run['seconds']:5.0f}" for run in pair)
        difference = own.difference.value
        print(
            f"{seed:>5} {shown[0]:>24} {shown[1]:>24} {difference:+11.4f} {own.p_value:8.4f} "
            f"{times:>12}"
        )
    if not pairs:
        return
    whole = compared(pairs)
    print(
        f"\nall {whole.n_trials} trials: PER {whole.rate_a:.4f} ({PHONEMES}) and "
        f"{whole.rate_b:.4f} ({rival}); difference {whole.difference.value:+.4f} "
        f"({whole.difference.low:+.4f} to {whole.difference.high:+.4f}), "
        f"p = {whole.p_value:.2g}; fewer errors on {whole.trials_better} trials, "
        f"more on {whole.trials_worse}"
    )
    by_seed = [compared([pair]) for pair in pairs]
    if len(pairs) > 1:
        edits = np.array(
            [[sum(t["errors"] for t in run["trials"]) for run in pair] for pair in pairs]
        )
        labels = [sum(t["phonemes"] for t in pair[0]["trials"]) for pair in pairs]
        seeds = compare_paired(edits[:, 0], edits[:, 1], labels)
        better = sum(own.difference.value < 0 for own in by_seed)
        print(
            f"seeds as the unit: {better} of {len(pairs)} better with {rival}, p = "
            f"{seeds.p_value:.3g} (the least possible is {2 / 2 ** len(pairs):.3g})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("--folder", type=Path, required=True, help="for datasets, models and counts")
    option("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5])
    option("--arms", nargs="+", default=list(ARMS), choices=(PHONEMES, DIPHONES, JOINT))
    option("--steps", type=int, default=300)
    option("--gain", type=float, default=0.15, help="signal strength of the synthetic data")
    option("--coarticulation", type=float, default=1.0)
    option("--bins-per-phoneme", type=float, default=12.0, help="recordings have about 29")
    option("--train-trials", type=int, default=150, help="per session, of 2")
    option("--val-trials", type=int, default=75, help="per session, of 2")
    option("--at-most", type=int, help="end after this many trainings")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        (seed, arm): options.folder / f"seed-{seed}" / f"{arm}-{options.steps}.json"
        for seed in options.seeds
        for arm in options.arms
    }
    missing = [key for key, path in results.items() if not path.exists()]
    for seed, arm in missing[: options.at_most]:
        train_and_decode(arm, options, seed, results[seed, arm])
    missing = [key for key, path in results.items() if not path.exists()]
    print(
        f"{options.steps} steps, gain {options.gain}, coarticulation {options.coarticulation}, "
        f"{options.bins_per_phoneme:g} bins per phoneme; "
        f"{len(missing)} trainings are still to do"
    )
    report(options, results)


if __name__ == "__main__":
    main()
