"""Sentences of decoded trials: from which words, with which language model, tuned how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..dataset.manifest import TrialManifest
from ..errors import ConfigError, DataError, StorageError
from ..labels.pronunciation import Lexicon, lexicon_of, normalise_text, read_lexicon
from .decoding import DecodedTrial
from .language_model import check_language_model, estimate_ngrams, words_of_model
from .statistics import bootstrap_interval, rates_by
from .summary import seen_in_training
from .word_decoder import (
    Hypothesis,
    WordDecoder,
    WordSettings,
    check_words_packages,
    grid,
    grid_errors,
    word_errors,
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
        if self.rescored is not None and (self.lexicon or self.tune or self.n_best > 1):
            raise ConfigError(
                "--rescored FILE holds the sentences: leave out --lexicon, --tune-words and "
                "--nbest, which are about decoding them."
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
        summary: WER with interval (with labels), counts, facts and examples, as plain types.
        groups: WER by session and by whether training has the sentence, as `rates_by` gives it.
        settings: of the search, by trial index.
        n_best: the best hypotheses by trial index, where more than one was asked for.
    """

    text: Mapping[int, str]
    summary: dict[str, Any]
    groups: dict[str, Any] = field(default_factory=dict)
    settings: Mapping[int, WordSettings] = field(default_factory=dict)
    n_best: Mapping[int, list[Hypothesis]] = field(default_factory=dict)


def check_words(options: WordOptions) -> None:
    """What can be said before anything is read or decoded: packages and files are there.

    Raises:
        ConfigError: optional packages are missing. DataError, StorageError: no usable file.
    """
    if options.rescored is not None:
        return
    check_words_packages()
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
            try:
                estimate_ngrams(sentences, NGRAM_ORDER).write_arpa(model_file)
            except OSError as error:
                raise StorageError(
                    f"The language model cannot be written to {model_file} ({error.strerror}): "
                    "give a writable folder with --output-dir."
                ) from error
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
        + (f" ({some(unknown)})" if unknown else ""),
    }
    folded = sum(form != word for word, own_forms in forms.items() for form in own_forms)
    if folded:
        facts["Case of the language model"] = f"folded: {folded:,} words are not in lower case"
    if forms and own:
        missing = sorted(own.keys() - forms.keys())
        share = f"{len(own) - len(missing):,} of {len(own):,}"
        facts["Words of the lexicon that the language model knows"] = share + (
            f" (not {some(missing)})" if missing else ""
        )
    known = lexicon.keys() | (own.keys() & forms.keys() if forms else own.keys())
    facts |= _transcripts(known, manifest, split, str(source), strict=given)
    decoder = WordDecoder(lexicon | own, model_file, forms)
    if decoder.dropped:
        facts["Left out, as too many words sound alike"] = some(decoder.dropped)
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
    said += f" (not {some(examples)})" if examples else ""
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
    progress: Callable[[], object] = lambda: None,
    trained_on: Collection[str] = (),
) -> DecodedSentences:
    """Decode every trial, with weights tuned where asked.

    Tuned on the very trials that are scored (`tuning` is None), each half of them is decoded with
    the weights that suit the other half, so that the word error rate stays honest.

    Args:
        trials: the trials to decode.
        tuning: labelled trials of the validation split; None: `trials` themselves.
        progress: called after each of `decodings` sentences.
        trained_on: normalised sentences of the training split.

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
    found: dict[int, list[Hypothesis]] = {}
    used_for: dict[int, WordSettings] = {}
    for members, settings in halves:
        for trial in members:
            best = decoder.hypotheses(trial.phoneme_log_probs, settings, options.n_best)
            found[trial.index], used_for[trial.index] = best, settings
            progress()
    used = [settings for members, settings in halves if members]
    weights = {
        name: " / ".join(dict.fromkeys(f"{asdict(s)[name]:g}" for s in used))
        for name in asdict(options.settings)
    }
    text = {index: best[0].text for index, best in found.items()}
    sentences = score_sentences(trials, text, {**facts, **weights}, trained_on)
    if rows:
        sentences.summary["grid"] = rows
    if options.n_best > 1 and "WER" in sentences.summary:
        known = _with_sentence(trials)
        nearest = {t.index: _nearest(t.record.sentence_label or "", found[t.index]) for t in known}
        least = score_sentences(known, nearest, {}).summary["WER"]["value"]
        sentences.summary["WER of the best hypothesis"] = least
    return replace(sentences, settings=used_for, n_best=found if options.n_best > 1 else {})


def _nearest(sentence: str, hypotheses: Sequence[Hypothesis]) -> str:
    return min((h.text for h in hypotheses), key=lambda text: word_errors(sentence, text).edits)


def decodings(
    options: WordOptions,
    trials: Sequence[DecodedTrial],
    tuning: Sequence[DecodedTrial] | None = None,
) -> int:
    """How many sentences `decode_sentences` decodes, those of the grid included."""
    known = _with_sentence(trials if tuning is None else tuning) if options.tune else []
    return len(trials) + len(grid(options.settings)) * len(known)


def _with_sentence(trials: Sequence[DecodedTrial]) -> list[DecodedTrial]:
    return [trial for trial in trials if trial.record.sentence_label]


def some(names: Sequence[str]) -> str:
    """The first of many names, for a line."""
    return ", ".join(name[:80] for name in names[:_NAMED]) + (" …" if len(names) > _NAMED else "")


def score_sentences(
    trials: Sequence[DecodedTrial],
    text: Mapping[int, str],
    settings: Mapping[str, Any],
    trained_on: Collection[str] = (),
) -> DecodedSentences:
    """Sentences with their word error rate, whole and in groups, where the trials have labels."""
    known = _with_sentence(trials)
    scored = f"{len(known):,} of {len(trials):,} trials, those with a sentence"
    summary: dict[str, Any] = {"settings": {**settings, "Scored": scored}}
    counts = [word_errors(t.record.sentence_label or "", text[t.index]) for t in known]
    edits, words = [c.edits for c in counts], [c.reference_labels for c in counts]
    if not sum(words):
        return DecodedSentences(text, summary)
    order = sorted(range(len(known)), key=lambda i: (-counts[i].edits, known[i].index))
    summary |= {
        "WER": asdict(bootstrap_interval(edits, words)),
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
    groups = {"session": rates_by([t.record.session for t in known], edits, words)}
    if trained_on:
        keys = [seen_in_training(t, trained_on) for t in known]
        groups["sentence"] = rates_by(keys, edits, words)
    return DecodedSentences(text, summary, groups)
