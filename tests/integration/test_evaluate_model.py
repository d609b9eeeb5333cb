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
from brain_to_text.scoring import evaluate
from brain_to_text.scoring.decoding import Inference, decode, decode_features
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


@pytest.fixture(scope="module")
def rival_folder(tmp_path_factory):
    """A phoneme model of two of the sessions, in another order."""
    folder = tmp_path_factory.mktemp("artefact") / "rival"
    write_model(folder, SESSIONS[:0:-1], n_classes=41, seed=3)
    return folder


@pytest.fixture(scope="module")
def evaluated(model_folder, tiny_dataset, tmp_path_factory):
    """The results of the model, for whoever only reads them."""
    out = tmp_path_factory.mktemp("evaluated")
    data = ("--data-dir", tiny_dataset.folder, "--output-dir", out, "--export-logits")
    assert run("--model", model_folder, *data) == 0
    return out


def run(*arguments: object) -> int:
    return evaluate_model.main([str(argument) for argument in arguments])


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def section(folder: Path, name: str) -> str:
    """One section of the report."""
    page = (folder / "report.html").read_text()
    return page.split(f'<section id="{name}">')[1].split("</section>")[0]


@pytest.fixture
def stream(tiny_dataset):
    store = open_store(tiny_dataset.folder)
    opened = TrialStream(store, load_or_build_manifest(store, print))
    yield opened
    opened.close()


def test_rates_equal_jiwer_and_the_trainers_validation(model_folder, evaluated, stream):
    summary, rows = summary_of(evaluated), rows_of(evaluated)
    assert len(rows) == 9
    expected = jiwer.wer([r["reference"] for r in rows], [r["hypothesis"] for r in rows])
    assert summary["rates"]["PER"]["value"] == expected

    artefact = open_model(model_folder)
    chosen, _ = select_for_evaluation(stream.manifest, artefact.config, SESSIONS, "val")
    dataset = EvaluationDatasetS3(stream, chosen, batch_size=2, device=torch.device("cpu"))
    transforms = artefact.config.dataset.data_transforms
    result = decode(Inference(artefact.build(), Augmentation(transforms)), dataset, loss=True)
    assert result is not None
    numbers = result.numbers
    assert summary["rates"]["DER"]["value"] == numbers["der"]
    assert summary["rates"]["PER"]["value"] == numbers["per"]
    assert summary["rates"]["PER (diphone path)"]["value"] == numbers["per_path"]
    for session, rates in numbers["per_session"].items():
        for name, key in (("DER", "DER"), ("PER", "PER"), ("PER (diphone path)", "PER_path")):
            assert summary["groups"][name]["session"][session]["value"] == rates[key]


def test_the_guides_lines_for_a_notebook_decode_a_session(
    model_folder, evaluated, tiny_dataset, tmp_path, monkeypatch
):
    guide = Path(evaluate_model.__file__).with_name("README_SAGEMAKER.md").read_text("utf-8")
    lines = guide.split("### In a notebook")[1].split("```python\n")[1].split("```")[0]
    (tmp_path / "results").symlink_to(model_folder)
    (tmp_path / "data").symlink_to(tiny_dataset.folder)
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(lines, found)
    rows = [row for row in rows_of(evaluated) if row["session"] == SESSIONS[0]]
    assert found["phonemes"] == [row["hypothesis"] for row in rows]
    model, trials = found["model"], found["trials"]
    with pytest.raises(DataError, match="no day layer for monday: give one of its 3 sessions"):
        decode_features(model, trials, "monday")
    for wrong in (trials[0][:, 1:], trials[0][:5], trials[0][None]):
        with pytest.raises(DataError, match=r"Trial 0 has the shape .* at least 6 bins and 32 f"):
            decode_features(model, [wrong], SESSIONS[0])


def test_s3_gives_the_same_tables_as_a_folder(
    model_folder, evaluated, tiny_dataset_s3, s3_bucket, upload, tmp_path
):
    upload(model_folder, f"s3://{s3_bucket}/sagemaker-outputs/job")
    status = run(
        *("--model", f"s3://{s3_bucket}/sagemaker-outputs/job", "--s3-bucket", s3_bucket),
        *("--s3-data-prefix", "data", "--output-dir", tmp_path),
    )
    assert status == 0
    assert rows_of(tmp_path) == rows_of(evaluated)


def test_a_comparison_is_on_the_trials_of_both_models_and_names_the_others(
    model_folder, rival_folder, tiny_dataset, tmp_path, capsys
):
    status = run(
        *("--model", model_folder, "--compare-with", rival_folder),
        *("--data-dir", tiny_dataset.folder, "--output-dir", tmp_path),
    )
    assert status == 0
    comparison = summary_of(tmp_path)["comparison"]
    assert list(comparison["metrics"]) == ["PER"], "a phoneme model has no diphones"
    assert 0 < comparison["metrics"]["PER"]["p_value"] <= 1
    lost = [f"{SESSIONS[0]}/data_val.hdf5:trial_{n:04d}" for n in range(3)]
    assert comparison["n_trials"] == 6
    assert comparison["left_out"] == {"decoded by this model only": lost}
    assert (
        "Compared on the 6 trials that both models decoded; 3 left out" in capsys.readouterr().out
    )
    assert lost[2] in section(tmp_path, "comparison")


# --- ensembles ------------------------------------------------------------------------------------


def log_probs(folder, names):
    with h5py.File(folder / "phoneme_logits.hdf5") as file:
        return {name: file[name][:].astype(np.float64) for name in names}


def test_an_ensemble_decodes_the_mean_of_its_members_log_probabilities(
    model_folder, rival_folder, evaluated, tiny_dataset, tmp_path, capsys
):
    """Also when the members number their sessions differently and have other classes."""
    data = ("--data-dir", tiny_dataset.folder, "--export-logits", "--output-dir")
    assert run("--model", rival_folder, *data, tmp_path / "rival") == 0
    assert run("--model", model_folder, "--model", rival_folder, *data, tmp_path / "whole") == 0
    names = [f"{session}/trial_{n:04d}" for session in SESSIONS[1:] for n in range(3)]
    folders = (evaluated, tmp_path / "rival", tmp_path / "whole")
    a, b, whole = (log_probs(folder, names) for folder in folders)
    for name in names:
        mean = (a[name] + b[name]) / 2
        expected = mean - np.log(np.exp(mean).sum(1, keepdims=True))
        np.testing.assert_allclose(whole[name], expected, atol=1e-4)
    summary, alone = summary_of(tmp_path / "whole"), summary_of(tmp_path / "rival")
    assert list(summary["rates"]) == ["PER"], "a mean over phonemes has no diphones"
    assert summary["n_trials"] == 6, "those of all members"
    assert summary["members"][1]["rates"] == alone["rates"]
    for folder in (model_folder, rival_folder):
        assert str(folder) in section(tmp_path / "whole", "ensemble")
    said = capsys.readouterr().out
    assert f"Left out: 3 trials that {model_folder} decoded and another" in said
    assert f"{rival_folder}: Left out: 3 trials of 1 sessions" in said


# --- what is in the folder already ----------------------------------------------------------------


def test_only_unchanged_results_of_the_same_purpose_are_replaced(
    model_folder, rival_folder, evaluated, tiny_dataset, tmp_path, capsys
):
    out = tmp_path / "out"
    shutil.copytree(evaluated, out)
    data = ("--data-dir", tiny_dataset.folder, "--output-dir", out)

    def refused(sentence: str, *arguments: object) -> None:
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        assert run(*arguments, *data) == 1
        assert f"{out} holds {sentence}" in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    whose = f"trials.csv of {model_folder} on val"
    refused(whose, "--model", rival_folder)
    refused(whose, "--model", model_folder, "--split", "train")
    (out / "notes.txt").write_text("mine")
    assert run("--model", model_folder, *data) == 0, "the same again"
    assert not (out / "phoneme_logits.hdf5").exists(), "nothing of the evaluation before stays"
    for name in ("nbest.csv", "trials.csv"):  # not of that evaluation; into which a column went
        before = (out / name).read_bytes() if (out / name).exists() else b""
        (out / name).write_text("somebody's scores")
        refused(f"{name}, which that evaluation did not write", "--model", model_folder)
        (out / name).write_bytes(before)
    (out / "summary.json").unlink()
    refused("trials.csv, which no evaluation wrote", "--model", model_folder)
    (out / "phoneme_logits.hdf5").write_text("of another evaluation")
    assert run("--model", rival_folder, *data, "--overwrite") == 0
    assert not (out / "phoneme_logits.hdf5").exists()
    assert summary_of(out)["model"] == str(rival_folder)
    assert (out / "notes.txt").read_text() == "mine"


def test_nothing_that_is_read_is_written_over(model_folder, tiny_dataset, tmp_path, capsys):
    (tmp_path / "link").symlink_to(tiny_dataset.folder)
    arguments = ("--model", model_folder, "--data-dir", tiny_dataset.folder, "--overwrite")
    assert run(*arguments, "--output-dir", tmp_path / "link" / "results") == 1
    assert "lies in the dataset" in capsys.readouterr().err
    assert not (tiny_dataset.folder / "results").exists()
    (tmp_path / "nbest.csv").write_text("file,hypothesis,score\n")
    rescored = ("--rescored", tmp_path / "nbest.csv", "--output-dir", tmp_path)
    assert run(*arguments, *rescored) == 1
    assert "nbest.csv is read and would be replaced" in capsys.readouterr().err


# --- which trials ---------------------------------------------------------------------------------


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
    summary, rows = summary_of(tmp_path / "out"), rows_of(tmp_path / "out")
    assert summary["n_trials"] == 6
    assert "rates" not in summary
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


def test_what_is_left_out_is_named(model_folder, tmp_path):
    write_dataset(tmp_path, SESSIONS[:2], {"train": 1, "val": 6})
    path = tmp_path / SESSIONS[0] / "data_val.hdf5"
    with h5py.File(path, "r+") as file:
        trial = file["trial_0003"]
        del trial["input_features"]
        trial["input_features"] = np.zeros((5, 32), np.float32)  # a patch has 6 bins
        trial.attrs["n_time_steps"] = 5
    config = open_model(model_folder).config
    config.dataset.bad_trials_dict = {SESSIONS[0]: {1: [1, 2], 2: [4]}, SESSIONS[2]: {1: [0]}}
    config.dataset.dataset_probability_val = [1.0, 0.0, 1.0]
    manifest = load_or_build_manifest(open_store(tmp_path), print)
    chosen, remarks = select_for_evaluation(manifest, config, SESSIONS, "val")
    names = [manifest.trials[i].name for i in chosen[0]]
    key = f"{SESSIONS[0]}/data_val.hdf5"
    assert names == [f"{key}:trial_0000", f"{key}:trial_0005"] and not chosen[1]
    assert remarks == (
        f"Left out: {SESSIONS[1]}, 0 in dataset.dataset_probability_val",
        *(f"Left out: {key}:trial_000{n}, listed in dataset.bad_trials_dict" for n in (1, 2)),
        f"Left out: {key}:trial_0003, shorter than one patch of 6 bins",
        f"Left out: {key}:trial_0004, listed in dataset.bad_trials_dict",
    )


def test_diphones_are_read_in_the_form_that_the_model_was_trained_on(
    tiny_dataset, tmp_path, capsys
):
    write_model(tmp_path / "model", SESSIONS[:2])
    path = tmp_path / "model" / "checkpoint" / "best_checkpoint"
    torch.save({**torch.load(path), "label_form": "transition"}, path)
    data, out = str(tiny_dataset.folder), tmp_path / "out"
    evaluation = evaluate.evaluate_model([str(tmp_path / "model")], data, "val", out)
    assert list(evaluation.summary["rates"]) == ["PER", "PER (diphone path)"], "and no DER"
    for trial in evaluation.trials:
        assert trial.path == collapse_to_phonemes(trial.class_hypothesis, "transition")
    left_out, doubt = summary_of(out)["remarks"]
    assert "trained on transition labels and the data has self_loop labels" in doubt
    assert "encode SOURCE TARGET --form transition" in doubt
    assert left_out.startswith("Left out: 3 trials of 1 sessions that the model has no day layer")
    said, page = capsys.readouterr().out, (out / "report.html").read_text()
    assert doubt in said and left_out in said and left_out in page


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--batch-size", "0"], "--batch-size is 0: give at least 1"),
        (["--beam-size", "0", "--language-model", "none"], "--beam-size is 0: give at least 1"),
        (["--lm-weight", "nan", "--language-model", "none"], "--lm-weight is nan: give a finite"),
        (["--data-dir", ""], "--data-dir is empty: give a folder"),
        (["--language-model", "training"], "Decoding words needs an optional package (kenlm is"),
    ],
)
def test_bad_options_are_one_sentence_before_anything_is_read(
    arguments, sentence, tmp_path, monkeypatch, capsys
):
    def not_reached(*_: object) -> None:
        raise AssertionError("this came too late to be a cheap check")

    monkeypatch.setattr(evaluate, "open_model", not_reached)
    monkeypatch.setitem(sys.modules, "kenlm", None)
    where = ("--data-dir", tmp_path / "data", "--output-dir", tmp_path / "out")
    assert run("--model", tmp_path / "model", *where, *arguments) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"ERROR: {sentence}")
    assert "\n" not in error


def test_what_cannot_be_evaluated_is_one_sentence(model_folder, tiny_dataset, tmp_path, capsys):
    shutil.copytree(model_folder, tmp_path / "model")
    path = tmp_path / "model" / "checkpoint" / "args.yaml"
    args = yaml.safe_load(path.read_text())
    args["dataset"]["bad_trials_dict"] = {SESSIONS[0]: [3]}
    path.write_text(yaml.safe_dump(args))
    write_model(tmp_path / "faster", SESSIONS, patch_stride=3)
    write_model(tmp_path / "first", SESSIONS[:1])
    write_model(tmp_path / "second", SESSIONS[1:2])
    data, out = ("--data-dir", tiny_dataset.folder), tmp_path / "out"
    for arguments, sentence in (
        ((model_folder, "--model", tmp_path / "faster", *data), "model.patch_stride is 2 in"),
        ((tmp_path / "first", "--model", tmp_path / "second", *data), "share no trial"),
        ((model_folder,), "give --s3-bucket"),
        ((tmp_path, *data), "best_checkpoint"),
        ((model_folder, *data, "--split", "test"), "no test trials"),
        ((tmp_path / "model", *data), "to block numbers to lists of trial numbers"),
    ):
        assert run("--output-dir", out, "--model", *arguments) == 1
        assert sentence in capsys.readouterr().err.splitlines()[-1]
        assert not out.exists() or not list(out.iterdir())


# --- other results --------------------------------------------------------------------------------


def test_the_real_time_decoder_is_exported_and_nothing_else(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("S3_BUCKET", "absent")
    target = tmp_path / "decoder.pt"
    assert run("--model", model_folder, "--export-streaming", target) == 0
    assert target.stat().st_size > 1000


def test_a_finished_run_leaves_its_report(model_folder, stream, tmp_path):
    device = torch.device("cpu")
    evaluation = evaluate.write_run_report(model_folder, tmp_path, stream, device)
    assert "Error rates on validation" in section(tmp_path, "training")
    assert "Phoneme confusions" in section(tmp_path, "which-errors")
    parameters = sum(w.numel() for w in evaluation.artefact.weights.values())
    for name, shown in (
        ("data", evaluation.manifest.fingerprint()),
        ("data", "24 train, 9 val"),
        ("environment", torch.__version__),
        ("environment", np.__version__),
        ("environment", f"{parameters:,}"),
        ("configuration", "n_units: 16"),
        ("configuration", "patch_stride: 2"),
        ("examples", "Posteriors of the most probable diphones"),
    ):
        assert shown in section(tmp_path, name)
    assert section(tmp_path, "examples").count('class="alignment"') == 4
