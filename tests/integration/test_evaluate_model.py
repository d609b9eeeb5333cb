"""The evaluation command on artefacts as SageMaker leaves them."""

from __future__ import annotations

import csv
import json

import evaluate_model
import h5py
import jiwer
import numpy as np
import pytest
import torch
from brain_to_text.augmentations import Augmentation
from brain_to_text.dataset_s3 import EvaluationDatasetS3
from brain_to_text.evaluation import evaluate
from brain_to_text.model_artefact import open_model
from brain_to_text.model_evaluation import choose_trials, write_run_report
from brain_to_text.object_store import open_store
from brain_to_text.phonemes import PHONEMES
from brain_to_text.trial_manifest import load_or_build_manifest
from brain_to_text.trial_stream import TrialStream
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
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    assert [json.loads(line)["errors"] for line in lines] == [int(r["errors"]) for r in rows]

    artefact = open_model(model_folder)
    store = open_store(data)
    manifest = load_or_build_manifest(store, print)
    stream = TrialStream(store, manifest)
    chosen = choose_trials(manifest, SESSIONS, "val", artefact.config).by_session
    dataset = EvaluationDatasetS3(stream, chosen, batch_size=2, device=torch.device("cpu"))
    transforms = artefact.config.dataset.data_transforms
    result = evaluate(artefact.build(), Augmentation(transforms), dataset, SESSIONS)
    dataset.close()
    assert result is not None
    assert summary["rates"]["DER"]["value"] == result.der
    assert summary["rates"]["PER"]["value"] == result.per
    assert summary["rates"]["PER (diphone path)"]["value"] == result.per_path
    assert summary["ctc_nats_per_frame"] == pytest.approx(result.ctc_loss, rel=1e-5)
    for session, rates in result.per_session.items():
        assert summary["groups"]["session"][session]["value"] == rates["PER"]


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
    for name in ("trials.csv", "sessions.csv"):
        assert (local / name).read_text() == (remote / name).read_text()


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
    rows = [json.loads(x) for x in (tmp_path / "out" / "trials.jsonl").read_text().splitlines()]
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


def test_sessions_without_a_day_layer_are_named(tiny_dataset, tmp_path, capsys):
    write_model(tmp_path / "model", SESSIONS[:2])
    run("--model", tmp_path / "model", "--data-dir", tiny_dataset.folder, "--output-dir", tmp_path)
    said = capsys.readouterr().out
    assert "Left out: 3 trials of 1 sessions that the model has no day layer for" in said


def test_sessions_switched_off_in_training_are_left_out_by_name(
    model_folder, tiny_dataset, tmp_path
):
    config = open_model(model_folder).config
    config.dataset.dataset_probability_val = [0.0, 1.0, 1.0]
    manifest = load_or_build_manifest(open_store(tiny_dataset.folder), print)
    chosen = choose_trials(manifest, SESSIONS, "val", config)
    assert [len(trials) for trials in chosen.by_session] == [0, 3, 3]
    assert chosen.remarks == (f"Left out: {SESSIONS[0]}, 0 in dataset.dataset_probability_val",)


def test_mistakes_are_one_sentence(model_folder, tiny_dataset, tmp_path, capsys):
    assert run("--model", model_folder) == 1
    assert "give --s3-bucket" in capsys.readouterr().err
    assert run("--model", tmp_path, "--data-dir", tiny_dataset.folder) == 1
    assert "best_checkpoint" in capsys.readouterr().err
    status = run("--model", model_folder, "--data-dir", tiny_dataset.folder, "--split", "test")
    assert status == 1
    assert "no test trials" in capsys.readouterr().err


def test_the_real_time_decoder_is_exported_without_data(model_folder, tmp_path, monkeypatch):
    monkeypatch.delenv("S3_BUCKET", raising=False)
    target = tmp_path / "decoder.pt"
    assert run("--model", model_folder, "--export-streaming", target) == 0
    assert target.stat().st_size > 1000


def test_a_finished_run_leaves_its_report(model_folder, tiny_dataset, tmp_path):
    store = open_store(tiny_dataset.folder)
    stream = TrialStream(store, load_or_build_manifest(store, print))
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(
        '{"kind": "train", "step": 0, "loss": 7.4}\n{"kind": "validation", "step": 0, "per": 1.0}\n'
    )
    write_run_report(
        model_folder, tmp_path / "out", stream, torch.device("cpu"), metrics_file=metrics
    )
    stream.close()
    text = (tmp_path / "out" / "report.html").read_text()
    assert "Error rates on validation" in text
    assert "Phoneme confusions" in text
