"""Sentences from noisy phoneme posteriors: a language model of other sentences lowers the WER."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import jiwer
import numpy as np
import pytest

pytest.importorskip("flashlight", reason="optional: pip install -r docker/requirements-words.txt")
pytest.importorskip("kenlm", reason="optional: pip install -r docker/requirements-words.txt")

from brain_to_text.metrics import ErrorCounts
from brain_to_text.ngram import estimate_ngrams
from brain_to_text.phonemes import N_PHONEMES
from brain_to_text.pronunciation import lexicon_of
from brain_to_text.sentence_decoding import WordOptions, decode_sentences, write_submission
from brain_to_text.sentences import random_sentences, sentence_phonemes, vocabulary
from brain_to_text.word_decoding import WordDecoder, WordSettings, word_errors, words_of_arpa

N_HELD_OUT = 24


def posteriors(sentence: str, random: np.random.Generator, noise: float) -> np.ndarray:
    """[T', 41] log-probabilities: each phoneme for 1 to 3 frames, blanks between, then noise."""
    frames = []
    for phoneme in sentence_phonemes(sentence):
        frames += [int(phoneme)] * int(random.integers(1, 4)) + [0] * int(random.integers(1, 3))
    logits = noise * random.standard_normal((len(frames), N_PHONEMES))
    logits[np.arange(len(frames)), frames] += 6
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)


def trial(index: int, sentence: str | None, log_probs: np.ndarray) -> SimpleNamespace:
    record = SimpleNamespace(sentence_label=sentence)
    return SimpleNamespace(index=index, record=record, phoneme_log_probs=log_probs)


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    random = np.random.default_rng(0)
    training = random_sentences(600, random, size=120)
    path = tmp_path_factory.mktemp("lm") / "lm.arpa"
    estimate_ngrams(training).write_arpa(path)
    lexicon, _ = lexicon_of(vocabulary(120))
    held_out = random_sentences(N_HELD_OUT, random, size=120, distinct_from=set(training))
    trials = [
        trial(i, sentence, posteriors(sentence, random, noise=2.6))
        for i, sentence in enumerate(held_out)
    ]
    assert {w for s in training for w in s.split()} <= set(words_of_arpa(path))
    return WordDecoder(lexicon, None), WordDecoder(lexicon, path), trials


def wer(decoder: WordDecoder, trials: list, settings: WordSettings) -> float:
    total = ErrorCounts()
    for one in trials:
        text = decoder.decode(one.phoneme_log_probs, settings)
        total = total + word_errors(one.record.sentence_label, text)
    return total.rate


def test_clean_posteriors_give_the_sentence(decoders):
    random = np.random.default_rng(1)
    sentence = "i can see the small house"
    text = decoders[1].decode(posteriors(sentence, random, 0.1), WordSettings())
    assert text == sentence


def test_a_language_model_lowers_the_word_error_rate_on_held_out_sentences(decoders):
    without, with_model, trials = decoders
    settings = WordSettings(beam_size=100)
    assert wer(with_model, trials, settings) < wer(without, trials, settings)


def test_sentences_are_tuned_scored_and_submitted(decoders, tmp_path, monkeypatch):
    monkeypatch.setattr("brain_to_text.word_decoding.LM_WEIGHTS", (0.0, 2.0))
    monkeypatch.setattr("brain_to_text.word_decoding.WORD_SCORES", (0.0,))
    decoder, trials = decoders[1], decoders[2][:8]
    options = WordOptions("lm.arpa", settings=WordSettings(beam_size=50), tune=True)
    result = decode_sentences(options, decoder, {"Language model": "lm.arpa"}, trials)
    expected = jiwer.wer(
        [t.record.sentence_label for t in trials], [result.text[t.index] for t in trials]
    )
    assert result.summary["WER"]["value"] == expected
    assert [row["lm_weight"] for row in result.summary["grid"]] == [0.0, 2.0]

    write_submission(tmp_path / "submission.csv", trials, result.text)
    with (tmp_path / "submission.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [str(i) for i in range(8)]
    assert rows[3]["text"] == result.text[3]


def test_weights_tuned_elsewhere_are_used_for_unlabelled_trials(decoders, monkeypatch):
    monkeypatch.setattr("brain_to_text.word_decoding.LM_WEIGHTS", (2.0,))
    monkeypatch.setattr("brain_to_text.word_decoding.WORD_SCORES", (0.0,))
    known = decoders[2][:3]
    unlabelled = [trial(9, None, known[0].phoneme_log_probs)]
    options = WordOptions("lm.arpa", settings=WordSettings(beam_size=50), tune=True)
    result = decode_sentences(options, decoders[1], {}, unlabelled, tuning=known)
    assert "WER" not in result.summary
    assert result.summary["settings"]["lm_weight"] == "2"
    assert list(result.text) == [9]
