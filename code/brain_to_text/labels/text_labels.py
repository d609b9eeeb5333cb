"""Phoneme labels from a sentence: for recordings that come with text and no phonemes."""

from __future__ import annotations

import numpy as np

from ..errors import DataError
from .phonemes import SILENCE
from .pronunciation import Lexicon, normalise_text, pronunciations_of


def text_phonemes(sentence: str, own_words: Lexicon | None = None) -> np.ndarray:
    """Phoneme ids [n] int32 of a sentence, silence after every word.

    Args:
        own_words: pronunciations that take precedence over the CMU Pronouncing Dictionary.

    Raises:
        DataError: no words, digits, or words that nobody knows; names them.
    """
    wrong = f"The sentence {sentence!r} cannot be turned into phonemes: "
    if any(character.isdigit() for character in sentence):
        raise DataError(f"{wrong}it has digits; spell numbers out.")
    words = normalise_text(sentence).split()
    if not words:
        raise DataError(f"{wrong}it has no words.")
    labels: list[int] = []
    unknown = []
    for word in words:
        ways = (own_words or {}).get(word) or pronunciations_of(word)
        if ways:
            labels += [*ways[0], SILENCE]
        else:
            unknown.append(word)
    if unknown:
        raise DataError(
            f"{wrong}nobody says how to pronounce {', '.join(sorted(set(unknown)))}; add lines "
            "'word PHONEME PHONEME …' to a file and give it with --lexicon."
        )
    return np.asarray(labels, dtype=np.int32)
