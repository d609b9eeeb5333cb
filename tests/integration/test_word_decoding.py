"""Sentences from noisy phoneme posteriors: a language model of other sentences lowers the WER."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import replace

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

from brain_to_text.dataset.synthetic import random_sentences, sentence_phonemes, vocabulary
from brain_to_text.errors import DataError
from brain_to_text.labels.phonemes import N_PHONEMES, phoneme_symbols
from brain_to_text.labels.pronunciation import lexicon_of
from brain_to_text.scoring.decoding import DecodedTrial, total_errors
from brain_to_text.scoring.language_model import (
    START,
    check_language_model,
    estimate_ngrams,
    words_of_model,
)
from brain_to_text.scoring.sentences import choose_weights, make_decoder, search
from brain_to_text.scoring.word_decoder import WordDecoder, WordOptions
from support.decoded_trials import decoded, manifest_of, record
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


def trial(index: int, sentence: str | None, log_probs: np.ndarray) -> DecodedTrial:
    of = record(trial=index, sentence=sentence)
    return replace(decoded(index, None, [], of=of), phoneme_log_probs=log_probs)


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    random = np.random.default_rng(0)
    training = random_sentences(600, random, size=120)
    path = arpa(tmp_path_factory.mktemp("lm") / "lm", training)
    lexicon, _ = lexicon_of(vocabulary(120))
    held_out = random_sentences(N_HELD_OUT, random, size=120, distinct_from=set(training))
    trials = [
        trial(i, sentence, posteriors(sentence, random, noise=2.6))
        for i, sentence in enumerate(held_out)
    ]
    return WordDecoder(lexicon, None), WordDecoder(lexicon, path), trials


OPTIONS = WordOptions("lm.arpa", beam_size=50)


def sentences(decoder: WordDecoder, trials: list, tuning=None, **changes) -> list[DecodedTrial]:
    weights = choose_weights(replace(OPTIONS, **changes), decoder, trials, tuning)
    return search(decoder, trials, weights).of(trials)


def test_clean_posteriors_give_the_sentence(decoders):
    spoken = "i can see the small house"
    heard = trial(0, spoken, posteriors(spoken, np.random.default_rng(1), 0.1))
    assert sentences(decoders[1], [heard])[0].sentence == spoken


def test_a_language_model_lowers_the_word_error_rate_on_held_out_sentences(decoders):
    without, with_model, trials = decoders
    found = {decoder: sentences(decoder, trials) for decoder in (without, with_model)}
    rates = {decoder: total_errors(texts, "WER").rate for decoder, texts in found.items()}
    assert rates[with_model] < rates[without]
    spoken = [t.record.sentence_label for t in trials]
    assert rates[with_model] == jiwer.wer(spoken, [t.sentence for t in found[with_model]])


def test_weights_are_tuned_on_the_other_half_or_on_other_trials(decoders, monkeypatch):
    monkeypatch.setattr("brain_to_text.scoring.sentences.LM_WEIGHTS", (0.0, 2.0))
    monkeypatch.setattr("brain_to_text.scoring.sentences.WORD_SCORES", (0.0,))
    decoder, known = decoders[1], decoders[2][:6]
    tuned = replace(OPTIONS, tune_words=True)
    halves = choose_weights(tuned, decoder, known)
    for half in (0, 1):
        others = [t for t in known if t.index % 2 != half]
        errors = {
            w: total_errors(sentences(decoder, others, lm_weight=w), "WER").edits for w in (0, 2)
        }
        chosen = {halves[t.index].lm_weight for t in known if t.index % 2 == half}
        assert chosen == {min(errors, key=errors.__getitem__)}
    unlabelled = [trial(9, None, known[0].phoneme_log_probs)]
    elsewhere = choose_weights(tuned, decoder, unlabelled, known)
    assert list(elsewhere) == [9] and elsewhere[9].lm_weight in (0, 2)


# --- language models and vocabularies -------------------------------------------------------------

SENTENCES = ["i see the cat", "i see the dog", "you see the cat"]


def arpa(path, sentences=SENTENCES, written=str, order=3):
    """A model whose words are written as `written` says."""
    model = estimate_ngrams([" ".join(map(written, s.split())) for s in sentences], order)
    model.write_arpa(path)
    return path


def test_language_model_scores_are_log10(tmp_path):
    model = estimate_ngrams(SENTENCES)
    lexicon, _ = lexicon_of(["see", "the", "cat"])
    decoder = WordDecoder(lexicon, arpa(tmp_path / "lm"))
    index = decoder._dictionary.get_index("the")
    _, score = decoder._model.score(decoder._model.start(False), index)
    # no sentence begins with "the"
    expected = model.backoff[START,] + model.probability["the",]
    assert score == pytest.approx(expected, abs=1e-5)


def test_the_words_of_a_model_are_told_by_its_content(tmp_path, monkeypatch):
    path = arpa(tmp_path / "lm", ["naïve we’ll cat3", "it's Größe кот", "Cat cat"])
    words, foreign = words_of_model(path)
    assert set(foreign) == {"cat3", "кот"}, "a word that loses letters is no other word"
    assert {word: sorted(forms) for word, forms in words.items()} == {
        "naive": ["naïve"],
        "we'll": ["we’ll"],
        "it's": ["it's"],
        "grosse": ["Größe"],
        "cat": ["Cat", "cat"],
    }
    packed, binary = tmp_path / "packed", tmp_path / "lm.bin"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert words_of_model(packed) == (words, foreign)
    binary.write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0" + bytes(80))
    with pytest.raises(DataError, match="cannot be used as a language model"):
        check_language_model(binary)  # KenLM refuses what only begins like one of its files
    monkeypatch.setattr("kenlm.Model", lambda _: {"cat", "dog", "zzyzzx"})
    assert words_of_model(binary) == ({"cat": ["cat"], "dog": ["dog"]}, [])


@pytest.mark.parametrize(
    ("model", "words", "vocabulary"),
    [
        ("lm", "cat dog i qqrx see the you", "6 words of the language model"),
        ("training", "cat qqrx see the", "3 words of 1 training sentences"),
    ],
)
def test_the_words_of_a_model_and_a_lexicon_add_up(model, words, vocabulary, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manifest = manifest_of([record(split="train", sentence="See the cat!"), record(sentence="No.")])
    arpa(tmp_path / "lm")
    lexicon = tmp_path / "mine.txt"
    lexicon.write_text("qqrx K ER K S\ncat K AE T S\n")
    if model == "lm":
        manifest = manifest_of([record()])
    decoder, facts = make_decoder(WordOptions(model, lexicon), manifest, tmp_path)
    assert decoder.words == words.split()
    assert facts["Words that can be decoded"] == f"{len(decoder.words)}"
    assert facts["Vocabulary"] == f"{vocabulary}, and 2 of {lexicon}"
    assert (tmp_path / "language_model.arpa").exists() == (model == "training")


def test_a_model_in_capitals_decodes_what_the_same_model_in_lower_case_does(tmp_path):
    spoken = random_sentences(4, np.random.default_rng(7), size=60)
    manifest = manifest_of([record(split="val", sentence=sentence) for sentence in spoken])
    lexicon = tmp_path / "mine.txt"
    spelled = {w: phoneme_symbols(ways[0]) for w, ways in lexicon_of(spoken[0].split())[0].items()}
    lexicon.write_text("".join(f"{w.upper()} {' '.join(p)}\n" for w, p in spelled.items()))
    random = np.random.default_rng(3)
    heard = [posteriors(sentence, random, 1.0) for sentence in spoken]
    for added in (None, lexicon):
        found = []
        for written in (str.lower, str.upper):
            path = arpa(tmp_path / "lm", spoken, written)
            decoder, facts = make_decoder(WordOptions(str(path), added), manifest, tmp_path)
            found.append([decoder.hypotheses(h, OPTIONS)[0] for h in heard])
            known = facts["Words of the transcripts that can be decoded"]
            assert known.startswith("100.0 % of ")
        for one, other in zip(*found, strict=True):
            assert one.text == other.text
            assert one.language == pytest.approx(other.language, abs=1e-4)
        assert added or [h.text for h in found[0]] == spoken


def test_a_model_of_another_language_is_refused_with_its_share(tmp_path):
    manifest = manifest_of([record(split="train", sentence="the dog is near the tree")])
    for alphabet in ("кот сидит тут", "die Größe zählt für Mädchen"):
        path = arpa(tmp_path / "lm", [alphabet, alphabet])
        with pytest.raises(DataError, match=r"knows 0\.0 % of 6 in train, not \(the, dog"):
            make_decoder(WordOptions(str(path)), manifest, tmp_path)


def test_words_that_sound_alike_beyond_what_the_search_holds_are_named(tmp_path):
    lexicon = {f"word{chr(97 + i)}": [(5, 6)] for i in range(8)}
    assert WordDecoder(lexicon, None).dropped == ["wordg", "wordh"]


# --- N-best lists ---------------------------------------------------------------------------------


def test_scores_of_a_hypothesis_add_up(decoders):
    decoder, one = decoders[1], decoders[2][0]
    options = replace(OPTIONS, lm_weight=1.5, word_score=0.7, nbest=8)
    found = decoder.hypotheses(one.phoneme_log_probs, options)
    assert len(found) > 1 and len({h.text for h in found}) == len(found)
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    for h in found:
        total = h.acoustic + 1.5 * h.language + 0.7 * len(h.text.split())
        assert h.score == pytest.approx(total, abs=1e-3)


# --- the command ----------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    return evaluate_model.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artefact") / "model"
    write_model(folder, SESSIONS[:2])
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three sessions, one without a day layer.

    A test trial is shorter than a patch; a validation trial has no sentence, another one that
    training has not seen.
    """
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, SESSIONS, {"train": 2, "val": 2, "test": 3})
    with h5py.File(folder / SESSIONS[0] / "data_test.hdf5", "r+") as file:
        trial = file["trial_0001"]
        del trial["input_features"]
        trial["input_features"] = np.zeros((5, 32), np.float32)
        trial.attrs["n_time_steps"] = 5
    with h5py.File(folder / SESSIONS[0] / "data_val.hdf5", "r+") as file:
        del file["trial_0000"].attrs["sentence_label"], file["trial_0000"]["transcription"]
    with h5py.File(folder / SESSIONS[1] / "data_val.hdf5", "r+") as file:
        file["trial_0000"].attrs["sentence_label"] = "Never said before."
    return folder


WORDS = ("--language-model", "training", "--beam-size", "20")


@pytest.fixture(scope="module")
def evaluated(model_folder, data, tmp_path_factory):
    """The results on val, with five sentences of each trial."""
    out = tmp_path_factory.mktemp("evaluated")
    arguments = ("--model", model_folder, "--data-dir", data, "--nbest", "5")
    assert run(*arguments, *WORDS, "--output-dir", out) == 0
    return out


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_submission_has_a_row_for_every_test_trial(model_folder, data, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ("--model", model_folder, "--data-dir", data, "--split", "test")
    assert run(*arguments, *WORDS, "--output-dir", out) == 0
    rows = rows_of(out / "submission.csv")
    assert [row["id"] for row in rows] == [str(number) for number in range(9)]
    decoded = {row["file"]: row["decoded_sentence"] for row in rows_of(out / "trials.csv")}
    names = [f"{s}/data_test.hdf5:trial_{n:04d}" for s in SESSIONS for n in range(3)]
    assert [row["text"] for row in rows] == [decoded.get(name, "") for name in names]
    assert sorted(names[i] for i in (0, 2, 3, 4, 5)) == sorted(decoded)
    said = capsys.readouterr().out
    empty = [name for name in names if not decoded.get(name)]
    assert f"WARNING: submission.csv has 9 rows, {len(empty)} of them without text" in said
    assert f"Left out: {names[1]}, shorter than one patch" in said
    assert "Left out: 3 trials of 1 sessions that the model has no day layer for" in said
    assert "Words that can be decoded: 2" in said
    assert (out / "language_model.arpa").exists()


def test_trials_without_a_sentence_or_with_a_new_one_are_told_apart(evaluated):
    rows, summary = rows_of(evaluated / "trials.csv"), summary_of(evaluated)
    assert [row["words"] for row in rows] == ["", "2", "3", "2"]
    assert summary["words"]["Scored"] == "3 of 4 trials, those with a sentence"
    for rate, unlabelled in (("PER", {"unknown": 1}), ("DER", {"unknown": 1}), ("WER", {})):
        found = summary["groups"][rate]["sentence"]
        trials = {name: row["n_trials"] for name, row in found.items()}
        assert trials == {"seen": 2, "unseen": 1, **unlabelled}
    assert summary["groups"]["WER"]["sentence"]["unseen"]["tokens"] == 3
    assert "on sentences seen in training, and others" in (evaluated / "report.html").read_text()


def test_n_best_lists_go_out_and_come_back_rescored(model_folder, data, evaluated, tmp_path):
    arguments = ("--model", model_folder, "--data-dir", data, "--output-dir", tmp_path / "again")
    rows = rows_of(evaluated / "nbest.csv")
    assert {row["file"] for row in rows} == {
        f"{s}/data_val.hdf5:trial_{n:04d}" for s in SESSIONS[:2] for n in range(2)
    }
    # as it went out, it gives the same sentences
    assert run(*arguments, "--rescored", evaluated / "nbest.csv") == 0
    assert summary_of(tmp_path / "again")["rates"]["WER"] == summary_of(evaluated)["rates"]["WER"]
    # a rescoring program prefers the truth
    for row in rows:
        row["score"] = "-1"
    truth = {"file": rows[-1]["file"], "hypothesis": "Hello, world!", "score": "0"}
    with (tmp_path / "mine.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), restval="")
        writer.writeheader()
        writer.writerows([*rows, truth])
    assert run(*arguments, "--rescored", tmp_path / "mine.csv") == 0
    trials = {row["file"]: row for row in rows_of(tmp_path / "again" / "trials.csv")}
    assert trials[truth["file"]]["decoded_sentence"] == "hello world"
    assert trials[truth["file"]]["word_errors"] == "0"


def test_an_ensembles_members_have_their_word_error_rates(model_folder, data, evaluated, tmp_path):
    write_model(tmp_path / "rival", SESSIONS[:2], n_classes=41, seed=4)
    both = ("--model", model_folder, "--model", tmp_path / "rival", "--data-dir", data)
    assert run(*both, *WORDS, "--output-dir", tmp_path / "both") == 0
    members = summary_of(tmp_path / "both")["members"]
    assert members[0]["rates"]["WER"] == summary_of(evaluated)["rates"]["WER"]
    assert not (tmp_path / "both" / "nbest.csv").exists(), "only where it was asked for"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--nbest 0 --language-model none", "--nbest is 0: give 1 to 200"),
        ("--nbest 201 --language-model none", "--nbest is 201: give 1 to 200"),
        ("--tune-words", "Sentences come from one source: give --language-model"),
        ("--lm-weight 0", "Sentences come from one source: give --language-model"),
        ("--rescored a.csv --language-model none", "Sentences come from one source"),
        ("--rescored a.csv --lm-weight 5", "FILE holds the sentences"),
        ("--rescored absent.csv", "absent.csv cannot be read"),
        ("--rescored short.csv", "has no row for 4 of 4 decoded trials"),
        ("--language-model absent.arpa", "does not exist: give --language-model"),
        ("--language-model uni.arpa", "cannot be used as a language model"),
        ("--language-model training --lexicon absent.txt", "cannot be read"),
        ("--language-model none --lexicon bad.txt", "'QQ' is not a phoneme"),
    ],
)
def test_what_does_not_serve_is_one_sentence_before_anything_is_decoded(
    options, sentence, model_folder, data, tmp_path, monkeypatch, capsys
):
    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("decoded first")

    monkeypatch.setattr("brain_to_text.scoring.evaluate.decode", too_late)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.csv").write_text("file,hypothesis,score\n")
    (tmp_path / "bad.txt").write_text("cat K QQ T\n")
    arpa(tmp_path / "uni.arpa", order=1)
    arguments = ("--model", model_folder, "--data-dir", data, "--output-dir", tmp_path / "out")
    assert run(*arguments, *options.split()) == 1
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
