"""Small models with random weights, laid out as a training run leaves them."""

from __future__ import annotations

from pathlib import Path

import torch
from brain_to_text.config import TrainingConfig
from brain_to_text.config_reader import config_from_dict
from brain_to_text.model.rnn_model import GRUDecoder


def tiny_config(
    sessions: tuple[str, ...], n_features: int = 32, n_classes: int = 1681, **model: object
) -> TrainingConfig:
    return config_from_dict(
        {
            "model": {
                "n_input_features": n_features,
                "n_units": 16,
                "n_layers": 2,
                "patch_size": 6,
                "patch_stride": 2,
                "input_network": {"input_layer_sizes": [n_features]},
                **model,
            },
            "dataset": {
                "neural_dim": n_features,
                "n_classes": n_classes,
                "sessions": list(sessions),
                "days_per_batch": 1,
            },
        }
    )


def write_model(
    folder: Path,
    sessions: tuple[str, ...],
    *,
    n_features: int = 32,
    n_classes: int = 1681,
    seed: int = 0,
    **model: object,
) -> GRUDecoder:
    """checkpoint/best_checkpoint, checkpoint/args.yaml and a training_log under `folder`.

    The weights are random but large, so that decoded sequences are long and varied.
    """
    torch.manual_seed(seed)
    config = tiny_config(sessions, n_features, n_classes, **model)
    decoder = GRUDecoder(config, n_days=len(sessions))
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            if name.startswith("day_"):
                weight.add_(0.1 * torch.randn_like(weight))
        decoder.out.weight.mul_(60)
    (folder / "checkpoint").mkdir(parents=True)
    torch.save(
        {
            "model_state_dict": decoder.state_dict(),
            "step": 7,
            "sessions": list(sessions),
            "val_DER": 1.0,
            "val_PER": 1.0,
            "val_loss": 7.4,
        },
        folder / "checkpoint" / "best_checkpoint",
    )
    (folder / "checkpoint" / "args.yaml").write_text(config.to_yaml(), encoding="utf-8")
    (folder / "training_log").write_text(
        "2025-01-15 10:30:00: Train batch 0: loss: 7.43 grad norm: 9.87 time: 0.542\n"
        "2025-01-15 10:30:09: Train batch 200: loss: 5.21 grad norm: 8.43 time: 0.538 "
        "phoneme: 2.20 phoneme weight: 0.10 lr: 8.00e-04 trials/s: 89.2 "
        "frames/s: 18732 data wait: 0.3%\n"
        "2025-01-15 10:31:00: Val batch 200: DER (avg): 0.7654 CTC Loss (avg): 4.32 "
        "time: 12.345 PER (avg): 0.5000 PER (diphone path): 0.6000\n",
        encoding="utf-8",
    )
    return decoder.eval()
