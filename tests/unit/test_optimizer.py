"""Groups, schedules, clipping and refused updates."""

from __future__ import annotations

import pytest
import torch
from brain_to_text.model.optimizer import (
    apply_update,
    build_optimizer,
    clip_and_check,
    learning_rate_multiplier,
)
from brain_to_text.model.rnn_model import GRUDecoder
from support.training_examples import small_config


def model_and_optimizer(**changes):
    config = small_config(
        **({"weight_decay": 0.002, "lr_max": 0.004, "lr_max_day": 0.003} | changes)
    )
    torch.manual_seed(0)
    model = GRUDecoder(config, 3)
    return model, build_optimizer(model, config), config


def test_groups_are_the_recipes() -> None:
    model, optimizer, _ = model_and_optimizer()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {g["group_type"]: g for g in optimizer.param_groups}
    assert list(groups) == ["bias", "day_layer", "other"]
    members = {kind: {names[id(p)] for p in g["params"]} for kind, g in groups.items()}
    assert members["bias"] == {n for n in names.values() if "gru.bias" in n or n == "out.bias"}
    assert members["day_layer"] == {n for n in names.values() if n.startswith("day_")}
    assert "h0" in members["other"] and "out.weight" in members["other"]
    assert sum(map(len, members.values())) == len(names)
    assert [g["weight_decay"] for g in groups.values()] == [0.0, 0.0, 0.002]
    assert groups["other"]["eps"] == 0.1 and optimizer.defaults["fused"]


def test_frozen_parts_are_left_out() -> None:
    config = small_config()
    model = GRUDecoder(config, 3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("day_"))
    groups = build_optimizer(model, config).param_groups
    assert [g["group_type"] for g in groups] == ["bias", "other"]


def test_the_multiplier_warms_up_from_zero_then_decays_to_its_floor() -> None:
    def at(step: int, shape: str = "cosine") -> float:
        return learning_rate_multiplier(step, 0.02, 1000, 100, shape)

    assert [at(k) for k in (0, 50, 99)] == [0.0, 0.5, 0.99]
    assert at(100) == 1.0 and at(550) == pytest.approx(0.51)
    assert at(1000) == at(5000) == 0.02
    assert at(550, "linear") == pytest.approx(0.51) and at(325, "linear") == pytest.approx(0.755)
    steps = [at(k) for k in range(100, 1001)]
    assert steps == sorted(steps, reverse=True)


def give_gradients(model: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e6])
def test_an_update_equals_clip_then_adamw(max_norm: float) -> None:
    """The fused way (a divisor inside the optimiser) against torch's two calls."""
    (fast, optimizer, _), (slow, other, _) = model_and_optimizer(), model_and_optimizer()
    for k in range(3):
        give_gradients(fast, k)
        give_gradients(slow, k)
        norm, finite, divisor = clip_and_check(fast.parameters(), max_norm)
        apply_update(optimizer, divisor, ~finite)
        expected = torch.nn.utils.clip_grad_norm_(slow.parameters(), max_norm or float("inf"))
        other.step()
        torch.testing.assert_close(norm, expected)
    for a, b in zip(fast.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_refused_update_changes_nothing(bad: float) -> None:
    model, optimizer, _ = model_and_optimizer()
    for k, value in enumerate((0.0, bad, 0.0)):
        give_gradients(model, k)
        model.h0.grad[0, 0, 0] += value
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        state = [
            {n: v.clone() for n, v in optimizer.state[p].items()} if p in optimizer.state else {}
            for p in model.parameters()
        ]
        _, finite, divisor = clip_and_check(model.parameters(), 10.0)
        apply_update(optimizer, divisor, ~finite)
        same = all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
        assert same == (value != 0.0)
        if value != 0.0:
            for before, parameter in zip(state, model.parameters(), strict=True):
                for name, value_now in optimizer.state[parameter].items():
                    assert torch.equal(before[name], value_now), name
