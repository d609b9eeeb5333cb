"""A word n-gram language model from sentences, in the ARPA format that every decoder reads.

Interpolated Witten-Bell smoothing (Bell, Cleary & Witten, "Text Compression", 1990): a history seen
c times with t different words after it gives 1/(c + t) of its mass per count and t/(c + t) to the
shorter history. Good enough for a few thousand sentences; for more, train with KenLM's lmplz.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError

START, END, UNKNOWN = "<s>", "</s>", "<unk>"
Gram = tuple[str, ...]


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

    def score(self, history: Sequence[str], word: str) -> float:
        """Log10 P(word | history); words never seen count as <unk>."""
        gram = (*history[-(self.order - 1) :], word) if self.order > 1 else (word,)
        weight = 0.0
        while len(gram) > 1:
            if gram in self.probability:
                return weight + self.probability[gram]
            weight += self.backoff.get(gram[:-1], 0.0)
            gram = gram[1:]
        return weight + self.probability.get(gram, self.probability[(UNKNOWN,)])

    def sentence_score(self, sentence: str) -> float:
        """Log10 probability of a whole sentence, its end included."""
        history, total = [START], 0.0
        for word in [*sentence.split(), END]:
            known = word if (word,) in self.probability else UNKNOWN
            total += self.score(history, known)
            history.append(known)
        return total

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
