"""From a model and a dataset to numbers, tables and a report: all of `evaluate_model.py`."""

from __future__ import annotations

import contextlib
import csv
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from tqdm import tqdm

from .augmentations import Augmentation
from .config import TrainingConfig
from .dataset_s3 import EvaluationDatasetS3
from .device import autocast_dtype
from .diphones import N_DIPHONES
from .error_analysis import (
    align,
    bootstrap_interval,
    calibration,
    compare_paired,
    confusion_matrix,
    count_errors,
    diphone_errors,
    length_group,
    rates_by,
    token_correctness,
    worst_diphones,
)
from .errors import DataError, StorageError
from .metrics import ErrorCounts
from .model_artefact import ModelArtefact, open_model
from .object_store import open_store
from .phonemes import BLANK, PHONEMES, SILENCE, phoneme_symbols
from .recording_blocks import corpus_of
from .report import write_report
from .rnn_model import GRUDecoder
from .trial_decoding import DecodedTrial, decode_trials, example_trials
from .trial_manifest import TrialManifest, load_or_build_manifest
from .trial_stream import TrialStream

BIN_SECONDS = 0.02
N_EXAMPLES = 4
_SHOWN_CLASSES = 16  # rows of a posterior chart


@dataclass(frozen=True)
class EvaluationOptions:
    """What `evaluate_model.py` was asked to do.

    Attributes:
        model: folder, model.tar.gz or `s3://` URL.
        data: dataset folder or `s3://` URL.
        split: "val", "test" or "train".
        output_dir: where tables and the report go.
        compare_with: another model to test against, or None.
        batch_size: trials per forward pass.
        device: None for the first GPU, else the CPU.
        export_logits: also write phoneme logits for the public language-model server.
    """

    model: str
    data: str
    split: str
    output_dir: Path
    compare_with: str | None = None
    batch_size: int = 64
    device: str | None = None
    export_logits: bool = False


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One model's results on one split.

    Attributes:
        trials: in the manifest's order.
        summary: rates with intervals, counts, groups, calibration; plain types.
        seconds: of the pass over the trials.
    """

    artefact: ModelArtefact
    trials: list[DecodedTrial]
    summary: dict[str, Any]
    seconds: float


def evaluate_model(options: EvaluationOptions, say: Callable[[str], None] = print) -> Evaluation:
    """Decode a split, score it, write tables and the report to `options.output_dir`.

    Raises:
        BrainToTextError: model, data or output cannot be read, used or written.
    """
    device = torch.device(options.device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    say(f"Using device: {device}")
    artefact = open_model(options.model)
    other = open_model(options.compare_with) if options.compare_with else None
    store = open_store(options.data)
    manifest = load_or_build_manifest(store, say)
    chosen = choose_trials(manifest, artefact.sessions, options.split, artefact.config)
    for sentence in chosen.remarks:
        say(sentence)
    stream = TrialStream(store, manifest)
    try:
        run = partial(
            run_model,
            stream=stream,
            split=options.split,
            device=device,
            batch_size=options.batch_size,
        )
        evaluation = run(artefact)
        say(
            f"Decoded {len(evaluation.trials)} trials in {evaluation.seconds:.1f} s: "
            f"{len(evaluation.trials) / max(evaluation.seconds, 1e-9):.1f} trials/s"
        )
        comparison = None
        if other is not None:
            comparison = compare(evaluation, run(other))
    finally:
        stream.close()
    for line in describe(evaluation.summary, comparison):
        say(line)
    write_results(options, evaluation, comparison, manifest)
    say(f"Tables and report.html are in {options.output_dir}")
    return evaluation


@dataclass(frozen=True)
class ChosenTrials:
    """Trials by day index, and one sentence for everything left out."""

    by_session: tuple[np.ndarray, ...]
    remarks: tuple[str, ...]


def choose_trials(
    manifest: TrialManifest, sessions: Sequence[str], split: str, config: TrainingConfig
) -> ChosenTrials:
    """The trials of a split that a model with these day layers can decode.

    Raises:
        DataError: none at all, or features of another width.
    """
    if manifest.n_features != config.dataset.neural_dim:
        raise DataError(
            f"The data has {manifest.n_features} features per bin and the model takes "
            f"{config.dataset.neural_dim}: give the dataset the model was trained on."
        )
    listed = {
        (session, int(block), int(trial))
        for session, blocks in (config.dataset.bad_trials_dict or {}).items()
        for block, trials in blocks.items()
        for trial in (trials if isinstance(trials, list) else [trials])
    }
    remarks, chosen = [], []
    too_short = []
    for session in sessions:
        kept = []
        for index in manifest.select(split, [session]) if session in manifest.sessions else []:
            trial = manifest.trials[index]
            if (session, trial.block_num, trial.trial_num) in listed:
                remarks.append(f"Left out: {trial.name}, listed in dataset.bad_trials_dict")
            elif trial.n_time_steps < config.model.patch_size:
                too_short.append(trial.name)
            else:
                kept.append(index)
        chosen.append(np.array(kept, dtype=np.int64))
    for name in too_short:
        remarks.append(
            f"Left out: {name}, shorter than one patch of {config.model.patch_size} bins"
        )
    strangers = [s for s in manifest.sessions if s not in sessions]
    lost = len(manifest.select(split, strangers)) if strangers else 0
    if lost:
        remarks.append(
            f"Left out: {lost} trials of {len(strangers)} sessions that the model has no day layer "
            f"for ({strangers[0]}{' …' if len(strangers) > 1 else ''})"
        )
    if not any(len(trials) for trials in chosen):
        raise DataError(
            f"The dataset has no {split} trials of the model's {len(sessions)} sessions "
            f"({sessions[0]} … {sessions[-1]}): choose another --split or dataset."
        )
    return ChosenTrials(tuple(chosen), tuple(remarks))


def run_model(
    artefact: ModelArtefact,
    stream: TrialStream,
    split: str,
    device: torch.device,
    batch_size: int = 64,
    progress: bool = True,
) -> Evaluation:
    """Decode one split with one model and score it."""
    config, manifest = artefact.config, stream.manifest
    model = artefact.build(device)
    chosen = choose_trials(manifest, artefact.sessions, split, config)
    dataset = EvaluationDatasetS3(
        stream,
        chosen.by_session,
        batch_size=batch_size,
        device=device,
        feature_subset=config.dataset.feature_subset,
    )
    return decode_and_score(model, artefact, dataset, progress=progress)


def decode_and_score(
    model: GRUDecoder,
    artefact: ModelArtefact,
    dataset: EvaluationDatasetS3,
    *,
    progress: bool = True,
) -> Evaluation:
    """Decode every trial of `dataset`, then count, group and calibrate."""
    config, manifest = artefact.config, dataset.manifest
    indices = np.concatenate([dataset.trial_indices(i) for i in range(len(dataset))])
    examples = example_trials(manifest, sorted(indices.tolist()), N_EXAMPLES)
    device = next(model.parameters()).device
    started = time.perf_counter()
    with tqdm(total=len(indices), unit="trial", disable=not progress, desc="Decoding") as bar:
        trials = decode_trials(
            model,
            Augmentation(config.dataset.data_transforms),
            dataset,
            autocast=_autocast(config, device),
            keep_classes=examples,
            progress=bar.update,
        )
    seconds = time.perf_counter() - started
    return Evaluation(artefact, trials, summarise(trials), seconds)


# --- numbers --------------------------------------------------------------------------------------


def summarise(trials: Sequence[DecodedTrial]) -> dict[str, Any]:
    """Everything the report and summary.json say about decoded trials, as plain types.

    Without labels only the number of trials is known.
    """
    labelled = [trial for trial in trials if trial.reference]
    summary: dict[str, Any] = {"n_trials": len(trials)}
    if not labelled:
        return summary
    counts = {name: _counts(labelled, name) for name in ("DER", "PER", "PER (diphone path)")}
    counts = {name: rows for name, rows in counts.items() if rows}
    summary["rates"] = {
        name: bootstrap_interval(*_errors_and_labels(rows)).as_dict()
        for name, rows in counts.items()
    }
    summary["counts"] = {
        name: vars(sum(rows, ErrorCounts())).copy() for name, rows in counts.items()
    }
    nats = [trial.nats for trial in labelled if trial.nats is not None]
    if nats:
        frames = sum(len(t.phoneme_log_probs) for t in labelled if t.nats is not None)
        summary["ctc_nats_per_frame"] = sum(nats) / max(frames, 1)
    errors, labels = _errors_and_labels(counts["PER"])
    keys: dict[str, list[Any]] = {
        "session": [t.record.session for t in labelled],
        "corpus": [corpus_name(t) for t in labelled],
        "block": [f"{t.record.session} block {t.record.block_num}" for t in labelled],
        "length": [length_group(len(t.reference or ())) for t in labelled],
    }
    summary["groups"] = {name: rates_by(key, errors, labels) for name, key in keys.items()}
    alignments = [align(t.reference or [], t.hypothesis) for t in labelled]
    summary["confusion"] = confusion_matrix(p for pairs in alignments for p in pairs).tolist()
    summary["worst_diphones"] = [
        {
            "diphone": diphone_name(*diphone),
            "rate": c.rate,
            "errors": c.edits,
            "tokens": c.reference_labels,
        }
        for diphone, c in worst_diphones(diphone_errors(alignments))
    ]
    known = calibration(
        np.concatenate([t.confidences for t in labelled]),
        np.concatenate([token_correctness(t.reference or [], t.hypothesis) for t in labelled]),
    )
    summary["calibration"] = {
        "confidence": known.confidence.tolist(),
        "accuracy": known.accuracy.tolist(),
        "count": known.count.tolist(),
        "expected_error": known.expected_error,
    }
    return summary


def compare(evaluation: Evaluation, other: Evaluation) -> dict[str, Any]:
    """The first model against the second on the trials both decoded, per error rate both have.

    Raises:
        DataError: no labelled trial in common.
    """
    mine = {t.index: t for t in evaluation.trials if t.reference}
    theirs = {t.index: t for t in other.trials if t.reference}
    shared = sorted(mine.keys() & theirs.keys())
    if not shared:
        raise DataError(
            "The two models share no labelled trial to be compared on: use --split val and models "
            "trained on the same sessions."
        )
    metrics = {}
    for name in ("DER", "PER", "PER (diphone path)"):
        rows = _counts([mine[i] for i in shared], name)
        rows_other = _counts([theirs[i] for i in shared], name)
        if rows and rows_other:
            errors, labels = _errors_and_labels(rows)
            errors_other, _ = _errors_and_labels(rows_other)
            metrics[name] = compare_paired(errors_other, errors, labels).as_dict()
    return {"other": other.artefact.location, "n_trials": len(shared), "metrics": metrics}


def describe(summary: Mapping[str, Any], comparison: Mapping[str, Any] | None) -> list[str]:
    """The lines a person reads on the terminal."""
    lines = []
    for name, rate in summary.get("rates", {}).items():
        c = summary["counts"][name]
        lines.append(
            f"{name}: {rate['value']:.4f} (95 % interval {rate['low']:.4f} to {rate['high']:.4f}; "
            f"{c['substitutions']} substitutions, {c['deletions']} deletions, "
            f"{c['insertions']} insertions in {c['reference_labels']} labels)"
        )
    if not lines:
        lines.append(f"{summary['n_trials']} trials without labels: no error rates")
    for name, c in (comparison or {}).get("metrics", {}).items():
        d = c["difference"]
        lines.append(
            f"{name} against {comparison['other']}: {c['rate_b']:.4f} vs {c['rate_a']:.4f}, "  # type: ignore[index]
            f"difference {d['value']:+.4f} ({d['low']:+.4f} to {d['high']:+.4f}), "
            f"p = {c['p_value']:.2g}"
        )
    return lines


def corpus_name(trial: DecodedTrial) -> str:
    """The corpus of a trial's block, from the file or from the public description."""
    record = trial.record
    return record.corpus or corpus_of(record.session, record.block_num) or "unknown"


def diphone_name(previous: int, current: int) -> str:
    """ "K→AE"; "#" is the boundary of the sentence."""
    names = ["#" if p == BLANK else PHONEMES[p].strip() for p in (previous, current)]
    return "→".join(names)


def _counts(trials: Sequence[DecodedTrial], name: str) -> list[ErrorCounts]:
    """Per trial, or nothing when the model or the data has no such labels."""
    sides = {
        "DER": lambda t: (t.class_reference, t.class_hypothesis),
        "PER": lambda t: (t.reference, t.hypothesis),
        "PER (diphone path)": lambda t: (t.reference, t.path),
    }[name]
    pairs = [sides(trial) for trial in trials]
    if any(reference is None or hypothesis is None for reference, hypothesis in pairs):
        return []
    return [count_errors(reference, hypothesis) for reference, hypothesis in pairs]


def _errors_and_labels(rows: Sequence[ErrorCounts]) -> tuple[list[int], list[int]]:
    return [row.edits for row in rows], [row.reference_labels for row in rows]


# --- files ----------------------------------------------------------------------------------------


def write_results(
    options: EvaluationOptions,
    evaluation: Evaluation,
    comparison: Mapping[str, Any] | None,
    manifest: TrialManifest,
) -> None:
    """trials.csv, trials.jsonl, sessions.csv, summary.json, report.html; on request the logits.

    Raises:
        StorageError: the folder cannot be written.
    """
    folder = options.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows = [trial_row(trial) for trial in evaluation.trials]
        write_table(folder / "trials.csv", rows)
        with (folder / "trials.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        sessions = evaluation.summary.get("groups", {}).get("session", {})
        write_table(
            folder / "sessions.csv", [{"session": name, **row} for name, row in sessions.items()]
        )
        summary = {
            "model": evaluation.artefact.location,
            "step": evaluation.artefact.step,
            "data": options.data,
            "split": options.split,
            "fingerprint": manifest.fingerprint(),
            **evaluation.summary,
            **({"comparison": comparison} if comparison else {}),
        }
        (folder / "summary.json").write_text(_strict_json(summary), encoding="utf-8")
        if options.export_logits:
            write_logits(folder / "phoneme_logits.hdf5", evaluation.trials)
    except OSError as error:
        raise StorageError(
            f"Results cannot be written to {folder} ({error.strerror or error}): give a writable "
            "folder with --output-dir."
        ) from error
    contents = report_contents(evaluation, manifest, options.data, options.split)
    write_report(folder / "report.html", {**contents, "comparison": comparison})


def trial_row(trial: DecodedTrial) -> dict[str, Any]:
    """One trial of the per-trial table; error columns are empty without labels."""
    record = trial.record
    row: dict[str, Any] = {
        "session": record.session,
        "block": record.block_num,
        "trial": record.trial_num,
        "file": record.name,
        "corpus": corpus_name(trial),
        "sentence": record.sentence_label,
        "reference": None if trial.reference is None else _spelled(trial.reference),
        "hypothesis": _spelled(trial.hypothesis),
        "confidence": float(trial.confidences.mean()) if len(trial.confidences) else None,
    }
    if trial.reference is not None:
        counts = count_errors(trial.reference, trial.hypothesis)
        row |= {
            "phonemes": counts.reference_labels,
            "errors": counts.edits,
            "substitutions": counts.substitutions,
            "deletions": counts.deletions,
            "insertions": counts.insertions,
        }
    if trial.class_reference is not None and trial.class_hypothesis is not None:
        diphones = count_errors(trial.class_reference, trial.class_hypothesis)
        row |= {"diphones": diphones.reference_labels, "diphone_errors": diphones.edits}
    return row


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV file with the first row's keys as header."""
    with path.open("w", encoding="utf-8", newline="") as file:
        if rows:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def write_logits(path: Path, trials: Iterable[DecodedTrial]) -> None:
    """Phoneme log-probabilities as the public language-model server reads them.

    One float32 dataset [T', 41] per trial, classes in the order blank, silence, AA … ZH, named
    SESSION/trial_NNNN, with block_num and trial_num as attributes.
    """
    order = [BLANK, SILENCE, *range(1, SILENCE)]
    with h5py.File(path, "w") as file:
        for trial in trials:
            record = trial.record
            dataset = file.create_dataset(
                f"{record.session}/{record.trial}", data=trial.phoneme_log_probs[:, order]
            )
            dataset.attrs["block_num"] = record.block_num
            dataset.attrs["trial_num"] = -1 if record.trial_num is None else record.trial_num


def report_contents(
    evaluation: Evaluation, manifest: TrialManifest, data: str, split: str
) -> dict[str, Any]:
    """What `report.model_report` shows about an evaluation."""
    artefact = evaluation.artefact
    by_split = {s: len(manifest.select(s)) for s in ("train", "val", "test")}
    stride = max(artefact.config.model.patch_stride, 1)
    sessions = manifest.sessions
    return {
        **evaluation.summary,
        "title": f"{artefact.location.rstrip('/')} on {split}",
        "subtitle": f"{data}, evaluated {time.strftime('%Y-%m-%d %H:%M')}",
        "split": split,
        "metrics": artefact.metrics,
        "examples": [
            example(trial, stride * BIN_SECONDS)
            for trial in evaluation.trials
            if trial.class_log_probs is not None
        ],
        "config": artefact.config.to_yaml(),
        "data": {
            "Location": data,
            "Fingerprint": manifest.fingerprint(),
            "Trials": ", ".join(f"{count:,} {s}" for s, count in by_split.items() if count),
            "Sessions": f"{len(sessions)}, {sessions[0]} … {sessions[-1]}",
            "Features per bin": manifest.n_features,
            "Label form": manifest.label_form,
        },
        "environment": environment_facts(artefact, evaluation.seconds, len(evaluation.trials)),
    }


def environment_facts(artefact: ModelArtefact, seconds: float, n_trials: int) -> dict[str, Any]:
    """What the numbers were made with."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    parameters = sum(weight.numel() for weight in artefact.weights.values())
    return {
        "Parameters": f"{parameters:,}",
        "Training steps": artefact.step,
        "Decoding": f"{n_trials / max(seconds, 1e-9):.1f} trials/s",
        "Processor": gpu or platform.processor() or platform.machine(),
        "Python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": str(np.__version__),
    }


def example(trial: DecodedTrial, seconds_per_frame: float) -> dict[str, Any]:
    """One trial for the report: its alignment, and its most probable classes over time."""
    assert trial.class_log_probs is not None
    probabilities = np.exp(trial.class_log_probs)
    diphones = probabilities.shape[1] == N_DIPHONES
    peaks = probabilities.max(axis=0)
    peaks[BLANK] = 0
    shown = np.argsort(-peaks, kind="stable")[:_SHOWN_CLASSES]
    shown = shown[peaks[shown] >= 0.02]
    shown = shown[np.argsort(probabilities[:, shown].argmax(axis=0), kind="stable")]
    labels = [
        diphone_name(*divmod(int(c), len(PHONEMES))) if diphones else PHONEMES[c].strip()
        for c in shown
    ]
    pairs = (
        align(trial.reference or [], trial.hypothesis)
        if trial.reference
        else [(p, p) for p in trial.hypothesis]
    )
    return {
        "name": trial.record.name,
        "sentence": trial.record.sentence_label,
        "alignment": [tuple(None if p is None else PHONEMES[p].strip() for p in q) for q in pairs],
        "posteriors": probabilities[:, shown].T,
        "labels": labels,
        "kind": "diphones" if diphones else "phonemes",
        "seconds_per_frame": seconds_per_frame,
    }


def _spelled(phonemes: Sequence[int]) -> str:
    return " ".join(phoneme_symbols(phonemes))


def _strict_json(value: Any) -> str:
    """Indented JSON without NaN, which other readers refuse: null instead."""

    def finite(node: Any) -> Any:
        if isinstance(node, float):
            return node if np.isfinite(node) else None
        if isinstance(node, Mapping):
            return {str(k): finite(v) for k, v in node.items()}
        if isinstance(node, (list, tuple)):
            return [finite(v) for v in node]
        return node

    return json.dumps(finite(value), indent=1) + "\n"


def _autocast(
    config: TrainingConfig, device: torch.device
) -> Callable[[], AbstractContextManager[object]]:
    dtype = autocast_dtype(config, device)
    if dtype is None:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype=dtype)
