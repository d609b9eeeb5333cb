"""Sentences of decoded trials: from which words, with which language model, tuned how."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..dataset.manifest import TrialManifest
from ..errors import DataError, StorageError
from ..labels.pronunciation import lexicon_of, normalise_text, read_lexicon
from .ngram import estimate_ngrams
from .statistics import bootstrap_interval
from .trial_decoding import DecodedTrial
from .words import (
    WordDecoder,
    WordSettings,
    check_language_model,
    check_words_packages,
    grid,
    grid_errors,
    word_errors,
    words_of_model,
)

FROM_TRAINING = "training"
LEXICON_ONLY = "none"
NGRAM_ORDER = 3
_NAMED = 8  # words or trials that a line names before it says "…"


@dataclass(frozen=True)
class WordOptions:
    """How sentences are decoded.

    Attributes:
        language_model: an ARPA or KenLM file; "training": 3-grams of the training sentences;
            "none": the lexicon alone.
        lexicon: a file of `WORD PHONEME …` lines; its words are added to the model's, and its
            pronunciations replace the CMU dictionary's.
        settings: weights of the search.
        tune: choose the two main weights on the validation split.
    """

    language_model: str
    lexicon: Path | None = None
    settings: WordSettings = field(default_factory=WordSettings)
    tune: bool = False


@dataclass(frozen=True)
class DecodedSentences:
    """The text of every trial.

    Attributes:
        text: normalised sentence by trial index.
        summary: WER with interval (with labels), counts, facts and examples, as plain types.
    """

    text: Mapping[int, str]
    summary: dict[str, Any]


def check_words(options: WordOptions) -> None:
    """What can be said before anything is read or decoded: packages and files are there.

    Raises:
        ConfigError: optional packages are missing. DataError, StorageError: no usable file.
    """
    check_words_packages()
    if options.language_model not in (FROM_TRAINING, LEXICON_ONLY):
        check_language_model(Path(options.language_model))
    if options.lexicon is not None:
        read_lexicon(options.lexicon)


def make_decoder(
    options: WordOptions, manifest: TrialManifest, folder: Path
) -> tuple[WordDecoder, dict[str, Any]]:
    """The decoder, and facts about it; a model made from training sentences is kept in `folder`.

    Raises:
        ConfigError: optional packages are missing. DataError, StorageError: no usable words.
    """
    source = options.language_model
    model_file: Path | None = None
    if source in (FROM_TRAINING, LEXICON_ONLY):
        sentences = training_sentences(manifest)
        words = {word for sentence in sentences for word in sentence.split()}
        vocabulary = f"{len(words):,} words of {len(sentences):,} training sentences"
        model = "none, the lexicon alone"
        if source == FROM_TRAINING:
            model = f"{NGRAM_ORDER}-grams of {len(sentences):,} training sentences"
            model_file = folder / "language_model.arpa"
            try:
                estimate_ngrams(sentences, NGRAM_ORDER).write_arpa(model_file)
            except OSError as error:
                raise StorageError(
                    f"The language model cannot be written to {model_file} ({error.strerror}): "
                    "give a writable folder with --output-dir."
                ) from error
    else:
        model, model_file = source, Path(source)
        words, vocabulary = words_of_model(model_file)
    own = read_lexicon(options.lexicon) if options.lexicon else {}
    if own:
        vocabulary += f", and {len(own):,} of {options.lexicon}"
    lexicon, unknown = lexicon_of(words - own.keys())
    facts = {
        "Language model": model,
        "Vocabulary": vocabulary,
        "Words that can be decoded": f"{len(lexicon | own):,}",
        "Words without a pronunciation": f"{len(unknown):,}"
        + (f" ({_some(unknown)})" if unknown else ""),
    }
    return WordDecoder(lexicon | own, model_file), facts


def training_sentences(manifest: TrialManifest) -> list[str]:
    """Normalised sentences of the training split, in order."""
    labels = [manifest.trials[i].sentence_label for i in manifest.select("train")]
    return [normalise_text(label) for label in labels if label]


def decode_sentences(
    options: WordOptions,
    decoder: WordDecoder,
    facts: Mapping[str, Any],
    trials: Sequence[DecodedTrial],
    tuning: Sequence[DecodedTrial] | None = None,
    progress: Callable[[], object] = lambda: None,
) -> DecodedSentences:
    """Decode every trial, with weights tuned where asked.

    Tuned on the very trials that are scored (`tuning` is None), each half of them is decoded with
    the weights that suit the other half, so that the word error rate stays honest.

    Args:
        trials: the trials to decode.
        tuning: labelled trials of the validation split; None: `trials` themselves.
        progress: called after each of `decodings` sentences.

    Raises:
        DataError: tuning without labelled trials.
    """
    halves = [(list(trials), options.settings)]
    rows: list[dict[str, float]] = []
    if options.tune:
        known = _with_sentence(trials if tuning is None else tuning)
        if len(known) < 2:
            raise DataError(
                "Tuning needs validation trials with sentences: use data with a val split, or "
                "leave out --tune-words."
            )
        points, errors, words = grid_errors(
            decoder,
            [t.phoneme_log_probs for t in known],
            [t.record.sentence_label or "" for t in known],
            options.settings,
            progress,
        )
        totals = max(int(words.sum()), 1)
        rows = [
            {"lm_weight": p.lm_weight, "word_score": p.word_score, "WER": int(e.sum()) / totals}
            for p, e in zip(points, errors, strict=True)
        ]
        if tuning is None:
            even = np.arange(len(known)) % 2 == 0
            place = {t.index: position for position, t in enumerate(known)}
            split = [[t for t in trials if place.get(t.index, 1) % 2 == half] for half in (0, 1)]
            halves = [
                (split[0], points[int(errors[:, ~even].sum(1).argmin())]),
                (split[1], points[int(errors[:, even].sum(1).argmin())]),
            ]
        else:
            halves = [(list(trials), points[int(errors.sum(1).argmin())])]
    text = {}
    for members, settings in halves:
        for trial in members:
            text[trial.index] = decoder.decode(trial.phoneme_log_probs, settings)
            progress()
    used = [settings for members, settings in halves if members]
    weights = {
        name: " / ".join(dict.fromkeys(f"{asdict(s)[name]:g}" for s in used))
        for name in asdict(options.settings)
    }
    scored = f"{len(_with_sentence(trials)):,} of {len(trials):,} trials, those with a sentence"
    summary = {
        "settings": {**facts, **weights, "Scored": scored},
        **_scores(trials, text),
        **({"grid": rows} if rows else {}),
    }
    return DecodedSentences(text, summary)


def decodings(
    options: WordOptions,
    trials: Sequence[DecodedTrial],
    tuning: Sequence[DecodedTrial] | None = None,
) -> int:
    """How many sentences `decode_sentences` decodes, those of the grid included."""
    known = _with_sentence(trials if tuning is None else tuning) if options.tune else []
    return len(trials) + len(grid(options.settings)) * len(known)


def write_submission(
    path: Path, manifest: TrialManifest, split: str, text: Mapping[int, str]
) -> None:
    """The competition's file: `id,text`, one row for every trial of the split, ids from 0.

    The order is that of the public evaluation script: sessions by date, trials as in the file.
    A trial without text keeps its row, so that no id after it moves.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "text"])
        rows = enumerate(manifest.select(split))
        writer.writerows((number, text.get(index, "")) for number, index in rows)


def empty_rows(manifest: TrialManifest, split: str, text: Mapping[int, str]) -> tuple[str, ...]:
    """The trials whose row of the submission holds no text, by name."""
    return tuple(manifest.trials[i].name for i in manifest.select(split) if not text.get(i))


def submission_remark(n_rows: int, empty: Sequence[str]) -> str:
    """What `write_submission` wrote, in one sentence."""
    if not empty:
        return f"submission.csv has {n_rows:,} rows, each with text"
    return (
        f"WARNING: submission.csv has {n_rows:,} rows, {len(empty):,} of them without text, as the "
        f"trial was left out or no word was found: {_some(empty)}"
    )


def _with_sentence(trials: Sequence[DecodedTrial]) -> list[DecodedTrial]:
    return [trial for trial in trials if trial.record.sentence_label]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (" …" if len(names) > _NAMED else "")


def _scores(trials: Sequence[DecodedTrial], text: Mapping[int, str]) -> dict[str, Any]:
    known = _with_sentence(trials)
    counts = [word_errors(t.record.sentence_label or "", text[t.index]) for t in known]
    if not sum(c.reference_labels for c in counts):
        return {}
    interval = bootstrap_interval([c.edits for c in counts], [c.reference_labels for c in counts])
    order = sorted(range(len(known)), key=lambda i: (-counts[i].edits, known[i].index))
    return {
        "WER": interval.as_dict(),
        "n_sentences": len(known),
        "sentences_right": sum(c.edits == 0 for c in counts) / len(counts),
        "examples": [
            {
                "reference": normalise_text(known[i].record.sentence_label or ""),
                "decoded": text[known[i].index],
                "errors": counts[i].edits,
            }
            for i in [*order[:5], *order[len(order) // 2 : len(order) // 2 + 5]]
        ],
    }
