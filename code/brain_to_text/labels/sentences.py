"""Random English-like sentences over a closed vocabulary, with their phonemes.

The vocabulary (`common_words.csv`) covers all 39 phonemes; its pronunciations follow the CMU
Pronouncing Dictionary. Word order follows a small grammar and word choice falls off with rank, so
that a language model has something to learn.
"""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

import numpy as np

from .phonemes import SILENCE, phoneme_ids

# Each item is a word class; "?" after it: present half of the time. NP is a noun phrase.
_TEMPLATES = (
    "subject auxiliary verb NP",
    "subject auxiliary verb NP adverb?",
    "subject verb NP preposition NP",
    "subject adverb? verb NP",
    "NP auxiliary verb NP",
    "question auxiliary subject verb NP",
    "auxiliary subject verb NP preposition? NP",
    "greeting subject auxiliary verb NP",
    "subject verb NP conjunction subject verb NP",
    "adverb subject auxiliary verb preposition NP",
)
_NOUN_PHRASES = ("determiner noun", "possessive noun", "determiner adjective noun")


@cache
def _vocabulary(size: int | None) -> tuple[dict[str, list[str]], dict[str, np.ndarray]]:
    """Words by class, and phoneme ids by word; `size` words in all, spread over the classes."""
    with Path(__file__).with_name("common_words.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    classes: dict[str, list[str]] = {}
    for row in rows:
        classes.setdefault(row["class"], []).append(row["word"])
    if size is not None:
        share = size / len(rows)
        classes = {
            name: words[: max(1, round(len(words) * share))] for name, words in classes.items()
        }
    sounds = {row["word"]: phoneme_ids(row["phonemes"].split()) for row in rows}
    return classes, sounds


def vocabulary(size: int | None = None) -> list[str]:
    """The words that sentences are made of, sorted."""
    return sorted({word for words in _vocabulary(size)[0].values() for word in words})


def sentence_phonemes(sentence: str) -> np.ndarray:
    """Phoneme ids [n] int32 of a sentence of known words, silence after each word."""
    sounds = _vocabulary(None)[1]
    return np.concatenate([np.append(sounds[word], SILENCE) for word in sentence.split()]).astype(
        np.int32
    )


def random_sentences(
    count: int,
    rng: np.random.Generator,
    *,
    size: int | None = None,
    distinct_from: set[str] | None = None,
) -> list[str]:
    """`count` sentences; none of them is in `distinct_from`.

    Args:
        size: about how many words the vocabulary has; None for all.
    """
    classes, _ = _vocabulary(size)
    weights = {
        name: np.cumsum(1 / np.arange(2, len(words) + 2) ** 0.7) for name, words in classes.items()
    }
    avoided = distinct_from or set()
    sentences: list[str] = []
    while len(sentences) < count:
        template = _TEMPLATES[rng.integers(len(_TEMPLATES))]
        words: list[str] = []
        for item in template.split():
            if item.endswith("?") and rng.random() < 0.5:
                continue
            name = item.rstrip("?")
            parts = _NOUN_PHRASES[rng.integers(len(_NOUN_PHRASES))] if name == "NP" else name
            for part in parts.split():
                place = rng.random() * weights[part][-1]
                words.append(classes[part][int(np.searchsorted(weights[part], place))])
        sentence = " ".join(words)
        if sentence not in avoided:
            sentences.append(sentence)
    return sentences
