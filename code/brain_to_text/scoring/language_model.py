"""Word language models: n-grams estimated from sentences, and what a given file knows.

Interpolated Witten-Bell smoothing (Bell, Cleary & Witten, "Text Compression", 1990): a history seen
c times with t different words after it gives 1/(c + t) of its mass per count and t/(c + t) to the
shorter history. Good enough for a few thousand sentences; for more, train with KenLM's lmplz.
"""

from __future__ import annotations

import gzip
import itertools
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ..dataset.isolation import Lost, in_workers, limited
from ..errors import DataError, StorageError
from ..labels.pronunciation import dictionary_words, normalise_text, typed_text

START, END, UNKNOWN = "<s>", "</s>", "<unk>"
Gram = tuple[str, ...]
_KENLM_BINARY = b"mmap lm http://kheafield.com/code"
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class NgramModel:
    """Log10 probabilities of n-grams and log10 back-off weights of histories.

    Attributes:
        order: longest n-gram.
        probability: (w1, …, wn) → log10 P(wn | w1 … wn-1).
        backoff: history → log10 weight of the shorter history.
    """

    order: int
    probability: dict[Gram, float]
    backoff: dict[Gram, float]

    def write_arpa(self, path: Path) -> None:
        """Write the model as ARPA text."""
        by_order: list[list[Gram]] = [[] for _ in range(self.order)]
        for gram in self.probability:
            by_order[len(gram) - 1].append(gram)
        by_order[0].append((START,))
        lines = ["\\data\\", *(f"ngram {n}={len(g)}" for n, g in enumerate(by_order, 1))]
        for n, grams in enumerate(by_order, 1):
            lines += ["", f"\\{n}-grams:"]
            for gram in sorted(grams):
                value = self.probability.get(gram, -99.0)
                weight = f"\t{self.backoff[gram]:.6f}" if gram in self.backoff else ""
                lines.append(f"{value:.6f}\t{' '.join(gram)}{weight}")
        path.write_text("\n".join([*lines, "", "\\end\\", ""]), encoding="utf-8")


def estimate_ngrams(sentences: Iterable[str], order: int = 3) -> NgramModel:
    """Count n-grams of normalised sentences (words separated by spaces) and smooth them.

    Raises:
        DataError: no words at all.
    """
    counts: list[Counter[Gram]] = [Counter() for _ in range(order)]
    for sentence in sentences:
        words = [START, *sentence.split(), END]
        for end in range(1, len(words)):
            for n in range(1, min(order, end + 1) + 1):
                counts[n - 1][tuple(words[end + 1 - n : end + 1])] += 1
    if not counts[0]:
        raise DataError(
            "There are no sentences to train a language model on: the training split needs "
            "sentence_label attributes; give a model with --language-model FILE."
        )
    vocabulary = [*(gram[0] for gram in counts[0]), UNKNOWN]
    total, different = sum(counts[0].values()), len(counts[0])
    uniform = 1 / len(vocabulary)
    linear: dict[Gram, float] = {
        (word,): (counts[0][(word,)] + different * uniform) / (total + different)
        for word in vocabulary
    }
    backoff: dict[Gram, float] = {}
    for table in counts[1:]:
        seen: Counter[Gram] = Counter()
        followers: Counter[Gram] = Counter()
        for gram, count in table.items():
            seen[gram[:-1]] += count
            followers[gram[:-1]] += 1
        for history, count in seen.items():
            backoff[history] = followers[history] / (count + followers[history])
        for gram, count in table.items():
            mass = seen[gram[:-1]] + followers[gram[:-1]]
            linear[gram] = count / mass + backoff[gram[:-1]] * linear[gram[1:]]
    return NgramModel(
        order,
        {gram: math.log10(value) for gram, value in linear.items()},
        {history: math.log10(value) for history, value in backoff.items()},
    )


# --- files ----------------------------------------------------------------------------------------


def check_language_model(path: Path) -> None:
    """Raises: StorageError: there is no such file. DataError: KenLM cannot load it."""
    if not path.is_file():
        raise StorageError(
            f"Language model {path} does not exist: give --language-model an ARPA or KenLM file, "
            "or 'training' to make one from the training sentences."
        )
    with closing(in_workers(_kenlm_error, {str(path): (path,)})) as answers:
        _, answer = next(answers)
    if isinstance(answer, Lost):
        raise _unusable(path, answer.damage)
    if answer is not None:
        # without the places in KenLM's own source that its messages begin with
        reason = re.split(r"threw \w+(?: because `.*?')?\. ", " ".join(answer.split()))[-1]
        raise _unusable(path, reason[:200].rstrip(".") or "KenLM cannot load it")


def _kenlm_error(path: Path) -> str | None:
    """What KenLM says against a file, in a worker: damaged ones make it crash, hang or swell."""
    import kenlm

    try:
        with limited(path.stat().st_size):
            kenlm.Model(str(path))
    except UnicodeDecodeError as error:  # KenLM quotes bytes that are not UTF-8
        return error.object.decode("utf-8", "replace")
    except (OSError, RuntimeError, MemoryError) as error:
        return str(error)
    return None


def words_of_model(path: Path) -> tuple[dict[str, list[str]], list[str]]:
    """The words that a language model knows: an ARPA file's, or a KenLM binary's.

    A binary names no words but knows them when asked: it is asked for every word of the CMU
    dictionary, in lower case, in capitals and with a capital.

    Returns:
        (normalised word → the ways in which the model writes it; what has other letters than
        English words and cannot be decoded).

    Raises:
        DataError: neither ARPA text nor a KenLM binary. StorageError: unreadable.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_KENLM_BINARY))
        if start == _KENLM_BINARY:
            import kenlm

            model = kenlm.Model(str(path))
            words = ({word, word.upper(), word.capitalize()} for word in dictionary_words())
            written = [form for forms in words for form in sorted(forms) if form in model]
        else:
            written = _words_of_arpa(path, compressed=start.startswith(_GZIP))
    except OSError as error:
        raise StorageError(
            f"Language model {path} cannot be read ({error.strerror or error}): check the path."
        ) from error
    known: dict[str, list[str]] = {}
    foreign = []
    for form in written:
        word = normalise_text(form)
        if word and " " not in word and _letters(word) == _letters(typed_text(form)):
            known.setdefault(word, []).append(form)
        else:
            foreign.append(form)
    return known, foreign


def _words_of_arpa(path: Path, *, compressed: bool) -> list[str]:
    """The words of an ARPA file's 1-grams, as they are written there."""
    try:
        with (gzip.open if compressed else open)(
            path, "rt", encoding="utf-8", newline="\n"
        ) as lines:
            after = itertools.dropwhile(lambda line: not line.startswith("\\1-grams"), lines)
            if next(after, None) is None:
                raise _unusable(path, "it holds no list of 1-grams")
            grams = itertools.takewhile(lambda line: not line.startswith("\\"), after)
            words = [line.split("\t")[1].strip(" \r\n") for line in grams if line.strip()]
    except (UnicodeDecodeError, IndexError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _unusable(path, f"its list of 1-grams is damaged: {error}") from error
    return [word for word in words if word and not word.startswith("<")]


def _unusable(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path} cannot be used as a language model ({reason}): give ARPA text with 2-grams or "
        "longer, or a KenLM binary."
    )


def _letters(text: str) -> int:
    """Letters and digits, of which none may get lost where a word is normalised."""
    return sum(character.isalnum() for character in text)
