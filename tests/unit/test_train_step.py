"""A step's promises: it learns, resumes, averages, refuses the non-finite, and never waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from brain_to_text.errors import TrainingError
from brain_to_text.gpus import training_flops
from brain_to_text.model import rnn_model
from brain_to_text.model import train_step as train_step_module
from brain_to_text.model.device import allow_tf32
from brain_to_text.model.train_step import Health, largest_batch
from support.training_examples import build, example_batch, rows_of, small_config

NOISY: dict[str, Any] = {
    "dataset__data_transforms__white_noise_std": 1.0,
    "dataset__data_transforms__constant_offset_std": 0.2,
    "dataset__data_transforms__random_cut": 3,
    "model__rnn_dropout": 0.3,
    "model__input_network__input_layer_dropout": 0.2,
    "objective__phoneme_weight": 0.4,
}


def weights(step) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in step.model.state_dict().items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def spoil(batch):
    """A trial whose features overflow: a loss that is not finite."""
    batch.features[0, 3, 2] = float("inf")
    return batch


# --- determinism and restarts ---------------------------------------------------------------------


def test_a_step_depends_on_seed_step_and_rank_alone() -> None:
    """Noise, cuts and dropout do not come from whatever ran before."""
    runs = []
    for disturb, rank in ((False, 0), (True, 0), (False, 1)):
        step = build(small_config(**NOISY), rank=rank)
        for k in range(3):
            if disturb:
                torch.rand(100)
            step(example_batch([40, 31, 38], [0, 1, 1], seed=k), k)
        runs.append(weights(step))
    assert_equal(runs[0], runs[1])
    assert not torch.equal(runs[0]["out.weight"], runs[2]["out.weight"])


def test_trying_a_batch_leaves_no_trace() -> None:
    runs = []
    for tries in (False, True):
        step = build(small_config(**NOISY, ema_decay=0.5))
        step(example_batch([40, 31], [0, 1]), 0)
        if tries:
            assert largest_batch(step, 5, 60, 7) == 5
        step(example_batch([33, 31], [2, 1]), 1)
        runs.append(weights(step))
    assert_equal(*runs)


def test_trying_halves_the_batch_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside averaged weights, which no step has made yet, and with both loss terms."""
    step = build(small_config(ema_decay=0.9, objective__schedule=[[0.3, 1.0], [0.7, 0.0]]))
    tried, real = [], step.backward

    def limited(batch, number: int, alpha: float):
        tried.append((len(batch), alpha))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("does not fit")
        return real(batch, number, alpha)

    monkeypatch.setattr(step, "backward", limited)
    assert largest_batch(step, 12, 60, 7) == 3
    assert tried == [(12, 0.5), (6, 0.5), (3, 0.5)] and step.average is not None


def test_the_norm_at_which_gradients_are_clipped_follows_the_batchs_bins() -> None:
    batch, ends = example_batch([40, 31], [0, 1]), []
    for most, bins_over_mean in ((0.1, 2.0), (0.2, 1.0)):
        step = build(small_config(grad_norm_clip_value=most))
        assert float(step(batch, 0, None, bins_over_mean).grad_norm) > 0.2
        ends.append(weights(step))
    assert_equal(*ends)


# --- several ranks --------------------------------------------------------------------------------


def test_gradients_of_shares_add_up_to_those_of_the_batch() -> None:
    """What ranks do: sums over local trials / global size, between backward and clipping."""
    batch = example_batch([40, 31, 38, 22], [0, 1, 1, 2])
    config = small_config(objective__phoneme_weight=0.3, grad_norm_clip_value=0.0)

    def gradients(rows: list[int], rank: int) -> dict[str, torch.Tensor]:
        step, found = build(config, rank=rank), {}
        named = list(step.model.named_parameters())
        step.after_backward = lambda _: found.update({n: p.grad for n, p in named})
        step(rows_of(batch, rows), 0, global_batch_size=4)
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    whole, one, other = gradients([0, 1, 2, 3], 0), gradients([0, 1], 0), gradients([2, 3], 1)
    assert whole.keys() == one.keys() | other.keys()
    for name, gradient in whole.items():
        total = one.get(name, 0) + other.get(name, 0)
        torch.testing.assert_close(total, gradient, rtol=1e-5, atol=1e-7)


# --- refusing -------------------------------------------------------------------------------------


def test_a_non_finite_step_is_refused_and_changes_nothing() -> None:
    step = build(small_config())
    step(example_batch([30, 26], [0, 1]), 0)
    before = weights(step)
    assert not bool(step(spoil(example_batch([30, 26], [0, 1])), 1).finite)
    assert_equal(before, weights(step))
    assert bool(step(example_batch([30, 26], [0, 1]), 2).finite)
    assert not torch.equal(before["out.weight"], weights(step)["out.weight"])


def test_the_longest_run_of_refusals_is_remembered_until_somebody_asks() -> None:
    """Also over a checkpoint."""
    step = build(small_config())
    good, bad = example_batch([30, 26], [0, 1]), spoil(example_batch([30, 26], [0, 1]))
    for k, batch in enumerate((good, bad, bad, good, bad, good)):
        step(batch, k)
    resumed = build(small_config())
    resumed.load_state_dict(step.state_dict())
    for each in (step, resumed):
        assert vars(each.health()) == vars(Health(3, 2, 4))
        each(good, 6)
        assert vars(each.health()) == vars(Health(3, 0, 4))
        each(bad, 7)
        assert vars(each.health()) == vars(Health(4, 1, 7))
        each(bad, 8)
        assert vars(each.health()) == vars(Health(5, 2, 8)), "asking does not end a run"


def test_an_infeasible_trial_is_refused_too() -> None:
    step = build(small_config())
    for bins in (8, 3):  # 3 frames, and none, for 11 labels
        batch = example_batch([30, bins], [0, 1], n_phonemes=5)
        assert not bool(step(batch, 0).finite)


def scaled_step(monkeypatch: pytest.MonkeyPatch, **options):
    """float32 arithmetic with float16's scaled loss."""
    monkeypatch.setattr(train_step_module, "autocast_dtype", lambda *_: torch.float16)
    step = build(small_config(), **options)
    step.amp_dtype = None
    return step


def overflow(step):
    """A hook after which a gradient is infinite while the loss is not."""
    return lambda _batch: step.model.out.weight.grad.fill_(float("inf"))


def test_float16_scales_the_loss_and_grows_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule of torch's GradScaler, on the device; the update is that of an unscaled loss."""
    monkeypatch.setattr(train_step_module, "GROWTH_INTERVAL", 3)
    plain, scaled = build(small_config()), scaled_step(monkeypatch)
    batch = example_batch([30, 26], [0, 1])
    for k in range(3):
        a, b = plain(batch, k), scaled(batch, k)
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.terms.total, b.terms.total)
    assert float(scaled.scale) == 2 * train_step_module.INITIAL_SCALE
    for a, b in zip(plain.parameters, scaled.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_an_overflow_that_a_smaller_scale_may_cure_is_no_divergence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = scaled_step(monkeypatch)
    batch = example_batch([30, 26], [0, 1])
    step(batch, 0)
    before = weights(step)
    step.after_backward = overflow(step)
    for k in range(1, 17):  # from 2^16 down to 1
        assert not bool(step(batch, k).finite)
    assert_equal(before, weights(step))
    assert float(step.scale) == 1 and step.health().refused_total == 0
    step(batch, 17)
    assert step.health().last_refused_step == 17, "at scale 1 it is the model that diverged"


def test_a_loss_that_is_not_finite_is_refused_and_named_at_any_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = scaled_step(monkeypatch)
    for k in (0, 1):
        assert not bool(step(spoil(example_batch([30, 26], [0, 1])), k).finite)
    health = step.health()
    assert (health.refused_total, health.refused_in_a_row) == (2, 2)
    assert health.last_refused_step == 1
    assert float(step.scale) == train_step_module.INITIAL_SCALE, "it is not to blame"


def test_a_loss_that_is_not_finite_on_another_rank_counts_on_this_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = scaled_step(monkeypatch, on_every_rank=torch.zeros_like)
    step.after_backward = overflow(step)  # what summing the other rank's gradient does
    step(example_batch([30, 26], [0, 1]), 0)
    assert step.health().last_refused_step == 0


def test_an_error_of_cudnn_names_the_settings_that_may_avoid_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = build(small_config())

    def refuses(*_):
        raise RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")

    monkeypatch.setattr(rnn_model, "packed_gru", refuses)
    with pytest.raises(TrainingError, match=r"EXECUTION_FAILED.*--amp_dtype float16"):
        step(example_batch([30, 26], [0, 1]), 0)


# --- averaging ------------------------------------------------------------------------------------


def test_averaged_weights_follow_their_formula_and_are_off_by_default() -> None:
    step = build(small_config(ema_decay=0.3))
    expected = {n: p.detach().double() for n, p in step.model.named_parameters()}
    for k in range(12):
        step(example_batch([30, 26], [0, 1], seed=k), k)
        decay = min(0.3, (1 + k) / (10 + k))
        for name, p in step.model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
    own = weights(step)
    with step.averaged_weights():
        for name, p in step.model.named_parameters():
            torch.testing.assert_close(p.double(), expected[name], rtol=0, atol=1e-6)
    assert_equal(own, weights(step))
    assert build(small_config()).average is None


def test_averaging_switched_on_late_begins_with_the_weights_of_then() -> None:
    trained = build(small_config(lr_max=0.1))
    for k in range(5):
        trained(example_batch([30, 26], [0, 1], seed=k), k)
    late = build(small_config(ema_decay=0.999))
    late.model.load_state_dict(weights(trained))
    late.load_state_dict(trained.state_dict())
    own = weights(late)
    late(example_batch([30, 26], [0, 1]), 50_000)
    with late.averaged_weights():
        for name, value in weights(late).items():
            torch.testing.assert_close(value, own[name], rtol=0, atol=1e-4)


# --- on a GPU (see test_stand_in_gpu too) ---------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}, {"model__bidirectional": True}])
def test_no_step_synchronises_with_the_gpu(options: dict[str, Any]) -> None:
    device = torch.device("cuda:0")
    config = small_config(**NOISY, **options)
    step = build(config, device=device)
    batches = [example_batch([40 + k, 31, 38], [0, 1, 1], seed=k).to(device) for k in range(4)]
    for k in range(3):
        step(batches[k], k)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batches[3], 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.health().refused_total == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("dtype", ["off", "bfloat16", "float16"])
def test_the_gpu_agrees_with_the_cpu(dtype: str) -> None:
    allow_tf32(False)  # cuDNN's default is to allow it
    config = small_config(model__n_units=64, use_amp=False, allow_tf32=False)
    batch = example_batch([60, 75, 48], [0, 1, 1])
    exact = build(config)(batch, 0)
    on_gpu = small_config(model__n_units=64, use_amp=dtype != "off", allow_tf32=False)
    if dtype != "off":
        on_gpu.amp_dtype = dtype  # type: ignore[assignment]
    step = build(on_gpu, device=torch.device("cuda:0"))
    result = step(batch.to(step.device), 0)
    bound = 1e-5 if dtype == "off" else 2e-3
    assert float(result.terms.total) == pytest.approx(float(exact.terms.total), rel=bound)
    assert float(result.grad_norm) == pytest.approx(float(exact.grad_norm), rel=20 * bound)


# --- counting arithmetic --------------------------------------------------------------------------


def test_flops_agree_with_the_products_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = small_config(model__n_units=16, model__bidirectional=True)
    step = build(config)
    batch = example_batch([40, 40], [0, 1])
    with FlopCounterMode(display=False) as counter:
        features, n = step.augmentation(batch.features, batch.n_time_steps, torch.Generator())
        step.model(features, batch.day_indices, n_time_steps=n)
    counted = counter.get_total_flops()
    n_frames = int(step.model.frame_lengths(n).sum())
    assert 3 * counted == pytest.approx(training_flops(config, int(n.sum()), n_frames), rel=0.02)
