"""Words as people type them, and how they are spoken: the CMU dictionary and a user's lexicon."""

from __future__ import annotations

import gzip
import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np

from ..errors import DataError, StorageError
from .phonemes import BLANK, SILENCE, phoneme_ids

Pronunciation = tuple[int, ...]
Lexicon = dict[str, list[Pronunciation]]

_DICTIONARY = Path(__file__).with_name("cmudict.dict.gz")
_NOT_SCORED = re.compile(r"[^a-z' -]")
_LONGEST = 200  # phonemes of a word; decoders recurse over them
_VOICELESS = {"P", "T", "K", "F", "TH"}
_SIBILANT = {"S", "Z", "SH", "ZH", "CH", "JH"}
UNKNOWN_WORDS_ADVICE = (
    "spell out numbers and signs, or add lines 'word PHONEME PHONEME …' to a file and give it with "
    "--lexicon"
)
_EY = int(phoneme_ids(["EY"])[0])
_TYPED = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u02b9\u02bb\u02bc\u2032\uff07\ua78c`\u00b4", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb\u2039\u203a\u2033\uff02", '"'),
        **dict.fromkeys("\u2010\u2011\u2043\ufe63\uff0d", "-"),  # hyphens
        **dict.fromkeys("\u2012\u2013\u2014\u2015\u2212\u2e3a\u2026\u22ef", " "),  # dashes, dots
        "\u00e6": "ae",
        "\u0153": "oe",
        "\u00f8": "o",
        "\u00df": "ss",
        "\u0142": "l",
    }
)
_BETWEEN_WORDS = re.compile(
    r"""[\s,;:!?"()\[\]{}]+|--+|\.(?=[\s"')\]]|$)|(?<=[\w']\w)\.+(?=\w[\w'])|\.\.+"""
)
_SPELT_OUT = re.compile(r"[a-z](\.[a-z])+")  # U.S., e.g.


class UnknownWordsError(DataError):
    """Words of a sentence that have no known pronunciation: `words`, as they are written."""

    def __init__(self, sentence: str, words: list[str]) -> None:
        super().__init__(
            f"The sentence {sentence!r} cannot be turned into phonemes: no pronunciation is "
            f"known for {', '.join(dict.fromkeys(words))}; {UNKNOWN_WORDS_ADVICE}."
        )
        self.words = words


def typed_text(sentence: str) -> str:
    """Lower case, with ASCII for what is only another way to type it; accents are kept (NFC).

    Curly quotes, hyphens and dashes, ellipses, spaces of every width, ligatures, wide letters.
    Marks without width vanish. What has no certain ASCII form stays as it is.
    """
    plain = []
    for character in unicodedata.normalize("NFC", sentence).lower().translate(_TYPED):
        kind = unicodedata.category(character)
        if character.isspace():
            plain.append(" ")
        elif kind[0] == "L" and not unicodedata.decomposition(character).startswith("<super>"):
            plain.append(unicodedata.normalize("NFKC", character).translate(_TYPED))
        elif kind != "Cf":
            plain.append(character)
    return unicodedata.normalize("NFC", "".join(plain).lower())


def normalise_text(sentence: str) -> str:
    """A sentence as the field scores it: lower case, letters, apostrophes and inner hyphens only.

    Follows the public baseline's evaluation, after `typed_text` and without accents: other
    characters vanish, a hyphen before a space and double hyphens too, an apostrophe joins the word
    before it.
    """
    text = _NOT_SCORED.sub("", _without_accents(typed_text(sentence)))
    text = text.replace("- ", " ").replace("--", "").replace(" '", "'")
    return " ".join(text.split())


def text_phonemes(sentence: str, lexicon: Lexicon | None = None) -> np.ndarray:
    """Phoneme ids [n] int32 of a sentence, silence after every word.

    Args:
        lexicon: pronunciations that take precedence over the CMU Pronouncing Dictionary.

    Raises:
        UnknownWordsError: words without a known pronunciation, such as those with digits, signs or
            foreign letters. DataError: there are no words.
    """
    words = [word for word in _BETWEEN_WORDS.split(typed_text(sentence)) if word.strip("'-.")]
    spoken = [_ways(word, lexicon or {}) for word in words]
    if unknown := [word for word, ways in zip(words, spoken, strict=True) if not ways]:
        raise UnknownWordsError(sentence, unknown)
    if not words:
        raise DataError(f"The sentence {sentence!r} has no words.")
    return np.asarray([p for ways in spoken for p in (*ways[0], SILENCE)], dtype=np.int32)


def _ways(word: str, lexicon: Lexicon) -> list[Pronunciation]:
    """How a typed word may be said, its accents heeded where they decide between two words."""
    plain = _without_accents(word)
    bare = plain.strip("'-.")
    for spelling in (word, plain, word.strip("'-."), bare):
        if lexicon.get(spelling):
            return lexicon[spelling]
    if _SPELT_OUT.fullmatch(bare):
        letters = [pronunciations_of(f"{letter}.") for letter in bare.split(".")]
        return [_joined(letters)] if all(letters) else []
    ways = pronunciations_of(plain) or pronunciations_of(bare)
    if word.strip("'-.").endswith(("é", "és")):  # "rosé" is not "rose"
        ways = [way for way in ways if _EY in way[-2:]]
    return ways


def pronunciations_of(word: str) -> list[Pronunciation]:
    """How a normalised word may be said: phoneme ids without silence; empty if unknown.

    The CMU Pronouncing Dictionary first; then hyphenated compounds from their parts, and
    possessives and plurals with 's from their stem.
    """
    if known := _cmu().get(word):
        return list(dict.fromkeys(map(_spoken, known)))
    if "-" in word.strip("-"):
        parts = [pronunciations_of(part) for part in word.split("-") if part]
        if all(parts):
            return [_joined(parts)]
    if word.endswith("'s") and (stem := _cmu().get(word[:-2])):
        return [_spoken([*sounds, *_possessive(sounds[-1])]) for sounds in stem]
    bare = word.strip("'-")
    return pronunciations_of(bare) if bare not in ("", word) else []


def _spoken(sounds: Iterable[str]) -> Pronunciation:
    return tuple(phoneme_ids(sounds).tolist())


def _joined(parts: Iterable[list[Pronunciation]]) -> Pronunciation:
    """Each part said in its first way, one after the other."""
    return tuple(phoneme for ways in parts for phoneme in ways[0])


def _possessive(last: str) -> list[str]:
    bare = last.rstrip("012")
    if bare in _SIBILANT:
        return ["IH", "Z"]
    return ["S"] if bare in _VOICELESS else ["Z"]


def dictionary_words() -> Iterable[str]:
    """Every word of the CMU dictionary."""
    return _cmu().keys()


@cache
def _cmu() -> dict[str, list[list[str]]]:
    """Ways to say each word, with stress marks: `WORD(2) …` is a second one, # begins a comment."""
    found: dict[str, list[list[str]]] = {}
    with gzip.open(_DICTIONARY, "rt", encoding="utf-8") as lines:
        for line in lines:
            word, *sounds = line.partition("#")[0].split()
            found.setdefault(re.sub(r"\(\d+\)$", "", word), []).append(sounds)
    return found


def lexicon_of(words: Iterable[str]) -> tuple[Lexicon, list[str]]:
    """Pronunciations of `words`, and the words without one, which no decoder can then say."""
    found = {word: pronunciations_of(word) for word in sorted(set(words))}
    lexicon = {word: ways for word, ways in found.items() if ways}
    return lexicon, [word for word, ways in found.items() if not ways]


def read_lexicon(path: Path) -> Lexicon:
    """A user's lexicon: one `WORD PHONEME PHONEME …` per line, several lines for several ways.

    Raises:
        StorageError: unreadable. DataError: a line without phonemes or with unknown ones, or a
            file that is not UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise StorageError(
            f"Lexicon {path} cannot be read ({error.strerror}): give a text file with --lexicon."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"Lexicon {path} is not UTF-8 text (byte {error.start}): save it as UTF-8."
        ) from error
    lexicon: Lexicon = {}
    for number, line in enumerate(lines, 1):
        word, *sounds = line.split() or ["#"]
        if word.startswith("#"):
            continue
        try:
            spoken = _spoken(sound for sound in sounds if sound != "|")
        except DataError as error:
            raise DataError(f"{path} line {number}: {error}") from error
        if not 1 <= len(spoken) <= _LONGEST or BLANK in spoken:
            wrong = "BLANK, which is no phoneme" if BLANK in spoken else f"{len(spoken):,} phonemes"
            raise DataError(f"{path} line {number}: '{word[:40]}' has {wrong}: correct the line.")
        lexicon.setdefault(typed_text(re.sub(r"\(\d+\)$", "", word)), []).append(spoken)
    return lexicon


def _without_accents(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
