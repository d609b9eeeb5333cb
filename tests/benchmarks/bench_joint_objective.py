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
command can be stopped and repeated; `--at-most N` ends it after N trainings. Tables come last.

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
from brain_to_text.scoring.error_rates import PairedComparison, compare_paired
from brain_to_text.scoring.evaluate import run_model
from brain_to_text.scoring.tables import trial_row
from brain_to_text.storage.store import open_store
from brain_to_text.streaming.trial_stream import TrialStream
from brain_to_text.training.rnn_trainer_s3 import BrainToTextDecoder_Trainer_S3, RunPaths

CODE = Path(__file__).resolve().parents[2] / "code"
SESSIONS, ELECTRODES = 2, 24
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
    form = "phonemes" if phonemes else options.label_form
    folder = options.folder / f"seed-{seed}" / f"data-{form}"
    if not (folder / "trial_manifest.json.gz").exists():
        dataset = SyntheticDataset(
            sessions=SESSIONS,
            train_trials=options.train_trials,
            val_trials=options.val_trials,
            test_trials=0,
            electrodes=ELECTRODES,
            gain=options.gain,
            bins_per_phoneme=options.bins_per_phoneme,
            label_form=options.label_form,
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
        "model.n_units": options.units,
        "dataset.batch_size": options.batch_size,
        "dataset.days_per_batch": SESSIONS,
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


def compared(pairs: list[tuple[Run, Run]], metric: str) -> PairedComparison:
    """The second of each pair against the first, over all trials of all pairs."""
    errors, labels = COUNTS[metric]
    for one, other in pairs:
        assert [t["file"] for t in one] == [t["file"] for t in other]
    firsts, seconds = ([t for pair in pairs for t in pair[which]] for which in (0, 1))
    return compare_paired(
        [t[errors] for t in firsts], [t[errors] for t in seconds], [t[labels] for t in firsts]
    )


def report(runs: dict[tuple[int, int, str], Run], arms: list[str]) -> None:
    """A table of each budget's rates by seed, then the paired comparisons over all its seeds."""
    for steps in sorted({steps for steps, _, _ in runs}):
        print(f"\n{steps} steps: PER (DER)")
        print("| seed | " + " | ".join(arms) + " |\n" + "|---" * (len(arms) + 1) + "|")
        seeds = sorted({seed for budget, seed, _ in runs if budget == steps})
        for seed in seeds:
            cells = []
            for arm in arms:
                run = runs.get((steps, seed, arm))
                der = f" ({rate(run, 'DER'):.3f})" if run and "diphones" in run[0] else ""
                cells.append(f"{rate(run, 'PER'):.3f}{der}" if run else "–")
            print(f"| {seed} | " + " | ".join(cells) + " |")
        for one, other, metric in (
            ("phonemes", "factored", "PER"),
            ("plain", "factored", "PER"),
            ("plain", "factored", "DER"),
            ("diphones", "factored", "PER"),
            ("diphones", "factored", "DER"),
        ):
            both = [
                (runs[steps, seed, one], runs[steps, seed, other])
                for seed in seeds
                if (steps, seed, one) in runs and (steps, seed, other) in runs
            ]
            if both:
                print(f"{other} against {one}: {_verdict(both, metric)}")


def _verdict(pairs: list[tuple[Run, Run]], metric: str) -> str:
    """Trials as the unit, then seeds."""
    whole = compared(pairs, metric)
    errors, labels = COUNTS[metric]
    edits = np.array([[sum(t[errors] for t in run) for run in pair] for pair in pairs])
    better = int((edits[:, 1] < edits[:, 0]).sum())
    text = (
        f"{metric} {whole.rate_b:.4f} against {whole.rate_a:.4f}, difference "
        f"{whole.difference.value:+.4f} ({whole.difference.low:+.4f} to "
        f"{whole.difference.high:+.4f}), p = {whole.p_value:.2g} over {whole.n_trials} trials; "
        f"better on {better} of {len(pairs)} seeds"
    )
    if len(pairs) > 1:
        tokens = [sum(t[labels] for t in pair[0]) for pair in pairs]
        by_seed = compare_paired(edits[:, 0], edits[:, 1], tokens)
        least = 2 / 2 ** len(pairs)
        text += f", p = {by_seed.p_value:.3g} (the least possible is {least:.3g})"
    return text


# --- beside the public baseline -------------------------------------------------------------------


def beside_baseline(folder: Path, arm: str) -> None:
    data = folder / "smoke"
    if not (data / "trial_manifest.json.gz").exists():
        synthesize(open_store(data), SyntheticDataset())
    kept = folder / f"baseline-{arm}.json"
    if not kept.exists():
        sizes = {"model.n_units": 96, "dataset.batch_size": 16, "num_training_batches": 400}
        own = sizes | {"batches_per_val_step": 100}
        validations = train(data, folder / f"baseline-{arm}", RECIPE | own | ARMS[arm])
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
    option("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    option("--steps", type=int, nargs="+", default=[600])
    option("--units", type=int, default=128)
    option("--batch-size", type=int, default=16)
    option("--recipe", action="store_true", help="the public recipe's rates, not the smoke ones")
    option("--label-form", default="self_loop", choices=["self_loop", "transition"])
    option("--gain", type=float, default=0.15, help="signal strength of the synthetic data")
    option("--bins-per-phoneme", type=float, default=12.0, help="recordings have about 29")
    option("--train-trials", type=int, default=150, help="per session, of 2")
    option("--val-trials", type=int, default=75, help="per session, of 2")
    option("--at-most", type=int, help="end after this many trainings")
    option("--baseline", action="store_true", help="beside the public baseline's own trainer")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.baseline:
        arm = options.arms[0] if len(options.arms) == 1 else "factored"
        beside_baseline(options.folder, arm)
        return
    files = {
        (steps, seed, arm): options.folder / f"seed-{seed}" / f"{arm}-{steps}.json"
        for steps, seed, arm in product(options.steps, options.seeds, options.arms)
    }
    missing = [key for key, file in files.items() if not file.exists()]
    for steps, seed, arm in missing[: options.at_most]:
        run = train_and_decode(arm, seed, steps, options)
        files[steps, seed, arm].write_text(json.dumps(run), encoding="utf-8")
    missing = [key for key, file in files.items() if not file.exists()]
    print(f"{len(missing)} trainings are still to do")
    done = {key: json.loads(f.read_text("utf-8")) for key, f in files.items() if f.exists()}
    report(done, options.arms)


if __name__ == "__main__":
    main()
