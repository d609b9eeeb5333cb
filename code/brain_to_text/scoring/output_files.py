"""What an evaluation leaves in a folder, whole or not at all, and never over what others wrote."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import StorageError
from ..labels.diphones import N_DIPHONES
from ..labels.phonemes import BLANK, PHONEMES
from ..storage.locations import shortened
from .decoding import DecodedTrial
from .error_rates import align
from .report_pages import model_report
from .summary import Evaluation, diphone_name
from .tables import n_best_rows, trial_row, write_logits, write_submission, write_table

BIN_SECONDS = 0.02
RESULTS = (
    *("trials.csv", "summary.json", "report.html", "phoneme_logits.hdf5"),
    *("submission.csv", "nbest.csv", "language_model.arpa"),
)
_SHOWN_CLASSES = 16  # rows of a posterior chart


def check_place(
    folder: Path, purpose: Mapping[str, str], overwrite: bool, reads: Collection[Path] = ()
) -> None:
    """Check, without writing, that results may go to `folder`.

    Args:
        purpose: the model, data and split, as summary.json names them: results that an evaluation
            for the same purpose left there are replaced, unless they were changed since.
        overwrite: replace any results.
        reads: files that are read, and which therefore stay.

    Raises:
        StorageError: it cannot be written, or holds results of something else, or changed ones.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise _unwritable(folder, f"{nearest} is {'read-only' if nearest.is_dir() else 'a file'}")
    stay = {os.path.realpath(path) for path in reads}
    there = [name for name in RESULTS if (folder / name).exists()]
    present = [name for name in there if os.path.realpath(folder / name) not in stay]
    if overwrite or not present:
        return
    try:
        found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        theirs = {name: str(found[name]) for name in ("model", "data", "split")}
        checksums = {"summary.json": None, **found["files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        theirs, checksums = {}, {}
    places = {name: _place(value) for name, value in theirs.items()}
    if theirs and places == {name: _place(value) for name, value in purpose.items()}:
        changed = [
            name
            for name in present
            if name not in checksums or checksums[name] not in (None, _checksum(folder / name))
        ]
        if not changed:
            return
        raise StorageError(
            f"{folder} holds {shortened(changed)}, changed since the evaluation that wrote its "
            "summary.json: move it away, give another folder with --output-dir, or --overwrite to "
            "replace it."
        )
    whose = (
        f"the results of {theirs['model']} on {theirs['split']} of {theirs['data']}"
        if theirs
        else f"{shortened(present)}, which nothing says an evaluation wrote"
    )
    raise StorageError(
        f"{folder} holds {whose}: give another folder with --output-dir, or --overwrite to replace "
        "them."
    )


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # only writing fails so


@contextmanager
def complete_or_nothing(folder: Path, reads: Collection[Path] = ()) -> Iterator[Path]:
    """A folder to write results into; they appear in `folder` when the block ends without an error.

    Results that lie there are replaced, all of them.

    Args:
        reads: files that the block reads, and which therefore stay.

    Raises:
        StorageError: `folder` cannot be written, which shows before the block begins, or later.
    """
    others = False  # whether the block runs, which reads and prints, too
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            _alone_in(folder),
            tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as draft,
        ):
            others = True
            yield Path(draft)
            others = False
            written = sorted(Path(draft).iterdir())
            for file in written:
                file.replace(folder / file.name)
            kept = {os.path.realpath(path) for path in reads}
            for name in set(RESULTS) - {file.name for file in written}:
                if os.path.realpath(folder / name) not in kept:
                    (folder / name).unlink(missing_ok=True)  # of the evaluation before
    except OSError as error:
        ours = others and error.filename and Path(error.filename).parent == Path(draft)
        if others and not ours and error.errno not in _FULL:
            raise
        raise _unwritable(folder, str(error.strerror or error)) from error


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One evaluation at a time writes into a folder; where its volume has locks."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(opened)
        raise StorageError(
            f"Another evaluation is writing to {folder}: let it end, or give another folder with "
            "--output-dir."
        ) from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(opened)


def _place(location: str) -> str:
    """A location in one spelling."""
    parts = location.split(" + ")
    return " + ".join(p.rstrip("/") if "://" in p else os.path.realpath(p) for p in parts)


def write_results(evaluation: Evaluation, folder: Path, *, logits: bool = False) -> None:
    """trials.csv, summary.json, report.html; on request the logits.

    submission.csv, too, where words were decoded, and nbest.csv where there are N-best lists.

    Args:
        folder: as `complete_or_nothing` gives it, which says so where it cannot be written.
    """
    artefact, sentences = evaluation.artefact, evaluation.sentences
    text = sentences.text if sentences else {}
    model, numbers = evaluation.model, evaluation.summary
    summary = {
        "model": model,
        "step": artefact.step,
        "data": evaluation.data,
        "split": evaluation.split,
        "fingerprint": evaluation.manifest.fingerprint(),
        "remarks": evaluation.remarks,
        **numbers,
    }
    by_index = {trial.index: trial for trial in evaluation.trials}
    seconds_per_frame = artefact.config.model.patch_stride * BIN_SECONDS
    page = {
        **numbers,
        "title": f"{model} on {evaluation.split}",
        "subtitle": f"{evaluation.data}, evaluated {time.strftime('%Y-%m-%d %H:%M')}",
        "split": evaluation.split,
        "metrics": artefact.metrics,
        "examples": [
            example(by_index[index], log_probs, seconds_per_frame, text.get(index))
            for index, log_probs in evaluation.examples.items()
        ],
        "config": artefact.config.to_yaml(),
        "data": _data_facts(evaluation),
        "remarks": evaluation.remarks,
        "environment": {**_environment_facts(evaluation), **evaluation.job},
    }
    rows = [trial_row(trial, text.get(trial.index)) for trial in evaluation.trials]
    write_table(folder / "trials.csv", rows)
    if logits:
        write_logits(folder / "phoneme_logits.hdf5", evaluation.trials)
    if sentences is not None:
        write_submission(folder / "submission.csv", evaluation.manifest, evaluation.split, text)
        if sentences.n_best:
            write_table(folder / "nbest.csv", n_best_rows(evaluation.trials, sentences))
    (folder / "report.html").write_text(model_report(page), encoding="utf-8")
    summary["files"] = {path.name: _checksum(path) for path in sorted(folder.iterdir())}
    (folder / "summary.json").write_text(_strict_json(summary), encoding="utf-8")


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unwritable(folder: Path, reason: str) -> StorageError:
    return StorageError(
        f"Results cannot be written to {folder} ({reason}): give a writable folder with "
        "--output-dir."
    )


def _data_facts(evaluation: Evaluation) -> dict[str, Any]:
    manifest = evaluation.manifest
    by_split = {s: len(manifest.select(s)) for s in ("train", "val", "test")}
    sessions = manifest.sessions
    return {
        "Location": evaluation.data,
        "Fingerprint": manifest.fingerprint(),
        "Trials": ", ".join(f"{count:,} {s}" for s, count in by_split.items() if count),
        "Sessions": f"{len(sessions)}, {sessions[0]} … {sessions[-1]}",
        "Features per bin": manifest.n_features,
        "Label form": manifest.label_form,
    }


def _environment_facts(evaluation: Evaluation) -> dict[str, Any]:
    """What the numbers were made with."""
    artefact = evaluation.artefact
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    parameters = sum(weight.numel() for weight in artefact.weights.values())
    speed = len(evaluation.trials) / max(evaluation.seconds, 1e-9)
    return {
        "Parameters": f"{parameters:,}",
        "Training steps": artefact.step,
        "Label form": artefact.label_form,
        "Decoding": f"{speed:.1f} trials/s",
        "Git revision": os.environ.get("BRAIN_TO_TEXT_REVISION"),
        "Processor": gpu or platform.processor() or platform.machine(),
        "Python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": str(np.__version__),
    }


def example(
    trial: DecodedTrial,
    log_probs: np.ndarray,
    seconds_per_frame: float,
    decoded: str | None = None,
) -> dict[str, Any]:
    """One trial for the report: its alignment, and its most probable classes over time."""
    probabilities = np.exp(log_probs)
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
    errors = trial.errors().get("PER")
    score = (
        f", PER {100 * errors.rate:.0f} % of {errors.reference_labels} phonemes" if errors else ""
    )
    return {
        "name": trial.record.name,
        "heading": trial.record.name + score,
        "sentence": trial.record.sentence_label,
        "decoded": decoded,
        "alignment": [tuple(None if p is None else PHONEMES[p].strip() for p in q) for q in pairs],
        "posteriors": probabilities[:, shown].T,
        "labels": labels,
        "kind": "diphones" if diphones else "phonemes",
        "seconds_per_frame": seconds_per_frame,
    }


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
