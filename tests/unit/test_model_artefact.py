"""Models are read wherever they lie, and refused with one sentence when they are not models."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from brain_to_text.errors import BrainToTextError, CheckpointError
from brain_to_text.model_artefact import metrics_of_log, open_model
from support.tiny_models import write_model

SESSIONS = ("t15.2023.08.11", "t15.2023.08.13")


def archive(folder: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target, "w:gz") as file:
        file.add(folder, arcname=".")
    return target


def test_folder_archive_and_s3_give_the_same_model(tmp_path, s3_bucket, upload):
    model = write_model(tmp_path / "model", SESSIONS)
    job = tmp_path / "job"
    packed = archive(tmp_path / "model", job / "output" / "model.tar.gz")
    upload(job, f"s3://{s3_bucket}/sagemaker-outputs/job-1")
    upload(tmp_path / "model", f"s3://{s3_bucket}/unpacked")
    root = f"s3://{s3_bucket}"
    for location in (
        tmp_path / "model",
        tmp_path / "model" / "checkpoint" / "best_checkpoint",
        packed,
        job,
        f"{root}/sagemaker-outputs/job-1/output/model.tar.gz",
        f"{root}/sagemaker-outputs/job-1",
        f"{root}/unpacked",
    ):
        artefact = open_model(location)
        assert artefact.sessions == SESSIONS
        assert artefact.step == 7
        rebuilt = artefact.build().state_dict()
        assert all(torch.equal(rebuilt[k], v) for k, v in model.state_dict().items())
        assert [row["step"] for row in artefact.metrics["train"]] == [0, 200]


def test_log_lines_become_curves():
    rows = metrics_of_log(
        "x: Train batch 200: loss: 5.21 grad norm: 8.43 time: 0.538 lr: 8.00e-04 data wait: 0.3%\n"
        "x: Val batch 2000: PER (avg): 0.2251 CTC Loss (avg): 21.3 time: 9.1\n"
        "x:   t15.2023.08.11 DER: 0.5 PER: 0.4\n"
    )
    assert rows["train"] == [
        {
            "step": 200,
            "loss": 5.21,
            "grad_norm": 8.43,
            "seconds_per_step": 0.538,
            "learning_rate": 8e-4,
            "data_wait_share": pytest.approx(0.003),
        }
    ]
    assert rows["validation"] == [{"step": 2000, "per": 0.2251, "ctc_loss": 21.3}]


def test_what_is_not_a_model_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint/best_checkpoint"):
        open_model(tmp_path / "empty")
    with pytest.raises(BrainToTextError, match="does not exist"):
        open_model(tmp_path / "absent")
    broken = tmp_path / "model.tar.gz"
    broken.write_bytes(b"not an archive")
    with pytest.raises(CheckpointError, match=r"model\.tar\.gz cannot be read"):
        open_model(broken)
    write_model(tmp_path / "model", SESSIONS)
    (tmp_path / "model" / "checkpoint" / "args.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"args\.yaml"):
        open_model(tmp_path / "model")


def test_weights_of_another_architecture_are_refused(tmp_path):
    write_model(tmp_path / "a", SESSIONS)
    write_model(tmp_path / "b", SESSIONS, n_units=24)
    shutil.copy(
        tmp_path / "a" / "checkpoint" / "best_checkpoint",
        tmp_path / "b" / "checkpoint" / "best_checkpoint",
    )
    with pytest.raises(CheckpointError):
        open_model(tmp_path / "b").build()
