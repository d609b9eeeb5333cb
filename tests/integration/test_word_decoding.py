"""Sentences from noisy phoneme posteriors: a language model of other sentences lowers the WER."""

from __future__ import annotations

import csv
import gzip
import json
from types import SimpleNamespace

import evaluate_model
import h5py
import jiwer
import numpy as np
import pytest

pytest.importorskip(
    "flashlight", reason="optional: pip install -r docker/requirements_sagemaker_words.txt"
)
pytest.importorskip(
    "kenlm", reason="optional: pip install -r docker/requirements_sagemaker_words.txt"
)

from brain_to_text.dataset.manifest import TrialManifest
from brain_to_text.dataset.synthetic import random_sentences, sentence_phonemes, vocabulary
from brain_to_text.errors import DataError, StorageError
from brain_to_text.labels.phonemes import N_PHONEMES
from brain_to_text.labels.pronunciation import lexicon_of
from brain_to_text.scoring.language_model import (
    START,
    estimate_ngrams,
    words_of_arpa,
    words_of_model,
)
from brain_to_text.scoring.statistics import ErrorCounts
from brain_to_text.scoring.word_decoder import WordDecoder, WordSettings, word_errors
from brain_to_text.scoring.words import (
    WordOptions,
    decode_sentences,
    decodings,
    make_decoder,
)
from support.decoded_trials import manifest_of, record
from support.tiny_data import write_dataset
from support.tiny_models import write_model

N_HELD_OUT = 24
SESSIONS = ("t15.2023.08.11", "t15.2023.08.13", "t15.2023.08.18")


def posteriors(sentence: str, random: np.random.Generator, noise: float) -> np.ndarray:
    """[T', 41] log-probabilities: each phoneme for 1 to 3 frames, blanks between, then noise."""
    frames = []
    for phoneme in sentence_phonemes(sentence):
        frames += [int(phoneme)] * int(random.integers(1, 4)) + [0] * int(random.integers(1, 3))
    logits = noise * random.standard_normal((len(frames), N_PHONEMES))
    logits[np.arange(len(frames)), frames] += 6
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)


def trial(index: int, sentence: str | None, log_probs: np.ndarray) -> SimpleNamespace:
    record = SimpleNamespace(sentence_label=sentence, session=SESSIONS[0])
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


def test_sentences_are_tuned_and_scored(decoders, monkeypatch):
    monkeypatch.setattr("brain_to_text.scoring.word_decoder.LM_WEIGHTS", (0.0, 2.0))
    monkeypatch.setattr("brain_to_text.scoring.word_decoder.WORD_SCORES", (0.0,))
    decoder, trials = decoders[1], decoders[2][:8]
    options = WordOptions("lm.arpa", settings=WordSettings(beam_size=50), tune=True)
    calls: list[int] = []
    facts = {"Language model": "lm.arpa"}
    result = decode_sentences(options, decoder, facts, trials, progress=lambda: calls.append(1))
    assert len(calls) == decodings(options, trials) == 2 * 8 + 8
    expected = jiwer.wer(
        [t.record.sentence_label for t in trials], [result.text[t.index] for t in trials]
    )
    assert result.summary["WER"]["value"] == expected
    assert [row["lm_weight"] for row in result.summary["grid"]] == [0.0, 2.0]


def test_weights_tuned_elsewhere_are_used_for_unlabelled_trials(decoders, monkeypatch):
    monkeypatch.setattr("brain_to_text.scoring.word_decoder.LM_WEIGHTS", (2.0,))
    monkeypatch.setattr("brain_to_text.scoring.word_decoder.WORD_SCORES", (0.0,))
    known = decoders[2][:3]
    unlabelled = [trial(9, None, known[0].phoneme_log_probs)]
    options = WordOptions("lm.arpa", settings=WordSettings(beam_size=50), tune=True)
    result = decode_sentences(options, decoders[1], {}, unlabelled, tuning=known)
    assert "WER" not in result.summary
    assert result.summary["settings"]["lm_weight"] == "2"
    assert list(result.text) == [9]


def test_progress_is_told_without_tuning_too(decoders):
    calls: list[int] = []
    trials = [*decoders[2][:2], trial(9, None, decoders[2][0].phoneme_log_probs)]
    options = WordOptions("lm.arpa", settings=WordSettings(beam_size=10))
    result = decode_sentences(options, decoders[1], {}, trials, progress=lambda: calls.append(1))
    assert len(calls) == decodings(options, trials) == 3
    assert result.summary["n_sentences"] == 2
    assert result.summary["settings"]["Scored"] == "2 of 3 trials, those with a sentence"


# --- language models and vocabularies -------------------------------------------------------------

SENTENCES = ["i see the cat", "i see the dog", "you see the cat"]


def test_language_model_scores_are_log10(tmp_path):
    model = estimate_ngrams(SENTENCES)
    model.write_arpa(tmp_path / "lm.arpa")
    lexicon, _ = lexicon_of(["see", "the", "cat"])
    decoder = WordDecoder(lexicon, tmp_path / "lm.arpa")
    _, score = decoder._model.score(
        decoder._model.start(False), decoder._dictionary.get_index("the")
    )
    assert score == pytest.approx(model.score([START], "the"), abs=1e-5)


@pytest.mark.parametrize("name", ["lm.arpa", "lm.txt", "lm"])
def test_the_words_of_a_model_are_told_by_its_content(name, tmp_path):
    estimate_ngrams(SENTENCES).write_arpa(tmp_path / name)
    lexicon = tmp_path / "mine.txt"
    lexicon.write_text("qqrx K ER K S\n")
    empty = TrialManifest((), {}, 4, 1681, "self_loop")
    decoder, facts = make_decoder(WordOptions(str(tmp_path / name), lexicon), empty, tmp_path)
    assert decoder.words == ["cat", "dog", "i", "qqrx", "see", "the", "you"]
    assert facts["Words that can be decoded"] == "7"
    assert facts["Vocabulary"] == f"6 words of the ARPA file, and 1 of {lexicon}"


def test_the_words_of_compressed_arpa_text_are_read(tmp_path):
    estimate_ngrams(SENTENCES).write_arpa(tmp_path / "plain")
    (tmp_path / "lm").write_bytes(gzip.compress((tmp_path / "plain").read_bytes()))
    assert words_of_model(tmp_path / "lm") == words_of_model(tmp_path / "plain")


def test_a_binary_model_is_asked_for_the_words_of_the_dictionary(tmp_path, monkeypatch):
    path = tmp_path / "lm.bin"
    path.write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0" + bytes(80))
    with pytest.raises(DataError, match="cannot be used as a language model"):
        words_of_model(path)  # KenLM refuses what only begins like one of its files
    monkeypatch.setattr("kenlm.Model", lambda _: {"cat", "dog", "zzyzzx"})
    words, _, what = words_of_model(path)
    assert words == {"cat": ["cat"], "dog": ["dog"]}
    assert what == "2 words of the CMU dictionary that the KenLM binary knows"


def test_the_words_of_training_sentences_and_a_lexicon_add_up(tmp_path):
    manifest = manifest_of([record(split="train", sentence="See the cat!"), record(sentence="No.")])
    lexicon = tmp_path / "mine.txt"
    lexicon.write_text("qqrx K ER K S\ncat K AE T S\n")
    decoder, facts = make_decoder(WordOptions("training", lexicon), manifest, tmp_path)
    assert decoder.words == ["cat", "qqrx", "see", "the"]
    assert facts["Vocabulary"] == f"3 words of 1 training sentences, and 2 of {lexicon}"
    assert (tmp_path / "language_model.arpa").exists()


@pytest.mark.parametrize("content", [b"", b"junk" * 99, b"\\1-grams:\nno tab\n", b"\xff\xfe\0\0"])
def test_what_is_no_language_model_is_one_sentence(content, tmp_path):
    (tmp_path / "lm").write_bytes(content)
    with pytest.raises(DataError, match="cannot be used as a language model") as caught:
        words_of_model(tmp_path / "lm")
    assert "\n" not in str(caught.value)
    with pytest.raises(StorageError, match="cannot be read"):
        words_of_model(tmp_path / "absent")


# --- the command ----------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    return evaluate_model.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artefact") / "model"
    write_model(folder, SESSIONS[:2])
    return folder


@pytest.fixture
def data(tmp_path):
    """Test trials of three sessions; one is shorter than a patch, one session has no day layer."""
    folder = tmp_path / "data"
    write_dataset(folder, SESSIONS, {"train": 2, "val": 2, "test": 3})
    with h5py.File(folder / SESSIONS[0] / "data_test.hdf5", "r+") as file:
        trial = file["trial_0001"]
        del trial["input_features"]
        trial["input_features"] = np.zeros((5, 32), np.float32)
        trial.attrs["n_time_steps"] = 5
    return folder


def test_the_submission_has_a_row_for_every_test_trial(model_folder, data, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ("--model", model_folder, "--data-dir", data, "--split", "test")
    options = ("--language-model", "training", "--beam-size", "20", "--output-dir", out)
    assert run(*arguments, *options) == 0
    with (out / "submission.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [str(number) for number in range(9)]
    decoded = {
        row["file"]: row["decoded_sentence"]
        for row in csv.DictReader((out / "trials.csv").read_text().splitlines())
    }
    names = [f"{s}/data_test.hdf5:trial_{n:04d}" for s in SESSIONS for n in range(3)]
    assert [row["text"] for row in rows] == [decoded.get(name, "") for name in names]
    assert sorted(names[i] for i in (0, 2, 3, 4, 5)) == sorted(decoded)
    said = capsys.readouterr().out
    empty = [name for name in names if not decoded.get(name)]
    assert f"WARNING: submission.csv has 9 rows, {len(empty)} of them without text" in said
    assert f"Left out: {names[1]}, shorter than one patch" in said
    assert "Left out: 3 trials of 1 sessions that the model has no day layer for" in said
    assert "Words that can be decoded: 2" in said
    summary = json.loads((out / "summary.json").read_text())
    assert summary["words"]["submission"] == {"rows": 9, "empty": empty}
    assert (out / "language_model.arpa").exists()


def test_a_first_trial_without_a_sentence_spoils_no_table(model_folder, data, tmp_path):
    with h5py.File(data / SESSIONS[0] / "data_val.hdf5", "r+") as file:
        del file["trial_0000"].attrs["sentence_label"]
    out = tmp_path / "out"
    arguments = ("--model", model_folder, "--data-dir", data, "--language-model", "training")
    assert run(*arguments, "--beam-size", "20", "--output-dir", out) == 0
    with (out / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["words"] for row in rows] == ["", "2", "2", "2"]
    assert json.loads((out / "summary.json").read_text())["words"]["n_sentences"] == 3


@pytest.mark.parametrize(
    ("model", "lexicon", "sentence"),
    [
        ("absent.arpa", None, "does not exist: give --language-model"),
        ("uni.arpa", None, "cannot be used as a language model"),
        ("training", "absent.txt", "cannot be read"),
        ("training", "bad.txt", "'QQ' is not a phoneme"),
        ("none", "bad.txt", "'QQ' is not a phoneme"),
    ],
)
def test_files_that_do_not_serve_are_found_before_anything_is_decoded(
    model, lexicon, sentence, model_folder, data, tmp_path, monkeypatch, capsys
):
    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("decoded first")

    monkeypatch.setattr("brain_to_text.scoring.evaluate.decode_trials", too_late)
    monkeypatch.chdir(tmp_path)
    estimate_ngrams(SENTENCES, 1).write_arpa(tmp_path / "uni.arpa")
    (tmp_path / "bad.txt").write_text("cat K QQ T\n")
    out = tmp_path / "out"
    words = ("--language-model", model, *(("--lexicon", lexicon) if lexicon else ()))
    assert run("--model", model_folder, "--data-dir", data, *words, "--output-dir", out) == 1
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists() or list(out.iterdir()) == []
