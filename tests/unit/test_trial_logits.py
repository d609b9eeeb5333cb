"""Logits for listening only: those of the model, a trial at a time on a CPU."""

from __future__ import annotations

import pytest
import torch
from brain_to_text.model.augmentations import Augmentation
from brain_to_text.model.rnn_model import GRUDecoder
from brain_to_text.model.trial_logits import TrialLogits
from support.training_examples import example_batch, small_config


def decoder(**changes):
    config = small_config(model__patch_size=14, model__patch_stride=4, **changes)
    torch.manual_seed(0)
    model = GRUDecoder.from_config(config, n_days=3).eval()
    with torch.no_grad():
        for weight in model.day_weights:
            weight.add_(0.1 * torch.randn_like(weight))
    return model, Augmentation(config.dataset.data_transforms)


# 13 bins are too short for a frame
LENGTHS = [30, 14, 171, 13, 1033, 90, 17]
DAYS = [0, 1, 1, 0, 2, 2, 1]


@pytest.mark.parametrize(
    "changes",
    [{}, {"model__bidirectional": True}, {"model__n_layers": 1}, {"dataset__n_classes": 41}],
    ids=["plain", "bidirectional", "one layer", "phonemes"],
)
def test_logits_are_the_models(changes):
    model, smooth = decoder(**changes)
    logits_of = TrialLogits(model, smooth)
    for lengths, days in ((LENGTHS, DAYS), (LENGTHS[:2], DAYS[:2])):
        batch = example_batch(lengths, days)
        with torch.no_grad():
            features, n = smooth(batch.features, batch.n_time_steps, training=False)
            expected = model(features, batch.day_indices, n_time_steps=n)
        frames = model.frame_lengths(n)
        seen = []
        for rows, logits in logits_of(batch):
            seen += range(*rows.indices(len(lengths)))
            for row, own in zip(range(len(lengths))[rows], logits, strict=True):
                count = int(frames[row])
                assert len(own) >= max(count, 1)
                assert torch.allclose(own[:count], expected[row, :count], atol=2e-6)
        assert seen == list(range(len(lengths)))


def test_a_trial_is_decoded_alike_in_any_company():
    model, smooth = decoder()
    together = [x for _, x in TrialLogits(model, smooth)(example_batch(LENGTHS, DAYS))]
    batch = example_batch(LENGTHS, DAYS).take([2])
    ((_, alone),) = TrialLogits(model, smooth)(batch)
    assert torch.allclose(alone[0], together[2][0], atol=2e-6)


def test_autocast_is_obeyed():
    model, smooth = decoder()
    logits_of = TrialLogits(model, smooth, lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert all(x.dtype == torch.bfloat16 for _, x in logits_of(example_batch([60, 40], [0, 1])))
