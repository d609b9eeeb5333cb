"""Models move between this library and the public baseline: same names, shapes and args.yaml keys.

The baseline's side is `PlainDecoder`, plain PyTorch from its documented architecture; the public
evaluation script builds the model from args.yaml and loads the checkpoint exactly as below.
"""

from __future__ import annotations

import csv
import json

import evaluate_model
import numpy as np
import pytest
import torch
import train_model_sagemaker
import yaml
from benchmarks.plain_recipe import PlainDecoder
from brain_to_text.model.augmentations import Augmentation
from brain_to_text.model.trained_model import open_model
from support.tiny_models import write_model

SESSIONS = ("t15.2023.08.11", "t15.2023.08.13", "t15.2023.08.18")
C = 32


def baseline_from(args: dict) -> PlainDecoder:
    """As the public evaluation script builds it, key by key."""
    return PlainDecoder(
        neural_dim=args["model"]["n_input_features"],
        n_units=args["model"]["n_units"],
        n_days=len(args["dataset"]["sessions"]),
        n_classes=args["dataset"]["n_classes"],
        n_layers=args["model"]["n_layers"],
        patch_size=args["model"]["patch_size"],
        patch_stride=args["model"]["patch_stride"],
    ).eval()


@pytest.mark.parametrize("n_classes", [41, 1681])
def test_our_model_runs_in_the_baselines_evaluation(tmp_path, n_classes):
    write_model(tmp_path / "model", SESSIONS, n_classes=n_classes)
    args = yaml.safe_load((tmp_path / "model" / "checkpoint" / "args.yaml").read_text())
    saved = torch.load(tmp_path / "model" / "checkpoint" / "best_checkpoint", weights_only=False)
    theirs = baseline_from(args)
    theirs.load_state_dict(saved["model_state_dict"])  # strict: equal names and shapes
    for key in ("smooth_kernel_std", "smooth_kernel_size"):
        assert key in args["dataset"]["data_transforms"]
    assert "use_amp" in args
    assert {"rnn_dropout", "input_network"} <= args["model"].keys()
    assert "input_layer_dropout" in args["model"]["input_network"]

    x, lengths = torch.randn(2, 50, C), torch.tensor([50, 50])
    artefact = open_model(tmp_path / "model")
    x, _ = Augmentation(artefact.config.dataset.data_transforms)(x, lengths)
    days = torch.tensor([2, 0])
    with torch.no_grad():
        ours = artefact.build()
        torch.testing.assert_close(theirs(x, days), ours(x, days), rtol=1e-4, atol=1e-4)
        # by keyword, as the script calls it
        logits, _ = ours(x=x, day_idx=days, states=None, return_state=True)
    torch.testing.assert_close(logits, theirs(x, days), rtol=1e-4, atol=1e-4)


@pytest.fixture
def public_checkpoint(tmp_path):
    """A folder as the baseline leaves it: a wrapped, compiled 41-class model, its own args.yaml."""
    torch.manual_seed(1)
    args = {
        "model": {
            "n_input_features": C,
            "n_units": 12,
            "rnn_dropout": 0.4,
            "rnn_trainable": True,
            "n_layers": 2,
            "patch_size": 6,
            "patch_stride": 2,
            "input_network": {
                "n_input_layers": 1,
                "input_layer_sizes": [C],
                "input_trainable": True,
                "input_layer_dropout": 0.2,
            },
        },
        "gpu_number": "1",
        "mode": "train",
        "use_amp": True,
        "output_dir": "trained_models/baseline_rnn",
        "checkpoint_dir": "trained_models/baseline_rnn/checkpoint",
        "init_from_checkpoint": False,
        "init_checkpoint_path": "None",
        "num_training_batches": 120000,
        "lr_scheduler_type": "cosine",
        "save_val_data": False,
        "dataset": {
            "data_transforms": {"white_noise_std": 1.0, "smooth_data": True, "random_cut": 3},
            "neural_dim": C,
            "batch_size": 64,
            "n_classes": 41,
            "days_per_batch": 3,
            "loader_shuffle": False,
            "must_include_days": None,
            "test_percentage": 0.1,
            "feature_subset": None,
            "dataset_dir": "../data/hdf5_data_final",
            "bad_trials_dict": None,
            "sessions": list(SESSIONS),
            "dataset_probability_val": [0, 1, 1],
        },
    }
    model = baseline_from(args)
    with torch.no_grad():
        model.out.weight.mul_(40)
        model.h0.uniform_(-0.5, 0.5)
    folder = tmp_path / "t15_pretrained_rnn_baseline"
    (folder / "checkpoint").mkdir(parents=True)
    weights = {f"module._orig_mod.{name}": w for name, w in model.state_dict().items()}
    torch.save(
        {
            "model_state_dict": weights,
            "val_PER": np.float64(0.101),
            "val_loss": torch.tensor(1.0),
        },
        folder / "checkpoint" / "best_checkpoint",
    )
    (folder / "checkpoint" / "args.yaml").write_text(yaml.safe_dump(args))
    return folder, model


def test_the_public_checkpoint_evaluates_here(public_checkpoint, tiny_dataset, tmp_path):
    folder, theirs = public_checkpoint
    out = tmp_path / "out"
    arguments = ["--model", folder, "--data-dir", tiny_dataset.folder, "--output-dir", out]
    assert evaluate_model.main([str(a) for a in arguments]) == 0
    with (out / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6  # args.yaml switches one of the three sessions off
    assert "PER" in json.loads((out / "summary.json").read_text())["rates"]

    artefact = open_model(folder)
    features = torch.from_numpy(tiny_dataset.features[rows[4]["file"]].copy())[None].float()
    lengths = torch.tensor([features.shape[1]])
    x, _ = Augmentation(artefact.config.dataset.data_transforms)(features, lengths)
    day = SESSIONS.index(rows[4]["session"])
    with torch.no_grad():
        best = theirs(x, torch.tensor([day]))[0].argmax(-1)
    merged = best[torch.cat([torch.tensor([True]), best[1:] != best[:-1]])]
    assert len(merged[merged != 0]) == len(rows[4]["hypothesis"].split())


def test_the_public_phoneme_model_is_fine_tuned_on_diphones(
    public_checkpoint, tiny_dataset, tmp_path
):
    folder, theirs = public_checkpoint
    config = yaml.safe_load((folder / "checkpoint" / "args.yaml").read_text())
    config["dataset"] |= {"n_classes": 1681, "batch_size": 4, "dataset_probability_val": None}
    config |= {
        "init_from_checkpoint": True,
        "init_checkpoint_path": str(folder),
        "lr_warmup_steps": 1,
        "lr_warmup_steps_day": 1,
        "save_val_metrics": False,
    }
    (tmp_path / "fine_tune.yaml").write_text(yaml.safe_dump(config))
    status = train_model_sagemaker.main(
        [
            *("--config-file", str(tmp_path / "fine_tune.yaml")),
            *("--data-dir", str(tiny_dataset.folder), "--num-training-batches", "1"),
            *("--model-dir", str(tmp_path / "model")),
            *("--output-data-dir", str(tmp_path / "output")),
            *("--checkpoint-dir", str(tmp_path / "checkpoints")),
        ]
    )
    assert status == 0
    log = (tmp_path / "model" / "training_log").read_text()
    assert "The classifier has 41 classes in the checkpoint and 1681 here" in log
    # the first update has learning rate 0, so all but the new classifier is the baseline's still
    tuned = open_model(tmp_path / "model").weights
    assert len(tuned["out.bias"]) == 1681
    for name, weight in theirs.state_dict().items():
        if not name.startswith("out."):
            torch.testing.assert_close(tuned[name], weight)
