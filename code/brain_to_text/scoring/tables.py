"""What an evaluation leaves: tables per trial and session, a summary, logits, and the report."""

from __future__ import annotations

import csv
import json
import platform
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from ..dataset.manifest import TrialManifest
from ..errors import StorageError
from ..labels.diphones import N_DIPHONES
from ..labels.phonemes import BLANK, PHONEMES, SILENCE, phoneme_symbols
from .report import write_report
from .sentence_decoding import DecodedSentences, write_submission
from .statistics import align, count_errors
from .summary import corpus_name, diphone_name
from .trained_model import ModelArtefact
from .trial_decoding import DecodedTrial
from .words import word_errors

BIN_SECONDS = 0.02
_SHOWN_CLASSES = 16  # rows of a posterior chart


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One model's results on one split.

    Attributes:
        data: where the trials were read from.
        split: "val", "test" or "train".
        manifest: of the dataset.
        trials: in the manifest's order.
        summary: rates with intervals, counts, groups, calibration; plain types.
        seconds: of the pass over the trials.
        sentences: the trials' text, when words were decoded.
        remarks: one sentence for everything left out, and for every doubt about the numbers.
    """

    artefact: ModelArtefact
    data: str
    split: str
    manifest: TrialManifest
    trials: list[DecodedTrial]
    summary: dict[str, Any]
    seconds: float
    sentences: DecodedSentences | None = None
    remarks: tuple[str, ...] = ()

    @property
    def all_numbers(self) -> dict[str, Any]:
        """The summary, with the word error rate beside the others when words were decoded."""
        if self.sentences is None:
            return self.summary
        words = self.sentences.summary
        numbers = {**self.summary, "words": words}
        if "WER" in words:
            numbers["rates"] = {**self.summary.get("rates", {}), "WER": words["WER"]}
        return numbers


@contextmanager
def complete_or_nothing(folder: Path) -> Iterator[Path]:
    """A folder to write results into; they appear in `folder` when the block ends without an error.

    Raises:
        StorageError: `folder` cannot be written, which shows before the block begins.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft = tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    with draft:
        yield Path(draft.name)
        try:
            for file in sorted(Path(draft.name).iterdir()):
                file.replace(folder / file.name)
        except OSError as error:
            raise _unwritable(folder, error) from error


def write_results(
    evaluation: Evaluation,
    folder: Path,
    *,
    comparison: Mapping[str, Any] | None = None,
    logits: bool = False,
) -> None:
    """trials.csv, trials.jsonl, sessions.csv, summary.json, report.html; on request the logits.

    submission.csv, too, where words were decoded.

    Raises:
        StorageError: the folder cannot be written.
    """
    try:
        text = evaluation.sentences.text if evaluation.sentences else {}
        rows = [trial_row(trial, text.get(trial.index)) for trial in evaluation.trials]
        write_table(folder / "trials.csv", rows)
        with (folder / "trials.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        write_table(folder / "sessions.csv", session_rows(evaluation.summary.get("groups", {})))
        summary = {
            "model": evaluation.artefact.location,
            "step": evaluation.artefact.step,
            "data": evaluation.data,
            "split": evaluation.split,
            "fingerprint": evaluation.manifest.fingerprint(),
            "remarks": evaluation.remarks,
            **evaluation.all_numbers,
            **({"comparison": comparison} if comparison else {}),
        }
        (folder / "summary.json").write_text(_strict_json(summary), encoding="utf-8")
        if logits:
            write_logits(folder / "phoneme_logits.hdf5", evaluation.trials)
        if evaluation.sentences is not None:
            write_submission(folder / "submission.csv", evaluation.manifest, evaluation.split, text)
    except OSError as error:
        raise _unwritable(folder, error) from error
    contents = report_contents(evaluation)
    write_report(folder / "report.html", {**contents, "comparison": comparison})


def _unwritable(folder: Path, error: OSError) -> StorageError:
    return StorageError(
        f"Results cannot be written to {folder} ({error.strerror or error}): give a writable "
        "folder with --output-dir."
    )


def trial_row(trial: DecodedTrial, sentence: str | None = None) -> dict[str, Any]:
    """One trial of the per-trial table; without labels there are no error columns.

    Args:
        sentence: the decoded words, where words were decoded.
    """
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
        "confidence": round(float(trial.confidences.mean()), 4) if len(trial.confidences) else None,
    }
    if sentence is not None:
        row["decoded_sentence"] = sentence
        if record.sentence_label:
            words = word_errors(record.sentence_label, sentence)
            row |= {"words": words.reference_labels, "word_errors": words.edits}
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


def session_rows(groups: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per session: of each error rate its value, interval, errors and labels."""
    by_session: dict[str, dict[str, Any]] = {}
    for rate, kinds in groups.items():
        for session, row in kinds["session"].items():
            own = by_session.setdefault(session, {"session": session, "trials": row["n_trials"]})
            own |= {
                rate: row["value"],
                f"{rate} low": row["low"],
                f"{rate} high": row["high"],
                f"{rate} errors": row["errors"],
                f"{rate} labels": row["tokens"],
            }
    return list(by_session.values())


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV file; the fullest row's keys lead the header, and what a row lacks stays empty."""
    fullest_first = sorted(rows, key=len, reverse=True)
    columns = list(dict.fromkeys(name for row in fullest_first for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        if rows:
            writer = csv.DictWriter(file, columns)
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


def report_contents(evaluation: Evaluation) -> dict[str, Any]:
    """What `report.model_report` shows about an evaluation."""
    artefact, manifest = evaluation.artefact, evaluation.manifest
    by_split = {s: len(manifest.select(s)) for s in ("train", "val", "test")}
    text = evaluation.sentences.text if evaluation.sentences else {}
    stride = max(artefact.config.model.patch_stride, 1)
    sessions = manifest.sessions
    return {
        **evaluation.all_numbers,
        "title": f"{artefact.location.rstrip('/')} on {evaluation.split}",
        "subtitle": f"{evaluation.data}, evaluated {time.strftime('%Y-%m-%d %H:%M')}",
        "split": evaluation.split,
        "metrics": artefact.metrics,
        "examples": [
            example(trial, stride * BIN_SECONDS, text.get(trial.index))
            for trial in evaluation.trials
            if trial.class_log_probs is not None
        ],
        "config": artefact.config.to_yaml(),
        "data": {
            "Location": evaluation.data,
            "Fingerprint": manifest.fingerprint(),
            "Trials": ", ".join(f"{count:,} {s}" for s, count in by_split.items() if count),
            "Sessions": f"{len(sessions)}, {sessions[0]} … {sessions[-1]}",
            "Features per bin": manifest.n_features,
            "Label form": manifest.label_form,
        },
        "remarks": evaluation.remarks,
        "environment": environment_facts(artefact, evaluation.seconds, len(evaluation.trials)),
    }


def environment_facts(artefact: ModelArtefact, seconds: float, n_trials: int) -> dict[str, Any]:
    """What the numbers were made with."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    parameters = sum(weight.numel() for weight in artefact.weights.values())
    return {
        "Parameters": f"{parameters:,}",
        "Training steps": artefact.step,
        "Label form": artefact.label_form,
        "Decoding": f"{n_trials / max(seconds, 1e-9):.1f} trials/s",
        "Processor": gpu or platform.processor() or platform.machine(),
        "Python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": str(np.__version__),
    }


def example(
    trial: DecodedTrial, seconds_per_frame: float, decoded: str | None = None
) -> dict[str, Any]:
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
        "decoded": decoded,
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
