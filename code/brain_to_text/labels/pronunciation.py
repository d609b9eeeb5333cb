"""Words as people type them, and how they are spoken: the CMU dictionary, a user's own lexicon."""

from __future__ import annotations

import gzip
import re
import unicodedata
import zlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np

from ..errors import DataError, StorageError
from .phonemes import SILENCE, phoneme_ids

Pronunciation = tuple[int, ...]
Lexicon = dict[str, list[Pronunciation]]

_DICTIONARY = Path(__file__).with_name("cmudict.dict.gz")
_KEPT = re.compile(r"[^a-z' -]")
_LONGEST = 200  # phonemes of a word; decoders recurse over them
_VOICELESS = {"P", "T", "K", "F", "TH"}
_SIBILANT = {"S", "Z", "SH", "ZH", "CH", "JH"}
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


def typed_text(sentence: str) -> str:
    """Lower case, with ASCII for what is only another way to type it; accents are kept (NFC).

    Curly quotes, hyphens and dashes, ellipses, spaces of every width, ligatures, wide letters.
    Marks without width vanish. What has no certain ASCII form stays as it is.
    """
    shown = []
    for character in unicodedata.normalize("NFC", sentence).lower().translate(_TYPED):
        kind = unicodedata.category(character)
        if character.isspace() or kind[0] == "Z":
            shown.append(" ")
        elif kind == "Cf":
            continue
        elif kind[0] == "L" and unicodedata.decomposition(character)[:3] in ("<co", "<wi", "<na"):
            shown.append(unicodedata.normalize("NFKC", character).translate(_TYPED))
        else:
            shown.append(character)
    return unicodedata.normalize("NFC", "".join(shown).lower())


def normalise_text(sentence: str) -> str:
    """A sentence as the field scores it: lower case, letters, apostrophes and inner hyphens only.

    Follows the public baseline's evaluation, after `typed_text` and without accents: other
    characters vanish, a hyphen before a space and double hyphens too, an apostrophe joins the word
    before it.
    """
    text = _KEPT.sub("", _without_accents(typed_text(sentence)))
    text = text.replace("- ", " ").replace("--", "").replace(" '", "'")
    return " ".join(text.split())


def text_phonemes(sentence: str, own_words: Lexicon | None = None) -> np.ndarray:
    """Phoneme ids [n] int32 of a sentence, silence after every word.

    Args:
        own_words: pronunciations that take precedence over the CMU Pronouncing Dictionary.

    Raises:
        DataError: no words, or words that are not certain: digits, signs, foreign letters, or
            words that nobody knows; names them.
    """
    wrong = f"The sentence {sentence!r} cannot be turned into phonemes: "
    own = own_words or {}
    labels: list[int] = []
    unknown = []
    words = _words(sentence)
    for word in words:
        odd = _odd_characters(word, own)
        if any(unicodedata.category(character)[0] == "N" for character in odd):
            raise DataError(f"{wrong}'{word}' has digits; spell numbers out.")
        if odd:
            raise DataError(f"{wrong}'{word}' has '{odd[0]}'; write it in English words.")
        ways = _ways(word, own)
        if ways:
            labels += [*ways[0], SILENCE]
        else:
            unknown.append(word)
    if not words:
        raise DataError(f"{wrong}it has no words.")
    if unknown:
        raise DataError(
            f"{wrong}nobody says how to pronounce {', '.join(sorted(set(unknown)))}; add lines "
            "'word PHONEME PHONEME …' to a file and give it with --lexicon."
        )
    return np.asarray(labels, dtype=np.int32)


def unknown_words(sentence: str, own_words: Lexicon) -> list[str]:
    """The words of a sentence that `text_phonemes` would refuse, as they stand there."""
    return [w for w in _words(sentence) if _odd_characters(w, own_words) or not _ways(w, own_words)]


def _words(sentence: str) -> list[str]:
    return [word for word in _BETWEEN_WORDS.split(typed_text(sentence)) if word.strip("'-.")]


def _odd_characters(word: str, own_words: Lexicon) -> str:
    """What of a word no English word has, unless it is one's own word."""
    return "" if word in own_words else re.sub(r"[a-z'.-]", "", _without_accents(word))


def _ways(word: str, own_words: Lexicon) -> list[Pronunciation]:
    """How a typed word may be said, its accents heeded where they decide between two words."""
    plain = _without_accents(word)
    bare = plain.strip("'-.")
    for spelling in (word, plain, word.strip("'-."), bare):
        if own_words.get(spelling):
            return own_words[spelling]
    if _SPELT_OUT.fullmatch(bare):
        letters = [pronunciations_of(f"{letter}.") for letter in bare.split(".")]
        return [tuple(sound for letter in letters for sound in letter[0])] if all(letters) else []
    ways = pronunciations_of(plain) or pronunciations_of(bare)
    if word.strip("'-.").endswith(("é", "és")):  # "rosé" is not "rose"
        ways = [way for way in ways if _EY in way[-2:]]
    return ways


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
        word, *sounds = line.split()[:1] + [s for s in line.split()[1:] if s != "|"] or [""]
        if not word or word.startswith("#"):
            continue
        if not sounds:
            raise DataError(f"{path} line {number}: '{word}' has no phonemes after it.")
        if len(sounds) > _LONGEST or "BLANK" in sounds:
            wrong = (
                "BLANK, which is no phoneme" if "BLANK" in sounds else f"{len(sounds):,} phonemes"
            )
            raise DataError(f"{path} line {number}: '{word[:40]}' has {wrong}: correct the line.")
        try:
            spoken = tuple(phoneme_ids(sounds).tolist())
        except DataError as error:
            raise DataError(f"{path} line {number}: {error}") from error
        lexicon.setdefault(typed_text(re.sub(r"\(\d+\)$", "", word)), []).append(spoken)
    return lexicon


def _without_accents(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")


def dictionary_fingerprint() -> str:
    """8 hex digits that change with the dictionary's content."""
    return f"{zlib.crc32(_DICTIONARY.read_bytes()):08x}"


@cache
def _cmu() -> dict[str, list[list[str]]]:
    """Ways to say each word, with stress marks: `WORD(2) …` is a second one, # begins a comment."""
    found: dict[str, list[list[str]]] = {}
    with gzip.open(_DICTIONARY, "rt", encoding="utf-8") as lines:
        for line in lines:
            word, *sounds = line.partition("#")[0].split()
            found.setdefault(re.sub(r"\(\d+\)$", "", word), []).append(sounds)
    return found


def _possessive(last: str) -> list[str]:
    bare = last.rstrip("012")
    if bare in _SIBILANT:
        return ["IH", "Z"]
    return ["S"] if bare in _VOICELESS else ["Z"]
