"""The CSV files of an evaluation, per trial and hypothesis: what other programs read."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py

from ..dataset.manifest import TrialManifest
from ..errors import DataError, StorageError
from ..labels.phonemes import BLANK, SILENCE, phoneme_symbols
from ..labels.pronunciation import normalise_text
from ..storage.locations import shortened
from .decoding import DecodedTrial
from .sentences import Sentences
from .summary import corpus_name

_NEEDED = ("file", "hypothesis", "score")  # columns of a table of sentences to be scored
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a cell that begins so is run by spreadsheets


def trial_row(trial: DecodedTrial) -> dict[str, Any]:
    """One trial of the per-trial table; what has no labels has no error columns."""
    record, errors = trial.record, trial.errors
    row: dict[str, Any] = {
        "session": record.session,
        "block": record.block_num,
        "trial": record.trial_num,
        "file": record.name,
        "corpus": corpus_name(trial),
        "sentence": record.sentence_label,
        "reference": None if trial.reference is None else _spelled(trial.reference),
        "hypothesis": _spelled(trial.hypothesis),
    }
    if trial.sentence is not None:
        row["decoded_sentence"] = trial.sentence
    if "WER" in errors:
        row |= {"words": errors["WER"].reference_labels, "word_errors": errors["WER"].edits}
    if "PER" in errors:
        per = errors["PER"]
        row |= {
            "phonemes": per.reference_labels,
            "errors": per.edits,
            "substitutions": per.substitutions,
            "deletions": per.deletions,
            "insertions": per.insertions,
        }
    if "DER" in errors:
        row |= {"diphones": errors["DER"].reference_labels, "diphone_errors": errors["DER"].edits}
    return row


def n_best_rows(trials: Sequence[DecodedTrial], sentences: Sentences) -> list[dict[str, Any]]:
    """One row per hypothesis, best first within a trial: its scores and the weights used."""
    return [
        {
            "file": trial.record.name,
            "rank": rank,
            "hypothesis": one.text,
            "acoustic": one.acoustic,
            "language": one.language,
            "words": len(one.text.split()),
            "lm_weight": sentences.options[trial.index].lm_weight,
            "word_score": sentences.options[trial.index].word_score,
            "score": one.score,
        }
        for trial in trials
        for rank, one in enumerate(sentences.found[trial.index], 1)
    ]


def rescored_sentences(path: Path, index_of: Mapping[str, int]) -> dict[int, str]:
    """The best-scored sentence of every trial in a table of hypotheses.

    Args:
        path: a table like nbest.csv, with the columns file, hypothesis and score.
        index_of: name → index of the trials, all of which must be there, and no others.

    Raises:
        DataError: another table. StorageError: unreadable.
    """
    best: dict[int, tuple[float, str]] = {}
    for number, row in enumerate(_read_table(path), 2):
        index = index_of.get(row["file"])
        if index is None:
            raise DataError(
                f"{path} row {number} is about {row['file']!r}, which is none of the "
                f"{len(index_of):,} decoded trials: rescore the nbest.csv of this very split."
            )
        try:
            score = float(row["score"])
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise DataError(
                f"{path} row {number} has {row['score']!r} as its score: give a finite number."
            )
        if index not in best or score > best[index][0]:
            best[index] = (score, normalise_text(row["hypothesis"]))
    missing = [name for name, index in index_of.items() if index not in best]
    if missing:
        raise DataError(
            f"{path} has no row for {len(missing):,} of {len(index_of):,} decoded trials "
            f"({shortened(missing)}): hand back a row for each, with an empty hypothesis if need "
            "be."
        )
    return {index: text for index, (_, text) in best.items()}


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV file; the fullest row's keys lead the header, and what a row lacks stays empty.

    Text that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    fullest_first = sorted(rows, key=len, reverse=True)
    columns = list(dict.fromkeys(name for row in fullest_first for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        if rows:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and _is_formula(value) else value


def _is_formula(text: str) -> bool:
    """Whether a spreadsheet would run this, were it not for apostrophes before it."""
    return text.lstrip("'").startswith(_FORMULA)


def _read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, without the apostrophes of `write_table`."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="", strict=True)
            columns = list(reader.fieldnames or ())
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path} is no CSV table in UTF-8 ({error}): give one like nbest.csv."
        ) from error
    except OSError as error:
        raise StorageError(
            f"{path} cannot be read ({error.strerror or error}): check the path."
        ) from error
    for name in _NEEDED:
        if columns.count(name) != 1:
            raise DataError(
                f"{path} has {columns.count(name) or 'no'} columns named {name!r}: give a table "
                f"like nbest.csv, with the columns {', '.join(_NEEDED)}."
            )
    for number, row in enumerate(rows, 2):
        if None in row:
            raise DataError(
                f"{path} row {number} has more cells than columns: quote cells that hold commas."
            )
    return [
        {n: cell[1:] if cell[:1] == "'" and _is_formula(cell) else cell for n, cell in row.items()}
        for row in rows
    ]


def write_submission(
    path: Path, manifest: TrialManifest, split: str, trials: Iterable[DecodedTrial]
) -> None:
    """The competition's file: `id,text`, one row for every trial of the split, ids from 0.

    The order is that of the public evaluation script: sessions by date, trials as in the file.
    A trial without text keeps its row, so that no id after it moves.
    """
    text = {trial.index: trial.sentence for trial in trials}
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "text"])
        rows = enumerate(manifest.select(split))
        writer.writerows((number, text.get(index, "")) for number, index in rows)


def submission_remark(manifest: TrialManifest, split: str, trials: Iterable[DecodedTrial]) -> str:
    """What `write_submission` writes, in one sentence: the rows without text are named."""
    rows, with_text = manifest.select(split), {trial.index for trial in trials if trial.sentence}
    empty = [manifest.trials[i].name for i in rows if i not in with_text]
    if not empty:
        return f"submission.csv has {len(rows):,} rows, each with text"
    return (
        f"WARNING: submission.csv has {len(rows):,} rows, {len(empty):,} of them without text, as "
        f"the trial was left out or no word was found: {shortened(empty)}"
    )


def write_logits(path: Path, trials: Iterable[DecodedTrial]) -> None:
    """Phoneme log-probabilities as the public language-model server reads them.

    One float32 dataset [T', 41] per trial, classes in the order blank, silence, AA … ZH, named
    SESSION/trial_NNNN, with block_num and trial_num as attributes.
    """
    order = [BLANK, SILENCE, *range(1, SILENCE)]
    buffer = io.BytesIO()  # not the file itself: HDF5 crashes on a volume that fills
    with h5py.File(buffer, "w") as file:
        for trial in trials:
            record = trial.record
            dataset = file.create_dataset(
                f"{record.session}/{record.trial}", data=trial.phoneme_log_probs[:, order]
            )
            dataset.attrs["block_num"] = record.block_num
            dataset.attrs["trial_num"] = record.trial_num
    path.write_bytes(buffer.getbuffer())


def _spelled(phonemes: Sequence[int]) -> str:
    return " ".join(phoneme_symbols(phonemes))
