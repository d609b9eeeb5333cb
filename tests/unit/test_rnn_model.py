"""The decoder's shapes, names and invariances."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from brain_to_text.errors import CheckpointError
from brain_to_text.model.device import allow_tf32
from brain_to_text.model.rnn_model import (
    GRUDecoder,
    in_one_buffer,
    load_public_state_dict,
    torch_gru,
)
from support.training_examples import CPU, build, example_batch, small_config
from torch.nn.utils.rnn import PackedSequence


def decoder(bidirectional: bool = False, **changes) -> GRUDecoder:
    torch.manual_seed(1)
    options = {
        "neural_dim": 6,
        "n_units": 10,
        "n_days": 3,
        "n_classes": 41,
        "n_layers": 3,
        "patch_size": 5,
        "patch_stride": 2,
        "bidirectional": bidirectional,
    } | changes
    model = GRUDecoder(**options).eval()
    for weight in model.day_weights:
        torch.nn.init.normal_(weight, std=0.4)
    return model


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_trial_alone_and_padded_in_a_batch_has_equal_logits(bidirectional: bool) -> None:
    step = build(small_config(model__bidirectional=bidirectional))
    model = step.model.eval()
    batch = example_batch([37, 24, 50, 11], [2, 0, 2, 1])
    features, n = step.augmentation(batch.features, batch.n_time_steps, training=False)
    together = model(features, batch.day_indices, n_time_steps=n)
    for trial in range(4):
        alone = batch.take([trial])
        features, n = step.augmentation(alone.features, alone.n_time_steps, training=False)
        logits = model(features, alone.day_indices)[0]
        frames = len(logits)
        assert frames == int(model.frame_lengths(n)[0])
        torch.testing.assert_close(together[trial, :frames], logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_frames_of_one_trial_do_not_depend_on_the_others_padding(bidirectional: bool) -> None:
    model = decoder(bidirectional)
    batch = example_batch([20, 33], [0, 1])
    n = batch.n_time_steps
    clean = model(batch.features, batch.day_indices, n_time_steps=n)
    batch.features[0, 20:] = torch.randn(13, 6)
    dirty = model(batch.features, batch.day_indices, n_time_steps=n)
    frames = int(model.frame_lengths(n)[0])
    assert torch.equal(clean[0, :frames], dirty[0, :frames])


@pytest.mark.parametrize(
    ("bins", "size", "stride", "frames"),
    [
        (14, 14, 4, 1),
        (17, 14, 4, 1),
        (18, 14, 4, 2),
        (850, 14, 4, 210),
        (9, 0, 0, 9),
        (3, 14, 4, 0),
    ],
)
def test_frame_lengths(bins: int, size: int, stride: int, frames: int) -> None:
    model = decoder(patch_size=size, patch_stride=stride)
    assert model.frame_lengths(torch.tensor([bins])).tolist() == [frames]
    if frames:
        assert model(torch.zeros(1, bins, 6), torch.tensor([0])).shape == (1, frames, 41)


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


def test_only_sessions_in_the_batch_get_gradients() -> None:
    model = decoder().train()
    model(torch.randn(2, 20, 6), torch.tensor([2, 0])).sum().backward()
    assert [w.grad is None for w in model.day_weights] == [False, True, False]
    assert [b.grad is None for b in model.day_biases] == [False, True, False]


def test_a_session_scattered_over_the_batch_is_the_same_as_sorted() -> None:
    model = decoder()
    x, day = torch.randn(5, 20, 6), torch.tensor([1, 0, 1, 2, 0])
    order = torch.argsort(day)
    torch.testing.assert_close(model(x, day)[order], model(x[order], day[order]))


# --- torch's GRU, layer by layer ------------------------------------------------------------------

GPU = torch.device("cuda:0")
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
on_gpu = pytest.mark.parametrize("device", [pytest.param(GPU, marks=needs_gpu)])


def gru_case(bidirectional: bool, dropout: float = 0.0, device: torch.device = CPU, units: int = 8):
    """A GRU of three layers, packed frames of 4 trials, their number by time, initial states."""
    torch.manual_seed(0)
    gru = torch.nn.GRU(6, units, 3, dropout=dropout, batch_first=True, bidirectional=bidirectional)
    sizes = torch.tensor([4, 4, 4, 3, 3, 1])
    states = torch.randn((6 if bidirectional else 3), 4, units, device=device)
    return gru.to(device), torch.randn(int(sizes.sum()), 6, device=device), sizes, states


def outputs_and_gradients(run, gru, frames, sizes, states) -> list[torch.Tensor]:
    """Outputs, last states, and gradients of frames, states and weights."""
    frames, states = frames.clone().requires_grad_(), states.clone().requires_grad_()
    gru.zero_grad()
    torch.manual_seed(7)
    hidden, last = run(gru, frames, sizes, states)
    (hidden.float().square().sum() + last.float().sum()).backward()
    gradients = [t.grad for t in (frames, states, *gru.parameters())]
    return [hidden.detach(), last.detach(), *gradients]


def all_at_once(gru, frames, sizes, states):
    packed, last = gru(PackedSequence(frames, sizes), states)
    return packed.data, last


def by_layers(gru, frames, sizes, states):
    return torch_gru(frames, sizes, states, gru)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 1e-12, 0.4])
def test_layer_by_layer_is_torchs_gru(bidirectional: bool, dropout: float) -> None:
    """Exactly, dropout and gradients included: on a CPU torch draws it from the same generator.

    At 1e-12 every layer is a call of its own, and nothing is dropped.
    """
    case = gru_case(bidirectional, dropout)
    expected = outputs_and_gradients(all_at_once, *case)
    for a, b in zip(outputs_and_gradients(by_layers, *case), expected, strict=True):
        assert torch.equal(a, b)
    if dropout == 1e-12:
        case[0].dropout = 0.0
        assert torch.equal(outputs_and_gradients(all_at_once, *case)[0], expected[0])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_between_layers_is_the_seeds_and_only_for_training(bidirectional: bool) -> None:
    gru, *rest = gru_case(bidirectional, dropout=0.4)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(by_layers(gru, *rest)[0])
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    gru.eval()
    assert torch.equal(by_layers(gru, *rest)[0], all_at_once(gru, *rest)[0])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_copies_in_one_buffer_keep_values_shapes_and_gradients(bidirectional: bool) -> None:
    gru, *_ = gru_case(bidirectional)
    weights = [weight for layer in gru.all_weights for weight in layer]
    copies = in_one_buffer(weights)
    end = 0
    for copy in sorted(copies, key=lambda w: w.storage_offset()):
        assert copy.storage_offset() == end and copy.is_contiguous()
        end += copy.numel()
    assert copies[0].untyped_storage().nbytes() == 4 * end
    offsets = {dim: [c.storage_offset() for c in copies if c.dim() == dim] for dim in (1, 2)}
    assert max(offsets[2]) < min(offsets[1]), "matrices before biases"
    sum((k + 1) * copy.sum() for k, copy in enumerate(copies)).backward()
    for k, (weight, copy) in enumerate(zip(weights, copies, strict=True)):
        assert torch.equal(weight, copy)
        assert torch.equal(weight.grad, torch.full_like(weight, k + 1))


@on_gpu
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 1e-12])
def test_cudnn_layer_by_layer_agrees_and_finds_its_weights_in_one_piece(
    device: torch.device, bidirectional: bool, dropout: float, recwarn: pytest.WarningsRecorder
) -> None:
    allow_tf32(False)
    case = gru_case(bidirectional, device=device, units=64)
    expected = outputs_and_gradients(all_at_once, *case)
    case[0].dropout = dropout
    found = outputs_and_gradients(by_layers, *case)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not [w for w in recwarn if "contiguous chunk" in str(w.message)]


BFLOAT16_BOUND = 0.05  # of the norm; 8 bits of mantissa over 6 frames and 3 layers give 0.01


def assert_near(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert float((a.float() - b).norm()) < BFLOAT16_BOUND * float(b.norm())


@pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=needs_gpu)])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 1e-12])
def test_a_gru_told_to_computes_in_bfloat16_and_its_gradients_reach_float32(
    device: torch.device, bidirectional: bool, dropout: float
) -> None:
    allow_tf32(False)
    case = gru_case(bidirectional, device=device, units=64)
    expected = outputs_and_gradients(all_at_once, *case)
    case[0].dropout = dropout

    def under_autocast(asked: torch.dtype, gru, *rest):
        with torch.autocast(device.type, dtype=asked):
            return torch_gru(*rest, gru, torch.bfloat16)

    for asked in (torch.bfloat16, torch.float16):  # whatever autocast would do
        found = outputs_and_gradients(partial(under_autocast, asked), *case)
        assert found[0].dtype == torch.bfloat16
        assert all(gradient.dtype == torch.float32 for gradient in found[2:])
        assert_near(found, expected)


@on_gpu
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_gru_of_a_step_has_autocasts_type_in_training_and_validation(
    device: torch.device, bidirectional: bool
) -> None:
    """torch's autocast alone makes it float16 in both; gradients are float32's, within bounds."""
    allow_tf32(False)
    options = {"model__n_units": 64, "model__bidirectional": bidirectional}
    batch = example_batch([60, 75, 48], [0, 1, 1]).to(device)

    def gradients(step, training: bool) -> list[torch.Tensor]:
        step.model.train(training)
        features, n = step.augmentation(batch.features, batch.n_time_steps, training=False)
        with step.autocast(), torch.set_grad_enabled(training):
            frames, packing = step.model.input_frames(features, batch.day_indices, n)
            hidden = step.model.recurrent_frames(frames, packing)
            logits = step.model.out(hidden)
        assert hidden.dtype == (step.amp_dtype or torch.float32)
        if not training:
            return [logits]
        terms = step.objective(logits, batch, step.model.frame_lengths(n), 0)
        step.model.zero_grad()
        terms.total.backward()
        return [p.grad for p in step.model.parameters() if p.grad is not None]

    exact = build(small_config(**options, use_amp=False), device=device)
    for dtype in ("bfloat16", "float16"):
        step = build(small_config(**options, amp_dtype=dtype), device=device)
        for training in (True, False):
            assert_near(gradients(step, training), gradients(exact, training))


@on_gpu
def test_dropout_on_the_gpu_is_the_seeds(device: torch.device) -> None:
    gru, *rest = gru_case(False, dropout=0.4, device=device)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(by_layers(gru, *rest)[0])
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


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
    model = GRUDecoder(6, 10, 2, 41, patch_size=5, patch_stride=2)
    assert all(torch.equal(w, torch.eye(6)) for w in model.day_weights)
    assert all(not b.any() for b in model.day_biases)
    for block in model.gru.weight_hh_l1.detach().split(30):
        torch.testing.assert_close(block.T @ block, torch.eye(10), rtol=0, atol=1e-5)
    bound = (6 / (30 + 30)) ** 0.5
    assert 0.8 * bound < float(model.gru.weight_ih_l0.detach().abs().max()) <= bound
    assert model.h0.abs().max() > 0


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_public_weights_load_whatever_wrapped_them(prefix: str) -> None:
    source, target = decoder(), GRUDecoder(6, 10, 3, 41, n_layers=3, patch_size=5, patch_stride=2)
    given = {f"{prefix}{name}": value for name, value in source.state_dict().items()}
    assert load_public_state_dict(target, given) == []
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])


def test_a_classifier_of_another_size_starts_fresh_and_is_reported() -> None:
    source, target = decoder(), decoder(n_classes=1681)
    fresh = target.out.weight.detach().clone()
    (said,) = load_public_state_dict(target, source.state_dict())
    assert "41 classes" in said and "1681" in said
    assert torch.equal(target.out.weight, fresh)
    assert torch.equal(target.gru.weight_hh_l2, source.gru.weight_hh_l2)


@pytest.mark.parametrize(("theirs", "ours"), [(2, 3), (4, 3)])
def test_other_numbers_of_sessions_load_in_order_and_are_reported(theirs: int, ours: int) -> None:
    source, target = (
        decoder(n_days=theirs),
        GRUDecoder(6, 10, ours, 41, n_layers=3, patch_size=5, patch_stride=2),
    )
    (said,) = load_public_state_dict(target, source.state_dict())
    assert f"{theirs} sessions" in said
    assert torch.equal(target.day_weights[1], source.day_weights[1])
    if ours > theirs:
        assert torch.equal(target.day_weights[2], torch.eye(6))


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"n_layers": 2}, "gru."), ({"n_units": 8}, "gru."), ({"bidirectional": True}, "gru.")],
)
def test_another_architecture_is_refused_by_name(changes: dict, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        load_public_state_dict(decoder(**changes), decoder().state_dict())
