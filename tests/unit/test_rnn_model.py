"""The decoder's shapes, names and invariances."""

from __future__ import annotations

import pytest
import torch
from brain_to_text.errors import CheckpointError
from brain_to_text.model.rnn_model import GRUDecoder, Packing, load_public_state_dict
from support.training_examples import CPU, build, example_batch, rows_of, small_config


def fresh(n_days: int = 3, n_classes: int = 41, **model) -> GRUDecoder:
    settings = {"n_units": 10, "n_layers": 3, "patch_size": 5, "patch_stride": 2} | model
    changes = {f"model__{name}": value for name, value in settings.items()}
    return GRUDecoder(small_config(dataset__n_classes=n_classes, **changes), n_days)


def decoder(bidirectional: bool = False, **changes) -> GRUDecoder:
    torch.manual_seed(1)
    model = fresh(bidirectional=bidirectional, **changes).eval()
    for weight in model.day_weights:
        torch.nn.init.normal_(weight, std=0.4)
    return model


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_trial_alone_and_padded_in_a_batch_has_equal_logits(bidirectional: bool) -> None:
    step = build(small_config(model__bidirectional=bidirectional))
    model = step.model.eval()
    batch = example_batch([37, 24, 50, 11], [2, 0, 2, 1])
    features, n = step.augmentation(batch.features, batch.n_time_steps)
    together = model(features, batch.day_indices, n_time_steps=n)
    for trial in range(4):
        alone = rows_of(batch, [trial])
        features, n = step.augmentation(alone.features, alone.n_time_steps)
        logits = model(features, alone.day_indices)[0]
        frames = len(logits)
        assert frames == int(model.frame_lengths(n)[0])
        torch.testing.assert_close(together[trial, :frames], logits, rtol=0, atol=1e-6)


def test_frame_lengths() -> None:
    model = decoder(patch_size=14, patch_stride=4)
    bins = torch.tensor([3, 14, 17, 18, 850])
    assert model.frame_lengths(bins).tolist() == [0, 1, 1, 2, 210]
    assert model(torch.zeros(1, 18, 6), torch.tensor([0])).shape == (1, 2, 41)


def test_the_public_call_works_by_position_and_states_continue_a_trial() -> None:
    model = decoder()
    x, day = torch.randn(2, 45, 6), torch.tensor([1, 0])
    whole, last = model(x, day, None, True)
    assert whole.shape == (2, 21, 41) and last.shape == (3, 2, 10)
    first, states = model(x[:, :25], day, None, True)  # frames 0 … 10 start at bins 0 … 20
    second, end = model(x[:, 22:], day, states, True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(end, last, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(x, day), whole)


def test_states_belong_to_their_trials_whatever_the_lengths() -> None:
    model = decoder()
    x, day, n = torch.randn(3, 30, 6), torch.tensor([0, 0, 1]), torch.tensor([12, 30, 21])
    states = torch.randn(3, 3, 10)
    together, last = model(x, day, states, True, n_time_steps=n)
    for trial in range(3):
        alone, end = model(
            x[trial : trial + 1, : n[trial]],
            day[trial : trial + 1],
            states[:, trial : trial + 1],
            True,
        )
        torch.testing.assert_close(together[trial, : alone.shape[1]], alone[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(last[:, trial], end[:, 0], rtol=0, atol=1e-6)


# --- patches --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "stride"), [(14, 4), (5, 2), (4, 4), (3, 5), (1, 1)])
def test_patches_are_windows_and_their_gradient_is_the_windows_own(size: int, stride: int) -> None:
    model = decoder(patch_size=size, patch_stride=stride)
    x = torch.randn(3, 37, 6, dtype=torch.float64).requires_grad_()
    lengths = model.frame_lengths(torch.tensor([37, 20, 29]))
    packing = Packing.of(lengths, int(lengths.max()), CPU)
    patches = model._patches(x, packing)
    expected = torch.stack(
        [x[b, t * stride : t * stride + size].flatten() for b, t in packed_order(lengths)]
    )
    assert torch.equal(patches, expected)
    weights = torch.randn_like(patches)
    (found,) = torch.autograd.grad((patches * weights).sum(), x)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)


def packed_order(lengths: torch.Tensor) -> list[tuple[int, int]]:
    """(trial, frame) by time, then by trial, longest trial first."""
    longest_first = sorted(range(len(lengths)), key=lambda b: -int(lengths[b]))
    times = range(int(lengths.max()))
    return [(b, t) for t in times for b in longest_first if t < lengths[b]]


def test_a_batch_of_trials_too_short_for_a_frame_is_computed_all_the_same() -> None:
    model = decoder()
    logits = model(torch.randn(2, 3, 6), torch.tensor([0, 1]), n_time_steps=torch.tensor([3, 2]))
    assert logits.shape == (2, 1, 41) and logits.isfinite().all()
    assert model.frame_lengths(torch.tensor([3, 2])).tolist() == [0, 0]


# --- names, shapes and loading, both ways ---------------------------------------------------------


def public_names(n_days: int = 3, n_layers: int = 3) -> dict[str, tuple[int, ...]]:
    """The public baseline's parameters for 6 features, 10 units, patches of 5, 41 classes."""
    names: dict[str, tuple[int, ...]] = {
        "h0": (1, 1, 10),
        "out.weight": (41, 10),
        "out.bias": (41,),
    }
    for day in range(n_days):
        names |= {f"day_weights.{day}": (6, 6), f"day_biases.{day}": (1, 6)}
    for layer in range(n_layers):
        names |= {
            f"gru.weight_ih_l{layer}": (30, 10 if layer else 30),
            f"gru.weight_hh_l{layer}": (30, 10),
            f"gru.bias_ih_l{layer}": (30,),
            f"gru.bias_hh_l{layer}": (30,),
        }
    return names


def test_names_and_shapes_are_the_public_baselines() -> None:
    own = {name: tuple(value.shape) for name, value in decoder().state_dict().items()}
    assert own == public_names()


def test_initialisation_is_the_recipes() -> None:
    model = fresh(2)
    assert all(torch.equal(w, torch.eye(6)) for w in model.day_weights)
    assert all(not b.any() for b in model.day_biases)
    for block in model.gru.weight_hh_l1.detach().split(30):
        torch.testing.assert_close(block.T @ block, torch.eye(10), rtol=0, atol=1e-5)
    bound = (6 / (30 + 30)) ** 0.5
    assert 0.8 * bound < float(model.gru.weight_ih_l0.detach().abs().max()) <= bound
    assert model.h0.abs().max() > 0


def test_public_weights_load_whatever_wrapped_them() -> None:
    source, target = decoder(), fresh()
    given = {f"module._orig_mod.{name}": value for name, value in source.state_dict().items()}
    assert load_public_state_dict(target, given) == []
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])


@pytest.mark.parametrize(("theirs", "ours"), [(2, 3), (4, 3)])
def test_other_numbers_of_sessions_load_in_order_and_are_reported(theirs: int, ours: int) -> None:
    source, target = decoder(n_days=theirs), fresh(ours)
    (said,) = load_public_state_dict(target, source.state_dict())
    assert f"{theirs} sessions" in said
    assert torch.equal(target.day_weights[1], source.day_weights[1])
    if ours > theirs:
        assert torch.equal(target.day_weights[2], torch.eye(6))


@pytest.mark.parametrize("changes", [{"n_layers": 2}, {"n_units": 8}, {"bidirectional": True}])
def test_another_architecture_is_refused_by_name(changes: dict) -> None:
    with pytest.raises(CheckpointError, match=r"another architecture: gru\.\w+ is .* there and"):
        load_public_state_dict(decoder(**changes), decoder().state_dict())
