"""Sentences from phoneme probabilities: beam search over a lexicon with a language model.

Needs the optional packages of docker/requirements_sagemaker_words.txt, flashlight-text and kenlm;
they are imported when a decoder is made.
"""

from __future__ import annotations

import gzip
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError, StorageError
from ..labels.phonemes import BLANK, N_PHONEMES, SILENCE
from ..labels.pronunciation import Lexicon, dictionary_words, normalise_text
from .decoding import ErrorCounts
from .statistics import count_errors

LM_WEIGHTS = (0.5, 1.0, 2.0, 3.0, 4.5)
WORD_SCORES = (-1.0, 0.0, 1.0, 2.0)
_KENLM_BINARY = b"mmap lm http://kheafield.com/code"
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class WordSettings:
    """Weights of the search.

    Attributes:
        lm_weight: of the language model's log10 probabilities (as KenLM gives them) beside the
            natural logarithms of the acoustic ones: w here is w / ln 10 = 0.43 w in a decoder that
            takes natural logarithms of both.
        word_score: added per word; positive values favour more, shorter words.
        silence_score: added per silence between words.
        beam_size: hypotheses kept per frame.
        beam_threshold: hypotheses this much worse than the best are dropped.

    Raises:
        ConfigError: a weight that is not a number, or no hypothesis to keep.
    """

    lm_weight: float = 2.0
    word_score: float = 0.0
    silence_score: float = 0.0
    beam_size: int = 200
    beam_threshold: float = 50.0

    def __post_init__(self) -> None:
        if self.beam_size < 1:
            raise ConfigError(f"--beam-size is {self.beam_size}: give at least 1.")
        for name in ("lm_weight", "word_score"):
            if not math.isfinite(getattr(self, name)):
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} is {getattr(self, name)}: give a finite number.")


class WordDecoder:
    """Decodes one trial at a time.

    Args:
        lexicon: word → ways to say it, in phoneme ids without silence.
        language_model: ARPA or KenLM binary file over those words; None for the lexicon alone.

    Raises:
        ConfigError: the optional packages are not installed.
        DataError: an empty lexicon, or a language model that KenLM cannot use.
        StorageError: no such language model.
    """

    def __init__(self, lexicon: Lexicon, language_model: Path | None) -> None:
        decoder, dictionary = _flashlight()
        if not lexicon:
            raise DataError(
                "The lexicon is empty: give --lexicon FILE, or a language model whose words the "
                "CMU dictionary knows."
            )
        self._api = decoder
        self.words = sorted(lexicon)
        self._dictionary = dictionary.Dictionary([*self.words, "<unk>"])
        if language_model is None:
            self._model = decoder.ZeroLM()
        else:
            check_language_model(language_model)
            from flashlight.lib.text.decoder.kenlm import KenLM

            with _explained(language_model):
                self._model = KenLM(str(language_model), self._dictionary)
        self._trie = self._spellings(lexicon)

    def decode(self, log_probs: np.ndarray, settings: WordSettings) -> str:
        """The most probable sentence.

        Args:
            log_probs: [T', 41] float32 phoneme log-probabilities.
            settings: of the search.
        """
        api = self._api
        search = api.LexiconDecoder(
            api.LexiconDecoderOptions(
                settings.beam_size,
                N_PHONEMES,
                settings.beam_threshold,
                settings.lm_weight,
                settings.word_score,
                float("-inf"),
                settings.silence_score,
                False,
                api.CriterionType.CTC,
            ),
            self._trie,
            self._model,
            SILENCE,
            BLANK,
            self._dictionary.get_index("<unk>"),
            [],
            False,
        )
        emissions = np.ascontiguousarray(log_probs, dtype=np.float32)
        best = search.decode(emissions.ctypes.data, *emissions.shape)
        if not best:
            return ""
        return " ".join(self._dictionary.get_entry(w) for w in best[0].words if w >= 0)

    def _spellings(self, lexicon: Lexicon) -> Any:
        """Every way to say every word, with the word's unigram score spread over its prefixes.

        Each ends with the silence that follows a word in the labels. The search needs it, too: it
        holds a token over several frames only inside a spelling, or if it is the silence.
        """
        trie = self._api.Trie(N_PHONEMES, SILENCE)
        start = self._model.start(False)
        for word in self.words:
            index = self._dictionary.get_index(word)
            _, score = self._model.score(start, index)
            for sounds in lexicon[word]:
                trie.insert([*sounds, SILENCE], index, score)
        trie.smear(self._api.SmearingMode.MAX)
        return trie


def word_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Edits between two sentences in words, after the field's normalisation."""
    words = sorted({*normalise_text(reference).split(), *normalise_text(hypothesis).split()})
    ids = {word: index for index, word in enumerate(words)}
    return count_errors(
        [ids[w] for w in normalise_text(reference).split()],
        [ids[w] for w in normalise_text(hypothesis).split()],
    )


def grid(settings: WordSettings) -> list[WordSettings]:
    """`settings` with every pair of language-model and word weights that tuning tries."""
    return [
        replace(settings, lm_weight=lm_weight, word_score=word_score)
        for lm_weight, word_score in itertools.product(LM_WEIGHTS, WORD_SCORES)
    ]


def grid_errors(
    decoder: WordDecoder,
    log_probs: Sequence[np.ndarray],
    sentences: Sequence[str],
    settings: WordSettings,
    progress: Callable[[], object] | None = None,
) -> tuple[list[WordSettings], np.ndarray, np.ndarray]:
    """Word errors of every trial at every point of the grid of language-model and word weights.

    Args:
        log_probs, sentences: of the trials to tune on.
        settings: everything but the two weights.
        progress: called after each decoded sentence.

    Returns:
        (the points of the grid, errors [points, trials] int64, reference words [trials] int64).
    """
    points = grid(settings)
    errors = np.zeros((len(points), len(sentences)), dtype=np.int64)
    for row, point in enumerate(points):
        for column, (own, sentence) in enumerate(zip(log_probs, sentences, strict=True)):
            errors[row, column] = word_errors(sentence, decoder.decode(own, point)).edits
            if progress is not None:
                progress()
    words = np.array([len(normalise_text(sentence).split()) for sentence in sentences])
    return points, errors, words


def check_words_packages() -> None:
    """Raises: ConfigError: an optional package is not installed."""
    _flashlight()


def check_language_model(path: Path) -> None:
    """Raises: StorageError: there is no such file."""
    if not path.is_file():
        raise StorageError(
            f"Language model {path} does not exist: give --language-model an ARPA or KenLM file, "
            "or 'training' to make one from the training sentences."
        )


def words_of_model(path: Path) -> tuple[set[str], str]:
    """The words that a language model knows, told by its content, and what they are.

    A KenLM binary names no words but knows them when asked: it is asked for every word of the CMU
    dictionary.

    Raises:
        DataError: neither ARPA text nor a KenLM binary. StorageError: unreadable.
    """
    try:
        with path.open("rb") as file:
            first = file.read(len(_KENLM_BINARY))
    except OSError as error:
        raise _unreadable(path, error) from error
    if first != _KENLM_BINARY:
        words = set(words_of_arpa(path, compressed=first.startswith(_GZIP)))
        return words, f"{len(words):,} words of the ARPA file"
    import kenlm

    with _explained(path):
        model = kenlm.Model(str(path))
    words = {word for word in dictionary_words() if word in model}
    return words, f"{len(words):,} words of the CMU dictionary that the KenLM binary knows"


def words_of_arpa(path: Path, *, compressed: bool = False) -> list[str]:
    """The vocabulary of an ARPA file.

    Raises:
        DataError: not ARPA text. StorageError: unreadable.
    """
    words: list[str] = []
    inside = False
    try:
        with (gzip.open if compressed else open)(path, "rt", encoding="utf-8") as file:
            for line in file:
                if line.startswith("\\"):
                    if inside:
                        break
                    inside = line.startswith("\\1-grams")
                elif inside and line.strip():
                    words.append(line.split("\t")[1].split()[0])
    except (UnicodeDecodeError, IndexError, EOFError) as error:
        raise _not_a_model(path, "it holds no list of 1-grams") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if not inside:
        raise _not_a_model(path, "it holds no list of 1-grams")
    return [word for word in words if not word.startswith("<")]


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """KenLM's complaints about a file as one sentence."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        text = " ".join(str(error).split())
        raise _not_a_model(path, re.split(r"threw \w+\. ", text)[-1][:200].rstrip(".")) from error


def _not_a_model(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path} cannot be used as a language model ({reason}): give ARPA text with 2-grams or "
        "longer, or a KenLM binary."
    )


def _unreadable(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"Language model {path} cannot be read ({error.strerror or error}): check the path."
    )


def _flashlight() -> tuple[Any, Any]:
    try:
        import flashlight.lib.text.decoder as decoder
        import flashlight.lib.text.dictionary as dictionary
        import kenlm  # noqa: F401  (the decoder's KenLM binding loads its library)
    except ImportError as error:
        raise ConfigError(
            f"Decoding words needs an optional package ({error.name} is not installed): type "
            "'pip install -r docker/requirements_sagemaker_words.txt'."
        ) from error
    return decoder, dictionary
