"""Sentences of decoded trials: from which words, with which language model and weights."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..dataset.manifest import TrialManifest
from ..errors import DataError
from ..labels.pronunciation import Lexicon, lexicon_of, normalise_text, read_lexicon
from ..storage.locations import shortened
from .decoding import DecodedTrial
from .language_model import check_language_model, estimate_ngrams, words_of_model
from .word_decoder import (
    FROM_TRAINING,
    LEXICON_ONLY,
    LM_WEIGHTS,
    WORD_SCORES,
    Hypothesis,
    WordDecoder,
    WordOptions,
    flashlight,
)

_NAMED = 8  # words that a line names


def check_words(options: WordOptions) -> None:
    """Check what can be known before anything is read or decoded.

    Raises:
        ConfigError: optional packages are missing. DataError, StorageError: no usable file.
    """
    if options.rescored is not None:
        return
    flashlight()
    if options.language_model not in (FROM_TRAINING, LEXICON_ONLY):
        check_language_model(Path(str(options.language_model)))
    if options.lexicon is not None:
        read_lexicon(options.lexicon)


def training_sentences(manifest: TrialManifest) -> list[str]:
    """Normalised sentences of the training split, in order."""
    return _sentences(manifest, "train")


def _sentences(manifest: TrialManifest, split: str) -> list[str]:
    labels = [manifest.trials[i].sentence_label for i in manifest.select(split)]
    return [normalise_text(label) for label in labels if label]


# --- the decoder ----------------------------------------------------------------------------------


def make_decoder(
    options: WordOptions, manifest: TrialManifest, folder: Path, split: str = "val"
) -> tuple[WordDecoder, dict[str, Any]]:
    """The decoder, and facts about it; a model made of training sentences is written to `folder`.

    Raises:
        ConfigError: optional packages are missing. DataError, StorageError: no usable words, or
            a language model that knows other words than the data's. OSError: `folder` cannot be
            written.
    """
    source = str(options.language_model)
    given = source not in (FROM_TRAINING, LEXICON_ONLY)
    model_file: Path | None = None
    forms: dict[str, list[str]] = {}
    unknown: list[str] = []
    if given:
        model_file = Path(source)
        forms, unknown = words_of_model(model_file)
        words = set(forms)
        vocabulary = f"{len(words) + len(unknown):,} words of the language model"
    else:
        sentences = training_sentences(manifest)
        words = {word for sentence in sentences for word in sentence.split()}
        vocabulary = f"{len(words):,} words of {len(sentences):,} training sentences"
        if source == FROM_TRAINING:
            source = "3-grams of the training sentences"
            model_file = folder / "language_model.arpa"
            estimate_ngrams(sentences).write_arpa(model_file)
    added: Lexicon = {}
    for word, ways in (read_lexicon(options.lexicon) if options.lexicon else {}).items():
        added.setdefault(normalise_text(word), []).extend(ways)
    added.pop("", None)
    if added:
        vocabulary += f", and {len(added):,} of {options.lexicon}"
    lexicon, unspoken = lexicon_of(words - added.keys())
    unknown += unspoken
    known = lexicon.keys() | (added.keys() & forms.keys() if given else added.keys())
    lexicon |= added
    transcripts = _transcripts(known, manifest, split, source if given else None)
    decoder = WordDecoder(lexicon, model_file, forms)
    facts = {
        "Language model": source,
        "Vocabulary": vocabulary,
        "Words that can be decoded": f"{len(lexicon):,}",
        "Words without a pronunciation": f"{len(unknown):,}{_named(unknown)}",
    }
    if decoder.dropped:
        facts["Left out, as too many words sound alike"] = _named(decoder.dropped)
    return decoder, facts | transcripts


def _transcripts(
    known: Collection[str], manifest: TrialManifest, split: str, source: str | None
) -> dict[str, str]:
    """The share of the transcripts' words that decoder and language model know, as a fact.

    Raises:
        DataError: the model `source` does not know most of them.
    """
    for name in (split, "train"):
        sentences = _sentences(manifest, name)
        if any(sentences):
            break
    else:
        return {}
    spoken = Counter(word for sentence in sentences for word in sentence.split())
    total = spoken.total()
    unknown = Counter({word: n for word, n in spoken.items() if word not in known})
    share = 1 - unknown.total() / total
    examples = _named([word for word, _ in unknown.most_common(_NAMED)])
    fact = f"{100 * share:.1f} % of {total:,} in {name}{examples and f', not{examples}'}"
    if source is not None and share < 0.5:
        raise DataError(
            f"The language model {source} is not one for the words of the data: it knows {fact}; "
            "give --language-model a model of the transcripts' language, and --lexicon FILE for "
            "words that the CMU dictionary lacks."
        )
    return {"Words of the transcripts that can be decoded": fact}


def _named(names: Sequence[str]) -> str:
    """The first of these names, in brackets; nothing without names."""
    return f" ({shortened([name[:80] for name in names], _NAMED)})" if names else ""


# --- the search -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sentences:
    """What a search found, by trial index: options with the weights used, and hypotheses."""

    options: Mapping[int, WordOptions]
    found: Mapping[int, list[Hypothesis]]

    def of(self, trials: Sequence[DecodedTrial]) -> list[DecodedTrial]:
        """The trials with their best sentence."""
        return [replace(t, sentence=self.found[t.index][0].text) for t in trials]

    def weights(self) -> dict[str, str]:
        """The weights that were used, for people."""
        return {
            name: " / ".join(dict.fromkeys(f"{getattr(o, name):g}" for o in self.options.values()))
            for name in ("lm_weight", "word_score", "beam_size")
        }


def search(
    decoder: WordDecoder, trials: Sequence[DecodedTrial], options: Mapping[int, WordOptions]
) -> Sentences:
    """Decode the sentences of trials, each with the options of its index."""
    bar = tqdm(trials, unit="sentence", desc="Sentences", disable=None)
    found = {t.index: decoder.hypotheses(t.phoneme_log_probs, options[t.index]) for t in bar}
    return Sentences(options, found)


def choose_weights(
    options: WordOptions,
    decoder: WordDecoder,
    trials: Sequence[DecodedTrial],
    tuning: Sequence[DecodedTrial] | None = None,
) -> dict[int, WordOptions]:
    """The options of the search for every trial by its index, with weights tuned where asked.

    Tuned on the very trials that are scored (`tuning` is None), each half of them is decoded with
    the weights that suit the other half, so that the word error rate stays honest.

    Args:
        trials: the trials to decode.
        tuning: labelled trials of the validation split; None: `trials` themselves.

    Raises:
        DataError: tuning with fewer than two labelled trials.
    """
    if not options.tune_words:
        return {trial.index: options for trial in trials}
    labelled = [t for t in tuning or trials if t.record.sentence_label]
    if len(labelled) < 2:
        raise DataError(
            "Tuning needs validation trials with sentences: use data with a val split, or "
            "leave out --tune-words."
        )
    points = [
        replace(options, lm_weight=lm_weight, word_score=word_score, nbest=1)
        for lm_weight, word_score in itertools.product(LM_WEIGHTS, WORD_SCORES)
    ]
    errors = np.zeros((len(points), len(labelled)), dtype=np.int64)
    for row, point in enumerate(tqdm(points, unit="point", desc="Tuning", disable=None)):
        found = {t.index: decoder.hypotheses(t.phoneme_log_probs, point) for t in labelled}
        errors[row] = [t.errors["WER"].edits for t in Sentences({}, found).of(labelled)]
    if tuning is not None:
        best = points[errors.sum(1).argmin()]
        return {trial.index: replace(best, nbest=options.nbest) for trial in trials}
    half = np.arange(len(labelled)) % 2
    halves = [points[errors[:, half != number].sum(1).argmin()] for number in (0, 1)]
    position_of = {trial.index: position for position, trial in enumerate(labelled)}
    return {
        trial.index: replace(halves[position_of.get(trial.index, 1) % 2], nbest=options.nbest)
        for trial in trials
    }
