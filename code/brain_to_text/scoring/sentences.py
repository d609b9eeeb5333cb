"""Sentences of decoded trials: from which words, with which language model and weights."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..dataset.manifest import TrialManifest
from ..errors import ConfigError, DataError
from ..labels.pronunciation import Lexicon, lexicon_of, normalise_text, read_lexicon
from ..storage.locations import shortened
from .decoding import DecodedTrial
from .language_model import check_language_model, estimate_ngrams, words_of_model
from .word_decoder import (
    LM_WEIGHTS,
    WORD_SCORES,
    Hypothesis,
    WordDecoder,
    WordSettings,
    flashlight,
    word_errors,
)

FROM_TRAINING = "training"
LEXICON_ONLY = "none"
_NAMED = 8  # words that a line names


@dataclass(frozen=True)
class WordOptions:
    """How sentences are decoded.

    Attributes:
        language_model: an ARPA or KenLM file; "training": 3-grams of the training sentences;
            "none": the lexicon alone; None where sentences come from `rescored`.
        lexicon: a file of `WORD PHONEME …` lines; its words are added to the model's, and its
            pronunciations replace the CMU dictionary's.
        settings: weights of the search.
        tune_words: choose the two main weights on the validation split.
        nbest: hypotheses written of every trial.
        rescored: a table of hypotheses with new scores, whose best ones are the sentences.

    Raises:
        ConfigError: options that exclude each other.
    """

    language_model: str | None
    lexicon: Path | None = None
    settings: WordSettings = field(default_factory=WordSettings)
    tune_words: bool = False
    nbest: int = 1
    rescored: Path | None = None

    def __post_init__(self) -> None:
        if self.nbest < 1 or self.nbest > self.settings.beam_size:
            raise ConfigError(
                f"--nbest is {self.nbest}: give 1 to {self.settings.beam_size}, the hypotheses "
                "that --beam-size keeps."
            )
        decoding = self.language_model, self.lexicon, self.settings, self.tune_words, self.nbest
        if self.rescored is not None and decoding != (None, None, WordSettings(), False, 1):
            raise ConfigError(
                "--rescored FILE holds the sentences: leave out --language-model, --lexicon, "
                "--tune-words, --nbest and the search's weights, which are about decoding them."
            )

    def check(self) -> None:
        """Check what can be known before anything is read or decoded.

        Raises:
            ConfigError: optional packages are missing. DataError, StorageError: no usable file.
        """
        if self.rescored is not None:
            return
        flashlight()
        if self.language_model not in (FROM_TRAINING, LEXICON_ONLY):
            check_language_model(Path(str(self.language_model)))
        if self.lexicon is not None:
            read_lexicon(self.lexicon)


@dataclass(frozen=True)
class DecodedSentences:
    """The text of every trial.

    Attributes:
        text: normalised sentence by trial index.
        facts: about the decoder and its weights, for people.
        settings: of the search, by trial index.
        nbest: the best hypotheses by trial index, where more than one was asked for.
    """

    text: Mapping[int, str]
    facts: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[int, WordSettings] = field(default_factory=dict)
    nbest: Mapping[int, list[Hypothesis]] = field(default_factory=dict)

    def of(self, decoder: WordDecoder, trials: Sequence[DecodedTrial]) -> DecodedSentences:
        """What another model's log-probabilities of these trials say at the same weights."""
        bar = tqdm(trials, unit="sentence", desc="A member's sentences", disable=None)
        return DecodedSentences(
            {t.index: decoder.decode(t.phoneme_log_probs, self.settings[t.index]) for t in bar}
        )

    def summary(self, trials: Sequence[DecodedTrial]) -> dict[str, Any]:
        """Facts and examples: the worst sentences, and those in the middle."""
        rows: list[dict[str, Any]] = [
            {
                "reference": normalise_text(t.record.sentence_label),
                "decoded": self.text[t.index],
                "errors": word_errors(t.record.sentence_label, self.text[t.index]).edits,
            }
            for t in trials
            if t.record.sentence_label
        ]
        rows.sort(key=lambda row: -row["errors"])
        scored = f"{len(rows):,} of {len(trials):,} trials, those with a sentence"
        middle = max(len(rows) // 2, 5)
        return {
            "settings": {**self.facts, "Scored": scored},
            "examples": rows[:5] + rows[middle : middle + 5],
        }


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


def decode_sentences(
    options: WordOptions,
    decoder: WordDecoder,
    facts: Mapping[str, Any],
    trials: Sequence[DecodedTrial],
    tuning: Sequence[DecodedTrial] | None = None,
) -> DecodedSentences:
    """Decode every trial, with weights tuned where asked.

    Tuned on the very trials that are scored (`tuning` is None), each half of them is decoded with
    the weights that suit the other half, so that the word error rate stays honest.

    Args:
        trials: the trials to decode.
        tuning: labelled trials of the validation split; None: `trials` themselves.

    Raises:
        DataError: tuning without labelled trials.
    """
    used = {trial.index: options.settings for trial in trials}
    if options.tune_words:
        labelled = [t for t in tuning or trials if t.record.sentence_label]
        points, errors = _grid_errors(decoder, labelled, options.settings)
        if tuning is None:
            half = np.arange(len(labelled)) % 2
            best = [points[errors[:, half != number].sum(1).argmin()] for number in (0, 1)]
            position_of = {trial.index: position for position, trial in enumerate(labelled)}
            used = {index: best[position_of.get(index, 1) % 2] for index in used}
        else:
            used = dict.fromkeys(used, points[errors.sum(1).argmin()])
    found = {
        trial.index: decoder.hypotheses(trial.phoneme_log_probs, used[trial.index], options.nbest)
        for trial in tqdm(trials, unit="sentence", desc="Sentences", disable=None)
    }
    weights = {
        name: " / ".join(dict.fromkeys(f"{asdict(s)[name]:g}" for s in used.values()))
        for name in asdict(options.settings)
    }
    return DecodedSentences(
        {index: best[0].text for index, best in found.items()},
        {**facts, **weights},
        used,
        found if options.nbest > 1 else {},
    )


def _grid_errors(
    decoder: WordDecoder, trials: Sequence[DecodedTrial], settings: WordSettings
) -> tuple[list[WordSettings], np.ndarray]:
    """Points of the grid of language-model and word weights, and word errors [points, trials].

    Raises:
        DataError: fewer than two trials.
    """
    if len(trials) < 2:
        raise DataError(
            "Tuning needs validation trials with sentences: use data with a val split, or "
            "leave out --tune-words."
        )
    points = [
        replace(settings, lm_weight=lm_weight, word_score=word_score)
        for lm_weight, word_score in itertools.product(LM_WEIGHTS, WORD_SCORES)
    ]
    errors = [
        [
            word_errors(t.record.sentence_label, decoder.decode(t.phoneme_log_probs, point)).edits
            for t in trials
        ]
        for point in tqdm(points, unit="point", desc="Tuning", disable=None)
    ]
    return points, np.array(errors)
