"""Sentences of decoded trials: from which words, with which language model, tuned how."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .error_analysis import bootstrap_interval
from .errors import DataError, StorageError
from .ngram import estimate_ngrams
from .pronunciation import lexicon_of, normalise_text, read_lexicon
from .trial_decoding import DecodedTrial
from .trial_manifest import TrialManifest
from .word_decoding import WordDecoder, WordSettings, grid_errors, word_errors, words_of_arpa

FROM_TRAINING = "training"
LEXICON_ONLY = "none"
NGRAM_ORDER = 3


@dataclass(frozen=True)
class WordOptions:
    """How sentences are decoded.

    Attributes:
        language_model: an ARPA or KenLM file; "training": 3-grams of the training sentences;
            "none": the lexicon alone.
        lexicon: a file of `WORD PHONEME …` lines; its words are added to the model's and come
            first; None uses the CMU dictionary alone.
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


def make_decoder(
    options: WordOptions, manifest: TrialManifest, folder: Path
) -> tuple[WordDecoder, dict[str, Any]]:
    """The decoder, and facts about it; a model made from training sentences is kept in `folder`.

    Raises:
        ConfigError: optional packages are missing. DataError, StorageError: no usable words.
    """
    source = options.language_model
    sentences = training_sentences(manifest) if source in (FROM_TRAINING, LEXICON_ONLY) else []
    model_file: Path | None = None
    if source == FROM_TRAINING:
        model_file = folder / "language_model.arpa"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            estimate_ngrams(sentences, NGRAM_ORDER).write_arpa(model_file)
        except OSError as error:
            raise StorageError(
                f"The language model cannot be written to {model_file} ({error.strerror}): give a "
                "writable folder with --output-dir."
            ) from error
    elif source != LEXICON_ONLY:
        model_file = Path(source)
    own = read_lexicon(options.lexicon) if options.lexicon else {}
    if sentences:
        words = {word for sentence in sentences for word in sentence.split()}
    elif own and model_file is not None and model_file.suffix != ".arpa":
        words = set()
    else:
        words = set(words_of_arpa(model_file)) if model_file is not None else set()
    lexicon, unknown = lexicon_of(words - own.keys())
    facts = {
        "Language model": {
            FROM_TRAINING: f"{NGRAM_ORDER}-grams of {len(sentences):,} training sentences",
            LEXICON_ONLY: "none, the lexicon alone",
        }.get(source, source),
        "Words that can be decoded": f"{len(lexicon | own):,}",
        "Words without a pronunciation": f"{len(unknown):,}"
        + (f" ({', '.join(unknown[:8])}{' …' if len(unknown) > 8 else ''})" if unknown else ""),
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
    progress: Callable[[], object] | None = None,
) -> DecodedSentences:
    """Decode every trial, with weights tuned where asked.

    Tuned on the very trials that are scored (`tuning` is None), each half of them is decoded with
    the weights that suit the other half, so that the word error rate stays honest.

    Args:
        trials: the trials to decode.
        tuning: labelled trials of the validation split; None: `trials` themselves.
        progress: called after each point of the grid.

    Raises:
        DataError: tuning without labelled trials.
    """
    halves = [(list(trials), options.settings)]
    rows: list[dict[str, float]] = []
    if options.tune:
        known = [t for t in (trials if tuning is None else tuning) if t.record.sentence_label]
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
    text = {
        trial.index: decoder.decode(trial.phoneme_log_probs, settings)
        for members, settings in halves
        for trial in members
    }
    used = [settings for members, settings in halves if members]
    summary = {
        "settings": dict(facts)
        | {
            name: " / ".join(dict.fromkeys(f"{asdict(s)[name]:g}" for s in used))
            for name in asdict(options.settings)
        },
        **_scores(trials, text),
        **({"grid": rows} if rows else {}),
    }
    return DecodedSentences(text, summary)


def write_submission(path: Path, trials: Sequence[DecodedTrial], text: Mapping[int, str]) -> None:
    """The competition's file: `id,text`, ids counting from 0.

    The order is that of the public evaluation script: sessions by date, trials as in the file.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "text"])
        writer.writerows((number, text[trial.index]) for number, trial in enumerate(trials))


def _scores(trials: Sequence[DecodedTrial], text: Mapping[int, str]) -> dict[str, Any]:
    known = [t for t in trials if t.record.sentence_label]
    counts = [word_errors(t.record.sentence_label or "", text[t.index]) for t in known]
    if not sum(c.reference_labels for c in counts):
        return {}
    interval = bootstrap_interval([c.edits for c in counts], [c.reference_labels for c in counts])
    order = sorted(range(len(known)), key=lambda i: (-counts[i].edits, known[i].index))
    return {
        "WER": interval.as_dict(),
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
