"""Models are read wherever they lie, and refused with one sentence when they are not models."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from brain_to_text.errors import BrainToTextError, CheckpointError
from brain_to_text.model.trained_model import initial_weights, open_model
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
    upload(tmp_path / "model", f"s3://{s3_bucket}/uncompressed/output/model")
    root = f"s3://{s3_bucket}"
    for location in (
        tmp_path / "model",
        tmp_path / "model" / "checkpoint" / "best_checkpoint",
        packed,
        job,
        f"{root}/sagemaker-outputs/job-1/output/model.tar.gz",
        f"{root}/sagemaker-outputs/job-1",
        f"{root}/unpacked",
        f"{root}/uncompressed",
    ):
        artefact = open_model(location)
        assert artefact.sessions == SESSIONS
        assert artefact.step == 7
        rebuilt = artefact.build().state_dict()
        assert all(torch.equal(rebuilt[k], v) for k, v in model.state_dict().items())
        assert [row["step"] for row in artefact.metrics["train"]] == [0, 200]


def test_what_is_not_a_model_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint/best_checkpoint"):
        open_model(tmp_path / "empty")
    with pytest.raises(BrainToTextError, match="does not exist"):
        open_model(tmp_path / "absent")
    broken = tmp_path / "model.tar.gz"
    broken.write_bytes(b"not an archive")
    with pytest.raises(BrainToTextError, match=r"model\.tar\.gz is damaged"):
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


def public_layout(folder: Path, *, wrapped: bool = True) -> dict[str, torch.Tensor]:
    """As the public baseline leaves a model: its sessions are in args.yaml only."""
    model = write_model(folder, SESSIONS)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    prefix = "module._orig_mod." if wrapped else ""
    torch.save(
        {"model_state_dict": {prefix + k: v for k, v in weights.items()}, "val_PER": 0.1},
        folder / "checkpoint" / "best_checkpoint",
    )
    return weights


def test_initial_weights_know_their_sessions_wherever_the_checkpoint_lies(
    tmp_path, s3_bucket, upload
):
    expected = public_layout(tmp_path / "model")
    packed = archive(tmp_path / "model", tmp_path / "job" / "output" / "model.tar.gz")
    upload(tmp_path / "model", f"s3://{s3_bucket}/model")
    flat = tmp_path / "flat"
    shutil.copytree(tmp_path / "model" / "checkpoint", flat)
    for location in (
        tmp_path / "model",
        tmp_path / "model" / "checkpoint" / "best_checkpoint",
        flat / "best_checkpoint",
        packed,
        f"s3://{s3_bucket}/model",
        f"s3://{s3_bucket}/model/checkpoint/best_checkpoint",
    ):
        weights, sessions = initial_weights(location)
        assert sessions == SESSIONS, location
        assert weights.keys() == expected.keys(), "wrappers' prefixes are gone"
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_checkpoints_own_sessions_come_before_those_of_args(tmp_path):
    write_model(tmp_path / "model", SESSIONS)
    args = tmp_path / "model" / "checkpoint" / "args.yaml"
    args.write_text(yaml.safe_dump({"dataset": {"sessions": list(SESSIONS[::-1])}}))
    assert initial_weights(tmp_path / "model")[1] == SESSIONS


def test_weights_alone_have_no_sessions(tmp_path):
    model = write_model(tmp_path / "model", SESSIONS)
    alone = tmp_path / "weights.pt"
    torch.save(model.state_dict(), alone)
    weights, sessions = initial_weights(alone)
    assert sessions is None
    assert torch.equal(weights["day_weights.1"], model.state_dict()["day_weights.1"])


def test_sessions_that_do_not_fit_the_day_layers_are_refused(tmp_path):
    public_layout(tmp_path / "model")
    args = tmp_path / "model" / "checkpoint" / "args.yaml"
    args.write_text(yaml.safe_dump({"dataset": {"sessions": [*SESSIONS, "t15.2023.08.18"]}}))
    with pytest.raises(CheckpointError, match="day layers for 2 sessions but names 3"):
        initial_weights(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("args.yaml", b"model: [1, 2\n", "args.yaml of .* is not valid YAML"),
        ("args.yaml", b"\x80\x04\xff\x00", "args.yaml of .* is not valid YAML"),
        ("args.yaml", b"- a\n- b\n", "must hold keys and values, not"),
        ("best_checkpoint", torch.zeros(3), "holds a Tensor"),
        ("best_checkpoint", {"model_state_dict": torch.zeros(3)}, "no model_state_dict"),
        ("best_checkpoint", {}, "no model_state_dict"),
        *(
            ("best_checkpoint", {"model_state_dict": weights}, reason)
            for weights, reason in (
                ({"h0": 3}, "'h0' as int"),
                ({0: torch.zeros(3)}, "holds 0 as Tensor"),
                ({"h0": torch.ones(3).int()}, "'h0' as torch.int"),
                ({"h0": torch.eye(3).to_sparse()}, "torch.sparse_coo"),
                ({"h0": torch.zeros(3, device="meta")}, "on meta"),
                ({"h0": torch.tensor([1, float("nan")])}, "in 'h0' that are no finite numbers"),
            )
        ),
    ],
)
def test_a_damaged_file_of_a_model_is_one_sentence(name, content, reason, tmp_path):
    public_layout(tmp_path / "model")
    path = tmp_path / "model" / "checkpoint" / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(BrainToTextError, match=reason) as caught:
        open_model(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_the_label_form_is_read_where_training_kept_it(tmp_path):
    write_model(tmp_path / "model", SESSIONS)
    assert open_model(tmp_path / "model").label_form is None
    path = tmp_path / "model" / "checkpoint" / "best_checkpoint"
    torch.save({**torch.load(path), "label_form": "transition"}, path)
    assert open_model(tmp_path / "model").label_form == "transition"


@pytest.mark.parametrize("listed", [5, "t15.2023.08.11", [["a"], "b"], ["a", "a"], {"a": 1}])
def test_sessions_that_are_no_names_are_one_sentence(listed, tmp_path):
    write_model(tmp_path / "model", SESSIONS)
    path = tmp_path / "model" / "checkpoint" / "best_checkpoint"
    torch.save({**torch.load(path), "sessions": listed}, path)
    with pytest.raises(CheckpointError, match="must be a list of different names") as caught:
        initial_weights(tmp_path / "model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("n_units", 10**4), ("patch_size", 10**5)])
def test_a_model_far_larger_than_its_weights_takes_no_memory(key, value, tmp_path):
    write_model(tmp_path / "model", SESSIONS)
    path = tmp_path / "model" / "checkpoint" / "args.yaml"
    args = yaml.safe_load(path.read_text())
    args["model"][key] = value
    path.write_text(yaml.safe_dump(args))
    with pytest.raises(CheckpointError, match="made by another architecture"):
        open_model(tmp_path / "model").build()


def test_widths_that_args_leave_to_the_data_are_those_of_the_weights(tmp_path):
    model = write_model(tmp_path / "model", SESSIONS)
    path = tmp_path / "model" / "checkpoint" / "args.yaml"
    args = yaml.safe_load(path.read_text())
    args["model"] |= {"n_input_features": None, "input_network": {"input_layer_sizes": None}}
    args["dataset"]["neural_dim"] = None
    path.write_text(yaml.safe_dump(args))
    assert open_model(tmp_path / "model").build().neural_dim == model.neural_dim


def test_a_model_with_a_setting_of_the_public_trainer_opens(tmp_path):
    model = write_model(tmp_path / "model", SESSIONS)
    path = tmp_path / "model" / "checkpoint" / "args.yaml"
    args = yaml.safe_load(path.read_text())
    args["dataset"] |= {"n_classes": model.n_classes, "loader_shuffle": False}
    path.write_text(yaml.safe_dump(args))
    assert open_model(tmp_path / "model").build().n_classes == model.n_classes
