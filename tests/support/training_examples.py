"""Small models, configurations and batches for the tests of the maths."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from brain_to_text.config import TrainingConfig
from brain_to_text.labels.diphones import encode_diphones
from brain_to_text.model.rnn_model import GRUDecoder
from brain_to_text.model.train_step import TrainStep
from brain_to_text.streaming.batch import Batch

CPU = torch.device("cpu")


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    """Those trials, padded to their own longest."""
    taken = {name: value[rows] for name, value in vars(batch).items() if name != "step"}
    taken["features"] = taken["features"][:, : int(taken["n_time_steps"].max())]
    return dataclasses.replace(batch, **taken)


def of_phonemes(batch: Batch) -> Batch:
    """With the phonemes as class labels."""
    labels, lengths = batch.phoneme_labels, batch.phoneme_lengths
    return dataclasses.replace(batch, labels=labels, label_lengths=lengths)


def small_config(**changes: Any) -> TrainingConfig:
    """Two GRU layers of 12 units on 6 features, patches of 4 bins every 2, nothing random."""
    config = TrainingConfig()
    config.model.n_input_features = config.dataset.neural_dim = 6
    config.model.input_network.input_layer_sizes = [6]
    config.model.n_units, config.model.n_layers = 12, 2
    config.model.patch_size, config.model.patch_stride = 4, 2
    config.model.rnn_dropout = config.model.input_network.input_layer_dropout = 0.0
    config.dataset.n_classes = 1681
    transforms = config.dataset.data_transforms
    transforms.white_noise_std = transforms.constant_offset_std = 0.0
    transforms.random_cut = 0
    config.num_training_batches = 50
    config.lr_warmup_steps = config.lr_warmup_steps_day = 0
    for path, value in changes.items():
        target = config
        *parents, last = path.split("__")
        for parent in parents:
            target = getattr(target, parent)
        assert hasattr(target, last), path
        setattr(target, last, value)
    return config


def example_batch(
    lengths: list[int],
    days: list[int],
    n_phonemes: int = 3,
    seed: int = 0,
) -> Batch:
    """Random trials of 6 features and these lengths in bins, with self-loop diphone labels."""
    random = np.random.default_rng(seed)
    B, T = len(lengths), max(lengths)
    features = torch.zeros(B, T, 6)
    phonemes = random.integers(1, 41, (B, n_phonemes))
    for trial, length in enumerate(lengths):
        features[trial, :length] = torch.from_numpy(
            random.standard_normal((length, 6), dtype=np.float32)
        )
    diphones = np.stack([encode_diphones(row) for row in phonemes]).astype(np.int64)
    return Batch(
        step=seed,
        features=features,
        n_time_steps=torch.tensor(lengths),
        labels=torch.from_numpy(diphones),
        label_lengths=torch.full((B,), diphones.shape[1]),
        phoneme_labels=torch.from_numpy(phonemes),
        phoneme_lengths=torch.full((B,), n_phonemes),
        day_indices=torch.tensor(days),
        trial_indices=torch.arange(B),
    )


def build(
    config: TrainingConfig, n_days: int = 3, device: torch.device = CPU, **options: Any
) -> TrainStep:
    torch.manual_seed(config.seed)
    model = GRUDecoder(config, n_days, for_training=True).to(device)
    return TrainStep(model, config, device, **options)


def newest_state(checkpoints: Path) -> tuple[Path, dict[str, Any]]:
    """The resume state with most steps in a checkpoint folder, and its file."""
    found = [(p, torch.load(p, weights_only=True)) for p in checkpoints.glob("state-*.pt")]
    return max(found, key=lambda pair: pair[1]["step"])
