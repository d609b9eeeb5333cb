"""Hold the labels of trials against their sentences: are these the phonemes of those words?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache

from ..errors import ConfigError
from ..labels.phonemes import SILENCE
from ..labels.pronunciation import normalise_text, pronunciations_of
from .trial_record import Finding, TrialRecord

_FEW_FIT = 0.9  # share of a file's trials whose labels fit their sentences, below which we warn
_ENOUGH_TRIALS = 3  # in a file, before none that fits is an error


def labels_against_sentences(trials: Sequence[TrialRecord]) -> Iterator[Finding]:
    """Files whose phonemes are not those of their sentences: words are counted by the silences
    after them; where the CMU dictionary is installed and knows a word, its phonemes count, too.
    """
    by_file: dict[str, list[TrialRecord]] = defaultdict(list)
    for trial in trials:
        if trial.phoneme_ids is not None and trial.sentence_label:
            by_file[trial.key].append(trial)
    for key, spoken in by_file.items():
        odd = [(t, reason) for t in spoken if (reason := _not_as_said(t))]
        fitting = 1 - len(odd) / len(spoken)
        if fitting >= _FEW_FIT:
            continue
        first, why = odd[0]
        reason = (
            f"the labels of {len(odd)} of {len(spoken)} trials ({1 - fitting:.0%}) do not fit "
            f"their sentences, the first {first.trial}: {why}; are they of the same trial, and "
            "numbered as in the guide?"
        )
        nothing_fits = len(odd) == len(spoken) >= _ENOUGH_TRIALS
        severity = "error" if nothing_fits else "warning"
        yield Finding(key, None, reason, "labels against sentences", severity)


def _not_as_said(trial: TrialRecord) -> str | None:
    """Why a trial's phonemes cannot be its sentence's; None if they can."""
    assert trial.phoneme_ids is not None and trial.sentence_label is not None
    ids = trial.phoneme_ids.tolist()
    ends = [place for place, phoneme in enumerate(ids) if phoneme == SILENCE]
    spoken = [tuple(ids[a:b]) for a, b in zip([0, *(e + 1 for e in ends)], ends, strict=False)]
    words = normalise_text(trial.sentence_label).split()
    if len(spoken) == len(" ".join(words).replace("-", " ").split()) > len(words):
        words = " ".join(words).replace("-", " ").split()
    if len(spoken) != len(words):
        return f"{len(spoken)} silences for the {len(words)} words of {trial.sentence_label!r}"
    known = [(word, said) for word, said in zip(words, spoken, strict=True) if _ways(word)]
    wrong = [word for word, said in known if said not in _ways(word)]
    if len(wrong) > len(known) / 2:
        return f"{wrong[0]!r} of {trial.sentence_label!r} is not said so"
    return None


@cache
def _ways(word: str) -> frozenset[tuple[int, ...]]:
    """How the dictionary says a word; nothing if it does not know, or is not there."""
    try:
        return frozenset(pronunciations_of(word))
    except ConfigError:
        return frozenset()
