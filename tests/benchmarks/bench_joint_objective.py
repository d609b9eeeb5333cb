"""How fast does a diphone decoder learn beside a phoneme decoder of the same budget?

    python tests/benchmarks/bench_joint_objective.py --folder FOLDER [--seeds 0 1] [--steps 600]
    python tests/benchmarks/bench_joint_objective.py --folder FOLDER --baseline

For each seed: a synthetic dataset with coarticulation of its own, and one decoder per arm, trained
on it by the real trainer with the same units, steps, batches, augmentation and learning rates. The
arms differ in classes, classifier and objective alone:

- phonemes: 41 classes
- plain: 1681 classes of their own each; the weight of the phoneme term grows from 0 to 0.6
- factored: classes share their phonemes' weights; the phoneme term comes first
- diphones: the factored classifier without the phoneme term

The last weights decode the validation trials. What is in FOLDER already is not done again, so the
command can be stopped and repeated. Tables come last.

`--baseline`: the smoke data at the public recipe's rates, as its own trainer was given them; the
error rates at every hundred steps.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "code"))

import numpy as np
import torch
from brain_to_text.config_reader import load_config
from brain_to_text.dataset.indexing import load_or_build_manifest
from brain_to_text.dataset.synthetic import SyntheticDataset, synthesize
from brain_to_text.model.trained_model import open_model
from brain_to_text.scoring.error_rates import compare_paired
from brain_to_text.scoring.evaluate import run_model
from brain_to_text.scoring.tables import trial_row
from brain_to_text.storage.store import open_store
from brain_to_text.streaming.trial_stream import TrialStream
from brain_to_text.training.rnn_trainer_s3 import BrainToTextDecoder_Trainer_S3, RunPaths

CODE = Path(__file__).resolve().parents[2] / "code"
SESSIONS, VAL_TRIALS = 2, 75  # validation trials per session
SIZE = {"model.n_units": 128, "dataset.batch_size": 16, "dataset.days_per_batch": SESSIONS}
FACTORED = {"model.classifier": "factored", "dataset.n_classes": 1681}
ARMS: dict[str, dict[str, Any]] = {
    "phonemes": {"dataset.n_classes": 41, "objective.schedule": None},
    "plain": {
        "model.classifier": "plain",
        "dataset.n_classes": 1681,
        "objective.schedule": [[0, 0.0], [0.75, 0.6]],
    },
    "factored": FACTORED | {"objective.schedule": [[0.1, 1.0], [0.4, 0.4]]},
    "diphones": FACTORED | {"objective.schedule": None},
}
# The public recipe's rates, with a warm-up and a peak for short runs.
RECIPE = {"epsilon": 0.1} | {
    f"lr_{name}{suffix}": value
    for name, value in (("max", 0.005), ("warmup_steps", 50))
    for suffix in ("", "_day")
}
BASELINE_DER = {100: 0.716, 200: 0.409, 300: 0.352, 400: 0.334}  # the public trainer, 1681 classes


def train(data: Path, place: Path, overrides: dict[str, Any]) -> list[dict[str, Any]]:
    """Train by rnn_args_smoke.yaml with `overrides`, from scratch to the end; its validations."""
    shared = {"objective.phoneme_weight": 0.0, "save_final_model": True}
    config = load_config(CODE / "rnn_args_smoke.yaml", shared | overrides)
    paths = RunPaths(place / "model", place / "output", place / "checkpoints")
    state = BrainToTextDecoder_Trainer_S3(config, str(data), paths).train()
    assert state.finished
    return state.validations


# --- arms, seeds, budgets -------------------------------------------------------------------------


def data_folder(options: argparse.Namespace, seed: int, phonemes: bool) -> Path:
    """A dataset of this seed; the two forms have the same features and sentences."""
    folder = options.folder / f"seed-{seed}" / f"data-{'phonemes' if phonemes else 'diphones'}"
    if not (folder / "trial_manifest.json.gz").exists():
        dataset = SyntheticDataset(
            sessions=SESSIONS,
            train_trials=options.train_trials,
            val_trials=VAL_TRIALS,
            test_trials=0,
            electrodes=24,
            gain=options.gain,
            bins_per_phoneme=options.bins_per_phoneme,
            seed=seed,
            phoneme_set=phonemes,
        )
        synthesize(open_store(folder), dataset)
    return folder


def train_and_decode(arm: str, seed: int, steps: int, options: argparse.Namespace) -> list[dict]:
    """Per validation trial, the errors of the last weights."""
    overrides = {
        "seed": seed,
        "dataset.seed": seed,
        "num_training_batches": steps,
        "batches_per_val_step": steps,
        **SIZE,
        **(RECIPE if options.recipe else {}),
        **ARMS[arm],
    }
    place = options.folder / f"seed-{seed}" / f"{arm}-{steps}"
    train(data_folder(options, seed, arm == "phonemes"), place, overrides)
    store = open_store(str(data_folder(options, seed, phonemes=False)))
    with TrialStream(store, load_or_build_manifest(store, print)) as stream:
        artefact = open_model(str(place / "model" / "checkpoint" / "final_checkpoint"))
        decoded = run_model(artefact, stream, "val", torch.device("cpu"))
    kept = ("file", "phonemes", "errors", "diphones", "diphone_errors")
    rows = [trial_row(trial) for trial in decoded.trials]
    return [{name: row[name] for name in kept if name in row} for row in rows]


Run = list[dict[str, Any]]
COUNTS = {"PER": ("errors", "phonemes"), "DER": ("diphone_errors", "diphones")}


def rate(run: Run, metric: str) -> float:
    errors, labels = COUNTS[metric]
    return sum(t[errors] for t in run) / sum(t[labels] for t in run)


def compared(pairs: list[tuple[Run, Run]], metric: str) -> dict[str, Any]:
    """The second of each pair against the first, over all trials of all pairs."""
    errors, labels = COUNTS[metric]
    for one, other in pairs:
        assert [t["file"] for t in one] == [t["file"] for t in other]
    firsts, seconds = ([t for pair in pairs for t in pair[which]] for which in (0, 1))
    return compare_paired(
        [t[errors] for t in firsts], [t[errors] for t in seconds], [t[labels] for t in firsts]
    )


def report(runs: dict[tuple[int, int, str], Run], options: argparse.Namespace) -> None:
    """A table of each budget's rates by seed, then the paired comparisons over all its seeds."""
    for steps in options.steps:
        print(f"\n{steps} steps: PER (DER)")
        print("| seed | " + " | ".join(ARMS) + " |\n" + "|---" * (len(ARMS) + 1) + "|")
        for seed in options.seeds:
            cells = []
            for arm in ARMS:
                run = runs[steps, seed, arm]
                der = f" ({rate(run, 'DER'):.3f})" if "diphones" in run[0] else ""
                cells.append(f"{rate(run, 'PER'):.3f}{der}")
            print(f"| {seed} | " + " | ".join(cells) + " |")
        for one, metrics in (("phonemes", ["PER"]), ("plain", COUNTS), ("diphones", COUNTS)):
            both = [(runs[steps, s, one], runs[steps, s, "factored"]) for s in options.seeds]
            for metric in metrics:
                print(f"factored against {one}: {_verdict(both, metric)}")


def _verdict(pairs: list[tuple[Run, Run]], metric: str) -> str:
    """Trials as the unit, then seeds."""
    whole = compared(pairs, metric)
    difference = whole["difference"]
    errors, labels = COUNTS[metric]
    edits = np.array([[sum(t[errors] for t in run) for run in pair] for pair in pairs])
    better = int((edits[:, 1] < edits[:, 0]).sum())
    text = (
        f"{metric} {whole['rate_b']:.4f} against {whole['rate_a']:.4f}, difference "
        f"{difference['value']:+.4f} ({difference['low']:+.4f} to {difference['high']:+.4f}), "
        f"p = {whole['p_value']:.2g} over {whole['n_trials']} trials; "
        f"better on {better} of {len(pairs)} seeds"
    )
    if len(pairs) > 1:
        tokens = [sum(t[labels] for t in pair[0]) for pair in pairs]
        by_seed = compare_paired(edits[:, 0], edits[:, 1], tokens)
        least = 2 / 2 ** len(pairs)
        text += f", p = {by_seed['p_value']:.3g} (the least possible is {least:.3g})"
    return text


# --- beside the public baseline -------------------------------------------------------------------


def beside_baseline(folder: Path) -> None:
    data, kept = folder / "smoke", folder / "baseline.json"
    if not (data / "trial_manifest.json.gz").exists():
        synthesize(open_store(data), SyntheticDataset())
    if not kept.exists():
        sizes = {"model.n_units": 96, "dataset.batch_size": 16, "num_training_batches": 400}
        changes = RECIPE | ARMS["factored"] | sizes | {"batches_per_val_step": 100}
        validations = train(data, folder / "baseline", changes)
        kept.write_text(json.dumps(validations), encoding="utf-8")
    print("| step | the baseline's DER | ours | PER |\n|---|---|---|---|")
    for validation in json.loads(kept.read_text(encoding="utf-8"))[1:]:
        step = -(-validation["step"] // 100) * 100
        numbers = f"{BASELINE_DER[step]} | {validation['der']:.3f} | {validation['per']:.3f}"
        print(f"| {step} | {numbers} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("--folder", type=Path, required=True, help="for datasets, models and counts")
    option("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    option("--steps", type=int, nargs="+", default=[600])
    option("--recipe", action="store_true", help="the public recipe's rates, not the smoke ones")
    option("--gain", type=float, default=0.15, help="signal strength of the synthetic data")
    option("--bins-per-phoneme", type=float, default=12.0, help="recordings have about 29")
    option("--train-trials", type=int, default=150, help="per session, of 2")
    option("--baseline", action="store_true", help="beside the public baseline's own trainer")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.baseline:
        beside_baseline(options.folder)
        return
    runs = {}
    for steps, seed, arm in product(options.steps, options.seeds, ARMS):
        file = options.folder / f"seed-{seed}" / f"{arm}-{steps}.json"
        if not file.exists():
            run = train_and_decode(arm, seed, steps, options)
            file.write_text(json.dumps(run), encoding="utf-8")
        runs[steps, seed, arm] = json.loads(file.read_text(encoding="utf-8"))
    report(runs, options)


if __name__ == "__main__":
    main()
