"""Words and how they are spoken: text normalisation, the CMU dictionary, a user's own lexicon."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from ..errors import DataError, StorageError
from .phonemes import phoneme_ids

Pronunciation = tuple[int, ...]
Lexicon = dict[str, list[Pronunciation]]

_KEPT = re.compile(r"[^a-z' -]")
_VOICELESS = {"P", "T", "K", "F", "TH"}
_SIBILANT = {"S", "Z", "SH", "ZH", "CH", "JH"}


def normalise_text(sentence: str) -> str:
    """A sentence as the field scores it: lower case, letters, apostrophes and inner hyphens only.

    Follows the public baseline's evaluation: other characters vanish, a hyphen before a space and
    double hyphens too, an apostrophe joins the word before it.
    """
    text = _KEPT.sub("", sentence.lower())
    text = text.replace("- ", " ").replace("--", "").replace(" '", "'")
    return " ".join(text.split())


def pronunciations_of(word: str) -> list[Pronunciation]:
    """How a normalised word may be said: phoneme ids without silence; empty if nobody knows.

    The CMU Pronouncing Dictionary first; then hyphenated compounds from their parts, and
    possessives and plurals with 's from their stem.
    """
    known = _cmu().get(word)
    if known:
        return list(dict.fromkeys(tuple(phoneme_ids(sounds).tolist()) for sounds in known))
    if "-" in word.strip("-"):
        parts = [pronunciations_of(part) for part in word.split("-") if part]
        if all(parts):
            return [tuple(p for part in parts for p in part[0])]
    if word.endswith("'s") and _cmu().get(word[:-2]):
        return [
            tuple(phoneme_ids([*sounds, *_possessive(sounds[-1])]).tolist())
            for sounds in _cmu()[word[:-2]]
        ]
    if word.endswith(("'", "-")) or word.startswith(("'", "-")):
        bare = word.strip("'-")
        return pronunciations_of(bare) if bare else []
    return []


def dictionary_words() -> Iterable[str]:
    """Every word of the CMU dictionary."""
    return _cmu().keys()


def lexicon_of(words: Iterable[str]) -> tuple[Lexicon, list[str]]:
    """Pronunciations of `words`, and the words nobody knows, which no decoder can then say."""
    lexicon: Lexicon = {}
    unknown = []
    for word in sorted(set(words)):
        found = pronunciations_of(word)
        if found:
            lexicon[word] = found
        else:
            unknown.append(word)
    return lexicon, unknown


def read_lexicon(path: Path) -> Lexicon:
    """A user's lexicon: one `WORD PHONEME PHONEME …` per line, several lines for several ways.

    Raises:
        StorageError: unreadable. DataError: a line without phonemes or with unknown ones.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise StorageError(
            f"Lexicon {path} cannot be read ({error.strerror}): give a text file with --lexicon."
        ) from error
    lexicon: Lexicon = {}
    for number, line in enumerate(lines, 1):
        word, *sounds = line.split()[:1] + [s for s in line.split()[1:] if s != "|"] or [""]
        if not word or word.startswith("#"):
            continue
        if not sounds:
            raise DataError(f"{path} line {number}: '{word}' has no phonemes after it.")
        try:
            spoken = tuple(phoneme_ids(sounds).tolist())
        except DataError as error:
            raise DataError(f"{path} line {number}: {error}") from error
        lexicon.setdefault(normalise_text(re.sub(r"\(\d+\)$", "", word)), []).append(spoken)
    return lexicon


@cache
def _cmu() -> dict[str, list[list[str]]]:
    """Ways to say each word, with stress marks: `WORD(2) …` is a second one, # begins a comment."""
    found: dict[str, list[list[str]]] = {}
    with gzip.open(Path(__file__).with_name("cmudict.dict.gz"), "rt", encoding="utf-8") as lines:
        for line in lines:
            word, *sounds = line.partition("#")[0].split()
            found.setdefault(re.sub(r"\(\d+\)$", "", word), []).append(sounds)
    return found


def _possessive(last: str) -> list[str]:
    bare = last.rstrip("012")
    if bare in _SIBILANT:
        return ["IH", "Z"]
    return ["S"] if bare in _VOICELESS else ["Z"]
