"""The evaluation command on artefacts as SageMaker leaves them."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import evaluate_model
import h5py
import jiwer
import numpy as np
import pytest
import torch
import yaml
from brain_to_text.dataset.indexing import load_or_build_manifest
from brain_to_text.dataset.selection import select_for_evaluation
from brain_to_text.errors import DataError
from brain_to_text.labels.diphones import collapse_to_phonemes
from brain_to_text.labels.phonemes import PHONEMES
from brain_to_text.model.augmentations import Augmentation
from brain_to_text.model.trained_model import open_model
from brain_to_text.scoring.decoding import Inference, decode, decode_features
from brain_to_text.scoring.evaluate import run_model, write_run_report
from brain_to_text.storage.store import open_store
from brain_to_text.streaming.dataset_s3 import EvaluationDatasetS3
from brain_to_text.streaming.trial_stream import TrialStream
from support.tiny_data import write_dataset
from support.tiny_models import write_model

SESSIONS = ("t15.2023.08.11", "t15.2023.08.13", "t15.2023.08.18")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artefact") / "model"
    write_model(folder, SESSIONS)
    return folder


def run(*arguments: object) -> int:
    return evaluate_model.main([str(argument) for argument in arguments])


def test_rates_equal_jiwer_and_the_trainers_validation(model_folder, tiny_dataset, tmp_path):
    data = tiny_dataset.folder
    assert run("--model", model_folder, "--data-dir", data, "--output-dir", tmp_path) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    with (tmp_path / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    expected = jiwer.wer([r["reference"] for r in rows], [r["hypothesis"] for r in rows])
    assert summary["rates"]["PER"]["value"] == expected

    artefact = open_model(model_folder)
    store = open_store(data)
    manifest = load_or_build_manifest(store, print)
    stream = TrialStream(store, manifest)
    chosen, _ = select_for_evaluation(manifest, artefact.config, SESSIONS, "val")
    dataset = EvaluationDatasetS3(stream, chosen, batch_size=2, device=torch.device("cpu"))
    transforms = artefact.config.dataset.data_transforms
    inference = Inference(artefact.build(), Augmentation(transforms))
    result = decode(inference, dataset, loss=True)
    dataset.close()
    assert result is not None
    numbers = result.numbers
    assert summary["rates"]["DER"]["value"] == numbers["der"]
    assert summary["rates"]["PER"]["value"] == numbers["per"]
    assert summary["rates"]["PER (diphone path)"]["value"] == numbers["per_path"]
    for session, rates in numbers["per_session"].items():
        for name, key in (("DER", "DER"), ("PER", "PER"), ("PER (diphone path)", "PER_path")):
            assert summary["groups"][name]["session"][session]["value"] == rates[key]


def test_the_guides_lines_for_a_notebook_decode_a_session(
    model_folder, tiny_dataset, tmp_path, monkeypatch
):
    guide = Path(evaluate_model.__file__).with_name("README_SAGEMAKER.md").read_text("utf-8")
    lines = guide.split("### In a notebook")[1].split("```python\n")[1].split("```")[0]
    (tmp_path / "results").symlink_to(model_folder)
    (tmp_path / "data").symlink_to(tiny_dataset.folder)
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(lines, found)
    assert run("--model", model_folder, "--data-dir", "data", "--output-dir", "out") == 0
    with (tmp_path / "out" / "trials.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["session"] == SESSIONS[0]]
    assert found["phonemes"] == [row["hypothesis"] for row in rows]
    model, trials = found["model"], found["trials"]
    with pytest.raises(DataError, match="no day layer for monday: give one of its 3 sessions"):
        decode_features(model, trials, "monday")
    for wrong in (trials[0][:, 1:], trials[0][:5], trials[0][None]):
        with pytest.raises(DataError, match=r"Trial 0 has the shape .* at least 6 bins and 32 f"):
            decode_features(model, [wrong], SESSIONS[0])


def test_s3_gives_the_same_tables_as_a_folder(
    model_folder, tiny_dataset, tiny_dataset_s3, s3_bucket, upload, tmp_path
):
    upload(model_folder, f"s3://{s3_bucket}/sagemaker-outputs/job")
    local, remote = tmp_path / "local", tmp_path / "remote"
    run("--model", model_folder, "--data-dir", tiny_dataset.folder, "--output-dir", local)
    status = run(
        *("--model", f"s3://{s3_bucket}/sagemaker-outputs/job", "--s3-bucket", s3_bucket),
        *("--s3-data-prefix", "data", "--output-dir", remote),
    )
    assert status == 0
    assert (local / "trials.csv").read_text() == (remote / "trials.csv").read_text()


def test_a_rival_is_compared_trial_by_trial(model_folder, tiny_dataset, tmp_path):
    rival = tmp_path / "phonemes"
    write_model(rival, SESSIONS, n_classes=41, seed=3)
    status = run(
        *("--model", model_folder, "--compare-with", rival),
        *("--data-dir", tiny_dataset.folder, "--output-dir", tmp_path / "out"),
    )
    assert status == 0
    comparison = json.loads((tmp_path / "out" / "summary.json").read_text())["comparison"]
    assert list(comparison["metrics"]) == ["PER"]  # a phoneme model has no diphones
    assert comparison["n_trials"] == 9
    assert 0 < comparison["metrics"]["PER"]["p_value"] <= 1
    assert "phonemes" in (tmp_path / "out" / "report.html").read_text()


def test_a_comparison_is_on_the_trials_of_both_models_and_names_the_others(
    model_folder, tiny_dataset, tmp_path, capsys
):
    write_model(tmp_path / "rival", SESSIONS[1:], seed=3)
    status = run(
        *("--model", model_folder, "--compare-with", tmp_path / "rival"),
        *("--data-dir", tiny_dataset.folder, "--output-dir", tmp_path / "out"),
    )
    assert status == 0
    comparison = json.loads((tmp_path / "out" / "summary.json").read_text())["comparison"]
    lost = [f"{SESSIONS[0]}/data_val.hdf5:trial_{n:04d}" for n in range(3)]
    assert comparison["n_trials"] == 6
    assert comparison["left_out"] == {"decoded by this model only": lost}
    assert (
        "Compared on the 6 trials that both models decoded; 3 left out" in capsys.readouterr().out
    )
    assert lost[2] in (tmp_path / "out" / "report.html").read_text()


# --- ensembles ------------------------------------------------------------------------------------


def log_probs(folder, names):
    with h5py.File(folder / "phoneme_logits.hdf5") as file:
        return {name: file[name][:].astype(np.float64) for name in names}


def test_an_ensemble_decodes_the_mean_of_its_members_log_probabilities(
    model_folder, tiny_dataset, tmp_path
):
    """Also when the members number their sessions differently and have other classes."""
    rival = tmp_path / "phonemes"
    write_model(rival, SESSIONS[::-1], n_classes=41, seed=3)
    data = ("--data-dir", tiny_dataset.folder, "--export-logits")
    for name, models in {"a": [model_folder], "b": [rival], "whole": [model_folder, rival]}.items():
        named = [word for model in models for word in ("--model", model)]
        assert run(*named, *data, "--output-dir", tmp_path / name) == 0
    names = [f"{session}/trial_{n:04d}" for session in SESSIONS for n in range(3)]
    a, b, whole = (log_probs(tmp_path / name, names) for name in ("a", "b", "whole"))
    for name in names:
        mean = (a[name] + b[name]) / 2
        expected = mean - np.log(np.exp(mean).sum(1, keepdims=True))
        np.testing.assert_allclose(whole[name], expected, atol=1e-4)
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert list(summary["rates"]) == ["PER"], "a mean over phonemes has no diphones"
    for folder, member in zip(("a", "b"), summary["members"], strict=True):
        alone = json.loads((tmp_path / folder / "summary.json").read_text())
        assert member["rates"] == alone["rates"]
        difference = summary["rates"]["PER"]["value"] - alone["rates"]["PER"]["value"]
        assert member["comparison"]["difference"]["value"] == pytest.approx(difference)
    page = (tmp_path / "whole" / "report.html").read_text()
    section = page.split('<section id="ensemble">')[1].split("</section>")[0]
    assert str(model_folder) in section and str(rival) in section


def test_an_ensemble_is_scored_on_the_trials_of_all_members(
    model_folder, tiny_dataset, tmp_path, capsys
):
    write_model(tmp_path / "rival", SESSIONS[1:], seed=3)
    models = ("--model", model_folder, "--model", tmp_path / "rival")
    out = tmp_path / "out"
    assert run(*models, "--data-dir", tiny_dataset.folder, "--output-dir", out) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["n_trials"] == 6
    assert any(f"Left out: 3 trials that {model_folder}" in line for line in summary["remarks"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(f"{tmp_path / 'rival'}: Left out: 3 trials of 1 sessions" in x for x in lines) == 1


@pytest.mark.parametrize(
    ("changes", "sessions", "sentence"),
    [
        ({"patch_stride": 3}, SESSIONS, "model.patch_stride is 2 in"),
        ({"patch_size": 8}, SESSIONS, "model.patch_size is 6 in"),
        ({}, ("t15.2023.08.13",), "share no trial"),
    ],
)
def test_models_that_make_no_ensemble_are_one_sentence(
    changes, sessions, sentence, tiny_dataset, tmp_path, capsys
):
    write_model(tmp_path / "a", ("t15.2023.08.11",))
    write_model(tmp_path / "b", sessions, **changes)
    models = ("--model", tmp_path / "a", "--model", tmp_path / "b")
    out = tmp_path / "out"
    assert run(*models, "--data-dir", tiny_dataset.folder, "--output-dir", out) == 1
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists() or list(out.iterdir()) == []


# --- what is in the folder already ----------------------------------------------------------------


def test_another_models_results_are_not_mixed_with(model_folder, tiny_dataset, tmp_path, capsys):
    write_model(tmp_path / "b", SESSIONS, seed=3)
    out = tmp_path / "out"
    data = ("--data-dir", tiny_dataset.folder, "--output-dir", out)
    assert run("--model", model_folder, *data, "--export-logits") == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for other in (("--model", tmp_path / "b"), ("--model", model_folder, "--split", "train")):
        assert run(*other, *data) == 1
        assert f"{out} holds trials.csv of {model_folder} on val" in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run("--model", model_folder, *data) == 0, "the same again"
    assert not (out / "phoneme_logits.hdf5").exists(), "nothing of the evaluation before stays"
    for name in ("nbest.csv", "trials.csv"):  # not of that evaluation; into which a column went
        (out / name).write_text("somebody's scores")
        assert run("--model", model_folder, *data) == 1
        assert f"{out} holds {name}, which that evaluation did not write" in capsys.readouterr().err
        assert (out / name).read_text() == "somebody's scores"
        (out / name).write_bytes(before["trials.csv"])
        (out / "nbest.csv").unlink(missing_ok=True)
    (out / "phoneme_logits.hdf5").write_text("of another evaluation")
    assert run("--model", tmp_path / "b", *data, "--overwrite") == 0
    assert not (out / "phoneme_logits.hdf5").exists()
    assert json.loads((out / "summary.json").read_text())["model"] == str(tmp_path / "b")


@pytest.mark.parametrize("below", ["", "results"])
def test_nothing_is_written_where_the_data_is(below, model_folder, tiny_dataset, tmp_path, capsys):
    (tmp_path / "link").symlink_to(tiny_dataset.folder)
    arguments = ("--model", model_folder, "--data-dir", tiny_dataset.folder)
    assert run(*arguments, "--output-dir", tmp_path / "link" / below) == 1
    assert "lies in the dataset" in capsys.readouterr().err
    assert not (tiny_dataset.folder / "results").exists()


@pytest.mark.parametrize("name", ["report.html", "submission.csv"])
def test_what_no_evaluation_wrote_is_left_alone(name, model_folder, tiny_dataset, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("somebody's own")
    (out / "notes.txt").write_text("mine")
    arguments = ("--model", model_folder, "--data-dir", tiny_dataset.folder, "--output-dir", out)
    assert run(*arguments) == 1
    assert f"{name}, which no evaluation wrote" in capsys.readouterr().err
    assert (out / name).read_text() == "somebody's own"
    assert run(*arguments, "--overwrite") == 0
    assert (out / "notes.txt").read_text() == "mine"


def test_unlabelled_trials_are_decoded_and_exported(model_folder, tmp_path):
    data = tmp_path / "data"
    write_dataset(data, SESSIONS[:2], {"train": 1, "test": 3})
    for key in data.rglob("data_test.hdf5"):
        with h5py.File(key, "a") as file:
            for trial in file.values():
                for name in ("seq_class_ids", "seq_class_ids_phoneme", "transcription"):
                    del trial[name]
                for name in ("seq_len", "seq_len_phoneme", "sentence_label"):
                    del trial.attrs[name]
    status = run(
        *("--model", model_folder, "--data-dir", data, "--split", "test"),
        *("--output-dir", tmp_path / "out", "--export-logits"),
    )
    assert status == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["n_trials"] == 6
    assert "rates" not in summary
    with (tmp_path / "out" / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with h5py.File(tmp_path / "out" / "phoneme_logits.hdf5") as file:
        logits = file[f"{SESSIONS[0]}/trial_0000"]
        assert logits.dtype == np.float32
        assert logits.shape[1] == 41
        np.testing.assert_allclose(np.exp(logits[:]).sum(1), 1, atol=1e-4)
        # the server's order: blank, silence, AA, ...
        symbols = ["", "|", *(p.strip() for p in PHONEMES[1:40])]
        best = logits[:].argmax(1)
    merged = [symbols[b] for i, b in enumerate(best) if b and (i == 0 or b != best[i - 1])]
    assert merged == rows[0]["hypothesis"].split()


def test_sessions_switched_off_in_training_are_left_out_by_name(
    model_folder, tiny_dataset, tmp_path
):
    config = open_model(model_folder).config
    config.dataset.dataset_probability_val = [0.0, 1.0, 1.0]
    manifest = load_or_build_manifest(open_store(tiny_dataset.folder), print)
    chosen, remarks = select_for_evaluation(manifest, config, SESSIONS, "val")
    assert [len(trials) for trials in chosen] == [0, 3, 3]
    assert remarks == (f"Left out: {SESSIONS[0]}, 0 in dataset.dataset_probability_val",)


def test_bad_and_short_trials_are_left_out_by_name(model_folder, tmp_path):
    write_dataset(tmp_path, SESSIONS[:1], {"train": 1, "val": 6})
    path = tmp_path / SESSIONS[0] / "data_val.hdf5"
    with h5py.File(path, "r+") as file:
        trial = file["trial_0003"]
        del trial["input_features"]
        trial["input_features"] = np.zeros((5, 32), np.float32)  # a patch has 6 bins
        trial.attrs["n_time_steps"] = 5
    config = open_model(model_folder).config
    config.dataset.bad_trials_dict = {SESSIONS[0]: {1: [1, 2], 2: [4]}, SESSIONS[1]: {1: [0]}}
    manifest = load_or_build_manifest(open_store(tmp_path), print)
    chosen, remarks = select_for_evaluation(manifest, config, SESSIONS, "val")
    names = [manifest.trials[i].name for i in chosen[0]]
    key = f"{SESSIONS[0]}/data_val.hdf5"
    assert names == [f"{key}:trial_0000", f"{key}:trial_0005"]
    assert remarks == (
        *(f"Left out: {key}:trial_000{n}, listed in dataset.bad_trials_dict" for n in (1, 2)),
        f"Left out: {key}:trial_0003, shorter than one patch of 6 bins",
        f"Left out: {key}:trial_0004, listed in dataset.bad_trials_dict",
    )


def test_what_was_left_out_is_said_and_in_the_summary_and_the_report(
    tiny_dataset, tmp_path, capsys
):
    write_model(tmp_path / "model", SESSIONS[:2])
    out = tmp_path / "out"
    run("--model", tmp_path / "model", "--data-dir", tiny_dataset.folder, "--output-dir", out)
    (remark,) = json.loads((out / "summary.json").read_text())["remarks"]
    assert remark.startswith("Left out: 3 trials of 1 sessions that the model has no day layer for")
    assert remark in capsys.readouterr().out
    assert remark in (out / "report.html").read_text()


def test_diphones_are_read_in_the_form_that_the_model_was_trained_on(
    model_folder, tiny_dataset, tmp_path, capsys
):
    shutil.copytree(model_folder, tmp_path / "model")
    path = tmp_path / "model" / "checkpoint" / "best_checkpoint"
    torch.save({**torch.load(path), "label_form": "transition"}, path)
    store = open_store(tiny_dataset.folder)
    stream = TrialStream(store, load_or_build_manifest(store, print))
    device = torch.device("cpu")
    evaluation = run_model(open_model(tmp_path / "model"), stream, "val", device)
    same = run_model(open_model(model_folder), stream, "val", device)
    stream.close()
    assert list(evaluation.summary["rates"]) == ["PER", "PER (diphone path)"], "and no DER"
    for trial, other in zip(evaluation.trials, same.trials, strict=True):
        assert trial.class_hypothesis == other.class_hypothesis
        assert trial.path == collapse_to_phonemes(trial.class_hypothesis, "transition")
        assert other.path == collapse_to_phonemes(other.class_hypothesis, "self_loop")
    (remark,) = evaluation.remarks
    assert "trained on transition labels and the data has self_loop labels" in remark
    arguments = ("--model", tmp_path / "model", "--data-dir", tiny_dataset.folder)
    assert run(*arguments, "--output-dir", tmp_path / "out") == 0
    assert remark in capsys.readouterr().out


def test_mistakes_are_one_sentence(model_folder, tiny_dataset, tmp_path, capsys):
    assert run("--model", model_folder) == 1
    assert "give --s3-bucket" in capsys.readouterr().err
    assert run("--model", tmp_path, "--data-dir", tiny_dataset.folder) == 1
    assert "best_checkpoint" in capsys.readouterr().err
    status = run("--model", model_folder, "--data-dir", tiny_dataset.folder, "--split", "test")
    assert status == 1
    assert "no test trials" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--batch-size", "0"], "--batch-size is 0: give at least 1"),
        (["--batch-size", "-3"], "--batch-size is -3: give at least 1"),
        (["--device", "banana"], "--device banana is no device: give cpu, or cuda:0"),
        (["--device", "meta"], "--device meta is no device"),
        (["--device", "cuda:99"], "--device cuda:99 is not there: torch"),
        (["--beam-size", "0", "--language-model", "none"], "--beam-size is 0: give at least 1"),
        (["--lm-weight", "nan", "--language-model", "none"], "--lm-weight is nan: give a finite"),
    ],
)
def test_bad_options_are_one_sentence_before_anything_is_read(
    arguments, sentence, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("brain_to_text.scoring.evaluate.open_model", _not_reached)
    where = ("--data-dir", tmp_path / "data", "--output-dir", tmp_path / "out")
    assert run("--model", tmp_path / "model", *where, *arguments) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"ERROR: {sentence}")
    assert "\n" not in error


def test_a_missing_package_for_words_shows_before_anything_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("brain_to_text.scoring.evaluate.open_model", _not_reached)
    monkeypatch.setitem(sys.modules, "kenlm", None)
    where = ("--data-dir", tmp_path / "data", "--output-dir", tmp_path / "out")
    assert run("--model", tmp_path / "model", *where, "--language-model", "training") == 1
    assert "pip install -r docker/requirements_sagemaker_words.txt" in capsys.readouterr().err


def _not_reached(*_: object, **__: object) -> None:
    raise AssertionError("this came too late to be a cheap check")


def test_bad_trials_that_are_no_trials_are_one_sentence(
    model_folder, tiny_dataset, tmp_path, capsys
):
    shutil.copytree(model_folder, tmp_path / "model")
    path = tmp_path / "model" / "checkpoint" / "args.yaml"
    args = yaml.safe_load(path.read_text())
    args["dataset"]["bad_trials_dict"] = {SESSIONS[0]: [3]}
    path.write_text(yaml.safe_dump(args))
    out = tmp_path / "out"
    arguments = ("--model", tmp_path / "model", "--data-dir", tiny_dataset.folder)
    assert run(*arguments, "--output-dir", out) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "to block numbers to lists of trial numbers" in error
    assert not out.exists(), "nothing is made before the inputs are checked"


def test_the_real_time_decoder_is_exported_without_data(model_folder, tmp_path, monkeypatch):
    monkeypatch.delenv("S3_BUCKET", raising=False)
    target = tmp_path / "decoder.pt"
    assert run("--model", model_folder, "--export-streaming", target) == 0
    assert target.stat().st_size > 1000


def test_a_finished_run_leaves_its_report(model_folder, tiny_dataset, tmp_path):
    store = open_store(tiny_dataset.folder)
    stream = TrialStream(store, load_or_build_manifest(store, print))
    evaluation = write_run_report(model_folder, tmp_path / "out", stream, torch.device("cpu"))
    stream.close()
    text = (tmp_path / "out" / "report.html").read_text()
    assert "Error rates on validation" in text
    assert "Phoneme confusions" in text
    parameters = sum(w.numel() for w in evaluation.artefact.weights.values())
    for section, shown in (
        ("data", evaluation.manifest.fingerprint()),
        ("data", "24 train, 9 val"),
        ("environment", torch.__version__),
        ("environment", np.__version__),
        ("environment", f"{parameters:,}"),
        ("configuration", "n_units: 16"),
        ("configuration", "patch_stride: 2"),
        ("examples", "Posteriors of the most probable diphones"),
    ):
        assert shown in text.split(f'<section id="{section}">')[1].split("</section>")[0]
    drawn = text.split('<section id="examples">')[1].split("</section>")[0]
    assert drawn.count('class="alignment"') == 4
