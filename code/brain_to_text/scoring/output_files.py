"""What an evaluation leaves in a folder, whole or not at all, and never over what others wrote."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError, StorageError
from ..labels.diphones import N_DIPHONES
from ..labels.phonemes import BLANK, PHONEMES
from ..storage.ownership import lies_in, lock, refuse_others
from .decoding import DecodedTrial
from .error_rates import align
from .report_pages import dataset_facts, model_report
from .summary import Evaluation, diphone_name
from .tables import trial_row, write_logits, write_submission, write_table

BIN_SECONDS = 0.02
RESULTS = (
    *("trials.csv", "summary.json", "report.html", "phoneme_logits.hdf5"),
    *("submission.csv", "nbest.csv", "language_model.arpa"),
)
_SHOWN_CLASSES = 16  # rows of a posterior chart


def check_results(
    folder: Path, purpose: Mapping[str, str], overwrite: bool, reads: Iterable[Path] = ()
) -> None:
    """Check, without writing, that an evaluation may replace the results in `folder`.

    Args:
        purpose: the model, data and split, as summary.json names them. Results of the same purpose
            that nobody changed are replaced.
        overwrite: replace any results.
        reads: files that the evaluation reads.

    Raises:
        ConfigError: a file that is read would be replaced. InUseError: results of another
            evaluation, changed ones, or what no evaluation wrote. StorageError: unreadable.
    """
    for path in reads:
        if path.name in RESULTS and lies_in(str(path), str(folder)):
            raise ConfigError(
                f"{path} is read and would be replaced: give another folder with --output-dir."
            )
    if overwrite:
        return
    try:
        found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        theirs = {name: str(found[name]) for name in ("model", "data", "split")}
        checksums = {**found["files"], "summary.json": _checksum(folder / "summary.json")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        whose, checksums = ", which no evaluation wrote", {}
    else:
        whose = ", which that evaluation did not write, or which was changed since"
        if any(_one_spelling(theirs[name]) != _one_spelling(purpose[name]) for name in theirs):
            whose = f" of {theirs['model']} on {theirs['split']} of {theirs['data']}"
            checksums = {}
    refuse_others(
        folder,
        RESULTS,
        lambda file: checksums.get(file.name) == _checksum(file),
        whose,
        "give another folder with --output-dir, or --overwrite to replace it",
    )


@contextmanager
def result_folder(folder: Path, stale: Iterable[str] = ()) -> Iterator[Path]:
    """A folder to write results into; they appear in `folder` when the block ends without an error.

    Args:
        stale: files of an earlier evaluation, which are removed where the block wrote no new ones.

    Raises:
        StorageError: `folder` cannot be written, which shows before the block begins, or later.
        InUseError: another evaluation writes there.
    """
    with ExitStack() as closing:
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            opened = os.open(folder, os.O_RDONLY)
            closing.callback(os.close, opened)
            lock(
                opened,
                f"Another evaluation is writing to {folder}: let it end, or give another folder "
                "with --output-dir.",
            )
            unfinished = tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder)
        draft = Path(closing.enter_context(unfinished))
        yield draft
        with writing_to(folder):
            written = sorted(draft.iterdir())
            for file in written:
                file.replace(folder / file.name)
            for name in set(stale) - {file.name for file in written}:
                (folder / name).unlink(missing_ok=True)


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Around what writes to the output folder and nothing else.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"Results cannot be written to {folder} ({error.strerror or error}): give a writable "
            "folder with --output-dir."
        ) from error


def _one_spelling(location: str) -> str:
    """Models or data in one spelling."""
    parts = location.split(" + ")
    return " + ".join(p.rstrip("/") if "://" in p else os.path.realpath(p) for p in parts)


# --- what is written ------------------------------------------------------------------------------


def write_results(evaluation: Evaluation, folder: Path, *, logits: bool = False) -> None:
    """trials.csv, summary.json, report.html; on request the logits.

    submission.csv, too, where words were decoded, and nbest.csv where there are N-best lists.

    Args:
        folder: as `result_folder` gives it.

    Raises:
        StorageError: it cannot be written.
    """
    artefact, numbers, trials = evaluation.artefact, evaluation.summary, evaluation.trials
    by_index = {trial.index: trial for trial in trials}
    seconds_per_frame = artefact.config.model.patch_stride * BIN_SECONDS
    examples = [
        example(by_index[index], log_probs, seconds_per_frame)
        for index, log_probs in evaluation.examples.items()
    ]
    page = {
        **numbers,
        "title": f"{evaluation.model} on {evaluation.split}",
        "subtitle": f"{evaluation.data}, evaluated {time.strftime('%Y-%m-%d %H:%M')}",
        "split": evaluation.split,
        "metrics": artefact.metrics,
        "examples": examples,
        "config": artefact.config.to_yaml(),
        "data": dataset_facts(evaluation.manifest, evaluation.data),
        "remarks": evaluation.remarks,
        "environment": {**_environment_facts(evaluation), **evaluation.job},
    }
    with writing_to(folder.parent):
        write_table(folder / "trials.csv", [trial_row(trial) for trial in trials])
        if logits:
            write_logits(folder / "phoneme_logits.hdf5", trials)
        if evaluation.words is not None:
            path, manifest = folder / "submission.csv", evaluation.manifest
            write_submission(path, manifest, evaluation.split, trials)
        if evaluation.nbest:
            write_table(folder / "nbest.csv", evaluation.nbest)
        (folder / "report.html").write_text(model_report(page), encoding="utf-8")
        summary = {
            "model": evaluation.model,
            "step": artefact.step,
            "data": evaluation.data,
            "split": evaluation.split,
            "fingerprint": evaluation.manifest.fingerprint(),
            "remarks": evaluation.remarks,
            **numbers,
            "files": {path.name: _checksum(path) for path in sorted(folder.iterdir())},
        }
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _environment_facts(evaluation: Evaluation) -> dict[str, Any]:
    """What the numbers were made with."""
    artefact = evaluation.artefact
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    speed = len(evaluation.trials) / max(evaluation.seconds, 1e-9)
    return {
        "Parameters": f"{sum(weight.numel() for weight in artefact.weights.values()):,}",
        "Training steps": artefact.step,
        "Label form": artefact.label_form,
        "Decoding": f"{speed:.1f} trials/s",
        "Git revision": os.environ.get("BRAIN_TO_TEXT_REVISION"),
        "Processor": gpu or platform.processor() or platform.machine(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def example(trial: DecodedTrial, log_probs: np.ndarray, seconds_per_frame: float) -> dict[str, Any]:
    """One trial for the report: its alignment, and its most probable classes over time.

    Args:
        log_probs: [T', C] of diphones or phonemes.
    """
    probabilities = np.exp(log_probs)
    peaks = probabilities.max(axis=0)
    peaks[BLANK] = 0
    shown = np.argsort(-peaks, kind="stable")[:_SHOWN_CLASSES]
    shown = shown[peaks[shown] >= 0.02]
    shown = shown[np.argsort(probabilities[:, shown].argmax(axis=0), kind="stable")]
    if probabilities.shape[1] == N_DIPHONES:
        kind, labels = "diphones", [diphone_name(*divmod(int(c), len(PHONEMES))) for c in shown]
    else:
        kind, labels = "phonemes", [PHONEMES[c].strip() for c in shown]
    # without labels nothing is marked as wrong
    pairs = align(trial.reference or trial.hypothesis, trial.hypothesis)
    per = trial.errors.get("PER")
    score = f", PER {100 * per.rate:.0f} % of {per.reference_labels} phonemes" if per else ""
    return {
        "heading": trial.record.name + score,
        "sentence": trial.record.sentence_label,
        "decoded": trial.sentence,
        "alignment": [tuple(None if p is None else PHONEMES[p].strip() for p in q) for q in pairs],
        "posteriors": probabilities[:, shown].T,
        "labels": labels,
        "kind": kind,
        "seconds_per_frame": seconds_per_frame,
    }
