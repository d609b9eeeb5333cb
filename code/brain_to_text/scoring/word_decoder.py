"""Sentences from phoneme probabilities: beam search over a lexicon with a language model.

Needs the optional packages flashlight-text and kenlm (docker/requirements_sagemaker_words.txt);
they are imported when a decoder is made.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from ..labels.phonemes import BLANK, N_PHONEMES, SILENCE
from ..labels.pronunciation import Lexicon

FROM_TRAINING = "training"
LEXICON_ONLY = "none"
# the weights that tuning tries
LM_WEIGHTS = (0.5, 1.0, 2.0, 3.0, 4.5)
WORD_SCORES = (-1.0, 0.0, 1.0, 2.0)
BEAM_THRESHOLD = 50.0  # nats by which a hypothesis may be worse than the best
HOMOPHONES = 6  # words of one pronunciation that flashlight's trie holds; it drops the others


@dataclass(frozen=True)
class WordOptions:
    """How sentences are decoded; the names are those of the command's options.

    Attributes:
        language_model: an ARPA or KenLM file; "training": 3-grams of the training sentences;
            "none": the lexicon alone; None where sentences come from `rescored`.
        lexicon: a file of `WORD PHONEME …` lines; its words are added to the model's, and its
            pronunciations replace the CMU dictionary's.
        lm_weight: of the language model's log10 probabilities (as KenLM gives them) beside the
            natural logarithms of the acoustic ones: w here is w / ln 10 = 0.43 w in a decoder that
            takes natural logarithms of both.
        word_score: added per word; positive values favour more, shorter words.
        beam_size: hypotheses kept per frame.
        tune_words: choose the two weights on the validation split.
        nbest: hypotheses written of every trial.
        rescored: a table of hypotheses with new scores, whose best ones are the sentences.

    Raises:
        ConfigError: values that cannot be, options that exclude each other.
    """

    language_model: str | None = None
    lexicon: Path | None = None
    lm_weight: float = 2.0
    word_score: float = 0.0
    beam_size: int = 200
    tune_words: bool = False
    nbest: int = 1
    rescored: Path | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.beam_size <= 1_000_000:
            raise ConfigError(
                f"--beam-size is {self.beam_size}: give at least 1, and at most 1,000,000."
            )
        if not 1 <= self.nbest <= self.beam_size:
            raise ConfigError(
                f"--nbest is {self.nbest}: give 1 to {self.beam_size}, the hypotheses that "
                "--beam-size keeps."
            )
        for name in ("lm_weight", "word_score"):
            if not math.isfinite(getattr(self, name)):
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} is {getattr(self, name)}: give a finite number.")
        if (self.language_model is None) == (self.rescored is None):
            raise ConfigError(
                "Sentences come from one source: give --language-model (an ARPA or KenLM file, "
                "'training' or 'none') to decode them, or --rescored FILE to score those of a "
                "table."
            )
        given = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        if self.rescored is not None and given != {"rescored"}:
            raise ConfigError(
                "--rescored FILE holds the sentences: leave out --lexicon, --tune-words, --nbest "
                "and the search's weights, which are about decoding them."
            )


@dataclass(frozen=True)
class Hypothesis:
    """One sentence of an N-best list; score = acoustic + lm_weight x language + word_score x words.

    Attributes:
        acoustic: natural logarithm of the probability of its best path of phonemes.
        language: log10 probability of the sentence, its end included; 0 without a model.
    """

    text: str
    acoustic: float
    language: float
    score: float


class WordDecoder:
    """Decodes one trial at a time.

    Args:
        lexicon: normalised word → ways to say it, in phoneme ids without silence.
        language_model: ARPA or KenLM binary file that `check_language_model` found usable; None for
            the lexicon alone.
        forms: word → the ways in which the model writes it, where they differ from the word.

    Attributes:
        words: that can be decoded, sorted.
        dropped: words that share a pronunciation with too many others to be decoded.

    Raises:
        ConfigError: the optional packages are not installed.
        DataError: an empty lexicon.
    """

    def __init__(
        self,
        lexicon: Lexicon,
        language_model: Path | None,
        forms: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        decoder, dictionary = flashlight()
        if not lexicon:
            raise DataError(
                "The lexicon is empty: give --lexicon FILE, or a language model whose words the "
                "CMU dictionary knows."
            )
        self._api = decoder
        self.words = sorted(lexicon)
        self._word_of = {
            form: word for word in self.words for form in (forms or {}).get(word, (word,))
        }
        self._dictionary = dictionary.Dictionary([*self._word_of, "<unk>"])
        if language_model is None:
            self._model = decoder.ZeroLM()
        else:
            from flashlight.lib.text.decoder.kenlm import KenLM

            self._model = KenLM(str(language_model), self._dictionary)
        self.dropped: list[str] = []
        self._trie = self._spellings(lexicon)

    def hypotheses(self, log_probs: np.ndarray, options: WordOptions) -> list[Hypothesis]:
        """The `nbest` best different sentences, best first; at least one, which may be empty.

        Args:
            log_probs: [T', 41] float32 phoneme log-probabilities.
        """
        api = self._api
        search = api.LexiconDecoder(
            api.LexiconDecoderOptions(
                options.beam_size,
                N_PHONEMES,
                BEAM_THRESHOLD,
                options.lm_weight,
                options.word_score,
                float("-inf"),
                0.0,  # per silence
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
        found: dict[str, Hypothesis] = {}
        for path in search.decode(emissions.ctypes.data, *emissions.shape):
            forms = (self._dictionary.get_entry(w) for w in path.words if w >= 0)
            text = " ".join(self._word_of[form] for form in forms)
            if text not in found:
                scores = (path.emittingModelScore, path.lmScore, path.score)
                found[text] = Hypothesis(text, *scores)
            if len(found) == options.nbest:
                break
        return list(found.values()) or [Hypothesis("", 0.0, 0.0, 0.0)]

    def _spellings(self, lexicon: Lexicon) -> Any:
        """Every way to say every word, with the word's unigram score spread over its prefixes.

        Each ends with the silence that follows a word in the labels. The search needs it, too: it
        holds a token over several frames only inside a spelling, or if it is the silence.
        """
        trie = self._api.Trie(N_PHONEMES, SILENCE)
        start = self._model.start(False)
        sharing: Counter[tuple[int, ...]] = Counter()
        scored = []
        for form, word in self._word_of.items():
            index = self._dictionary.get_index(form)
            scored.append((-self._model.score(start, index)[1], word, index))
        for score, word, index in sorted(scored):
            for sounds in dict.fromkeys(lexicon[word]):
                sharing[sounds] += 1
                if sharing[sounds] > HOMOPHONES:
                    self.dropped.append(word)
                    continue
                trie.insert([*sounds, SILENCE], index, -score)
        trie.smear(self._api.SmearingMode.MAX)
        return trie


def flashlight() -> tuple[Any, Any]:
    """Flashlight's decoder and dictionary modules.

    Raises:
        ConfigError: an optional package is not installed.
    """
    try:
        import flashlight.lib.text.decoder as decoder
        import flashlight.lib.text.dictionary as dictionary
        import kenlm  # noqa: F401  (the decoder's KenLM binding loads its library)
    except ImportError as error:
        way = "type 'pip install -r docker/requirements_sagemaker_words.txt'"
        if sys.version_info >= (3, 13):  # no wheel, and kenlm does not compile
            way = (
                f"it exists for Python 3.11 and 3.12 alone, and this is {sys.version.split()[0]}: "
                "make .venv with PYTHON=python3.12 ./local_run.sh after removing it"
            )
        raise ConfigError(
            f"Decoding words needs an optional package ({error.name} is not installed): {way}."
        ) from error
    return decoder, dictionary
