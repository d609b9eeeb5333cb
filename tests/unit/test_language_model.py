"""The language model is a probability distribution, and other programs read it alike."""

from __future__ import annotations

import math

import pytest
from brain_to_text.errors import DataError
from brain_to_text.scoring.language_model import (
    END,
    START,
    UNKNOWN,
    NgramModel,
    estimate_ngrams,
)


def score(model: NgramModel, history: list[str], word: str) -> float:
    """Log10 P(word | history), as whoever reads the ARPA file computes it."""
    gram = (*history[-(model.order - 1) :], word) if model.order > 1 else (word,)
    weight = 0.0
    while len(gram) > 1:
        if gram in model.probability:
            return weight + model.probability[gram]
        weight += model.backoff.get(gram[:-1], 0.0)
        gram = gram[1:]
    return weight + model.probability.get(gram, model.probability[(UNKNOWN,)])


SENTENCES = ["i see the cat", "i see the dog", "the cat sees the dog", "i see", "you see the cat"]


@pytest.mark.parametrize("order", [1, 3])
def test_probabilities_after_any_history_sum_to_one(order):
    model = estimate_ngrams(SENTENCES, order)
    words = [gram[0] for gram in model.probability if len(gram) == 1]
    assert UNKNOWN in words and END in words
    for history in ([], [START], [START, "i"], ["see", "the"], ["never", "seen"], ["dog", "dog"]):
        assert math.isclose(sum(10 ** score(model, history, w) for w in words), 1, rel_tol=1e-9)


def sentence_score(model, sentence: str) -> float:
    """Log10 probability of a whole sentence, its end included."""
    history, total = [START], 0.0
    for word in [*sentence.split(), END]:
        known = word if (word,) in model.probability else UNKNOWN
        total += score(model, history, known)
        history.append(known)
    return total


def test_kenlm_scores_the_arpa_file_alike(tmp_path):
    kenlm = pytest.importorskip("kenlm", reason="optional: docker/requirements_sagemaker_words.txt")
    model = estimate_ngrams(SENTENCES)
    model.write_arpa(tmp_path / "lm.arpa")
    other = kenlm.Model(str(tmp_path / "lm.arpa"))
    for sentence in [*SENTENCES, "the the see", "a whale sees you"]:
        assert other.score(sentence) == pytest.approx(sentence_score(model, sentence), abs=1e-4)


def test_no_sentences_is_an_error():
    with pytest.raises(DataError, match="--language-model"):
        estimate_ngrams([])
