"""Sentences of decoded trials: from which words, with which language model, tuned how."""

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
NGRAM_ORDER = 3
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
        tune: choose the two main weights on the validation split.
        n_best: hypotheses kept of every trial.
        rescored: a table of hypotheses with new scores, whose best ones are the sentences.

    Raises:
        ConfigError: options that exclude each other.
    """

    language_model: str | None
    lexicon: Path | None = None
    settings: WordSettings = field(default_factory=WordSettings)
    tune: bool = False
    n_best: int = 1
    rescored: Path | None = None

    def __post_init__(self) -> None:
        if self.n_best < 1 or self.n_best > self.settings.beam_size:
            raise ConfigError(
                f"--nbest is {self.n_best}: give 1 to {self.settings.beam_size}, the hypotheses "
                "that --beam-size keeps."
            )
        decoding = self.lexicon or self.tune or self.n_best > 1 or self.settings != WordSettings()
        if self.rescored is not None and decoding:
            raise ConfigError(
                "--rescored FILE holds the sentences: leave out --lexicon, --tune-words, --nbest "
                "and the search's weights, which are about decoding them."
            )
        if (self.language_model is None) == (self.rescored is None):
            raise ConfigError(
                "Sentences come from one place: give --language-model to decode them, or "
                "--rescored FILE to score those of a table."
            )


@dataclass(frozen=True)
class DecodedSentences:
    """The text of every trial.

    Attributes:
        text: normalised sentence by trial index.
        facts: about the decoder and its weights, for people.
        settings: of the search, by trial index.
        n_best: the best hypotheses by trial index, where more than one was asked for.
    """

    text: Mapping[int, str]
    facts: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[int, WordSettings] = field(default_factory=dict)
    n_best: Mapping[int, list[Hypothesis]] = field(default_factory=dict)

    def of(self, decoder: WordDecoder, trials: Sequence[DecodedTrial]) -> DecodedSentences:
        """What another model's log-probabilities of these trials say at the same weights."""
        bar = tqdm(trials, unit="sentence", desc="A member's sentences", disable=None)
        return DecodedSentences(
            {t.index: decoder.decode(t.phoneme_log_probs, self.settings[t.index]) for t in bar}
        )

    def summary(self, trials: Sequence[DecodedTrial]) -> dict[str, Any]:
        """Facts and examples: the worst sentences, and those in the middle."""
        known = [trial for trial in trials if trial.record.sentence_label]
        scored = f"{len(known):,} of {len(trials):,} trials, those with a sentence"
        rows: list[dict[str, Any]] = [
            {
                "reference": normalise_text(t.record.sentence_label or ""),
                "decoded": self.text[t.index],
                "errors": word_errors(t.record.sentence_label or "", self.text[t.index]).edits,
            }
            for t in known
        ]
        rows.sort(key=lambda row: -row["errors"])
        middle = len(rows) // 2
        return {
            "settings": {**self.facts, "Scored": scored},
            "examples": rows[:5] + rows[max(middle, 5) : middle + 5],
        }


def check_words(options: WordOptions) -> None:
    """What can be said before anything is read or decoded: packages and files are there.

    Raises:
        ConfigError: optional packages are missing. DataError, StorageError: no usable file.
    """
    if options.rescored is not None:
        return
    flashlight()
    if options.language_model not in (FROM_TRAINING, LEXICON_ONLY):
        check_language_model(Path(options.language_model or ""))
    if options.lexicon is not None:
        read_lexicon(options.lexicon)


def make_decoder(
    options: WordOptions, manifest: TrialManifest, folder: Path, split: str = "val"
) -> tuple[WordDecoder, dict[str, Any]]:
    """The decoder, and facts about it; a model made from training sentences is kept in `folder`.

    Raises:
        ConfigError: optional packages are missing. DataError, StorageError: no usable words, or
            a language model that speaks other words than the data.
    """
    source = options.language_model
    model_file: Path | None = None
    forms: dict[str, list[str]] = {}
    strange: list[str] = []
    given = source not in (None, FROM_TRAINING, LEXICON_ONLY)
    if not given:
        sentences = training_sentences(manifest)
        words = {word for sentence in sentences for word in sentence.split()}
        vocabulary = f"{len(words):,} words of {len(sentences):,} training sentences"
        model = "none, the lexicon alone"
        if source == FROM_TRAINING:
            model = f"{NGRAM_ORDER}-grams of {len(sentences):,} training sentences"
            model_file = folder / "language_model.arpa"
            estimate_ngrams(sentences, NGRAM_ORDER).write_arpa(model_file)
    else:
        model, model_file = str(source), Path(str(source))
        forms, strange, vocabulary = words_of_model(model_file)
        words = set(forms)
    own: Lexicon = {}
    for word, ways in (read_lexicon(options.lexicon) if options.lexicon else {}).items():
        if spelled := normalise_text(word):
            own.setdefault(spelled, []).extend(ways)
        else:
            strange.append(word)
    if own:
        vocabulary += f", and {len(own):,} of {options.lexicon}"
    lexicon, unknown = lexicon_of(words - own.keys())
    unknown += strange
    facts = {
        "Language model": model,
        "Vocabulary": vocabulary,
        "Words that can be decoded": f"{len(lexicon | own):,}",
        "Words without a pronunciation": f"{len(unknown):,}"
        + (f" ({_some(unknown)})" if unknown else ""),
    }
    folded = sum(form != word for word, own_forms in forms.items() for form in own_forms)
    if folded:
        facts["Case of the language model"] = f"folded: {folded:,} words are not in lower case"
    if forms and own:
        missing = sorted(own.keys() - forms.keys())
        share = f"{len(own) - len(missing):,} of {len(own):,}"
        facts["Words of the lexicon that the language model knows"] = share + (
            f" (not {_some(missing)})" if missing else ""
        )
    known = lexicon.keys() | (own.keys() & forms.keys() if forms else own.keys())
    facts |= _transcripts(known, manifest, split, str(source), strict=given)
    decoder = WordDecoder(lexicon | own, model_file, forms)
    if decoder.dropped:
        facts["Left out, as too many words sound alike"] = _some(decoder.dropped)
    return decoder, facts


def _transcripts(
    known: Collection[str], manifest: TrialManifest, split: str, source: str, *, strict: bool
) -> dict[str, str]:
    """The share of the transcripts' words that decoder and language model know, as a fact.

    Raises:
        DataError: most are unknown though the model is one for words like these (`strict`).
    """
    for name in (split, "train"):
        labels = [manifest.trials[i].sentence_label for i in manifest.select(name)]
        spoken = Counter(word for label in labels for word in normalise_text(label or "").split())
        if spoken:
            break
    else:
        return {}
    total = sum(spoken.values())
    unknown = Counter({word: n for word, n in spoken.items() if word not in known})
    share = 1 - sum(unknown.values()) / total
    examples = [word for word, _ in unknown.most_common(_NAMED)]
    said = f"{100 * share:.1f} % of {total:,} in {name}"
    said += f" (not {_some(examples)})" if examples else ""
    if strict and share < 0.5:
        raise DataError(
            f"The language model {source} does not speak the words of the data: it knows {said}; "
            "give --language-model a model of the transcripts' language, and --lexicon FILE for "
            "words that the CMU dictionary lacks."
        )
    return {"Words of the transcripts that can be decoded": said}


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
    if options.tune:
        known = [t for t in tuning or trials if t.record.sentence_label]
        points, errors = _grid_errors(decoder, known, options.settings)
        if tuning is None:
            half = np.arange(len(known)) % 2
            best = [points[errors[:, half != own].sum(1).argmin()] for own in (0, 1)]
            place = {trial.index: position for position, trial in enumerate(known)}
            used = {index: best[place.get(index, 1) % 2] for index in used}
        else:
            used = dict.fromkeys(used, points[errors.sum(1).argmin()])
    found = {
        trial.index: decoder.hypotheses(trial.phoneme_log_probs, used[trial.index], options.n_best)
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
        found if options.n_best > 1 else {},
    )


def _grid_errors(
    decoder: WordDecoder, trials: Sequence[DecodedTrial], settings: WordSettings
) -> tuple[list[WordSettings], np.ndarray]:
    """Every point of the grid of language-model and word weights, and its word errors.

    Returns:
        (the points, errors [points, trials] int64).

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
    errors = np.zeros((len(points), len(trials)), dtype=np.int64)
    for row, point in enumerate(tqdm(points, unit="point", desc="Tuning", disable=None)):
        for column, t in enumerate(trials):
            text = decoder.decode(t.phoneme_log_probs, point)
            errors[row, column] = word_errors(t.record.sentence_label or "", text).edits
    return points, errors


def _some(names: Sequence[str]) -> str:
    return shortened([name[:80] for name in names], _NAMED)
