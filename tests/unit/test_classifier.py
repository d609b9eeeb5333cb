"""The factored classifier: its mathematics, its way into and out of plain weights, its training."""

from __future__ import annotations

import torch
from brain_to_text.labels.diphones import marginalise_log_probs
from brain_to_text.model.classifier import FactoredClassifier, folded, unfolded
from brain_to_text.model.optimizer import build_optimizer
from brain_to_text.model.rnn_model import GRUDecoder, load_public_state_dict
from support.training_examples import small_config

SETTINGS = {"model__classifier": "factored", "objective__schedule": [[0.3, 1.0], [0.7, 0.4]]}
INPUTS = 5


def decoder(for_training: bool = True, **changes: object) -> GRUDecoder:
    return GRUDecoder(small_config(**SETTINGS | changes), 3, for_training=for_training)


# --- mathematics ----------------------------------------------------------------------------------


def test_a_fresh_classifier_is_a_phoneme_classifier_whose_previous_phoneme_is_open() -> None:
    classifier = FactoredClassifier(INPUTS).double()
    hidden = torch.randn(9, INPUTS, dtype=torch.float64)
    log_probs = classifier(hidden).log_softmax(-1)
    phonemes = classifier.current(hidden).log_softmax(-1)
    torch.testing.assert_close(marginalise_log_probs(log_probs), phonemes)
    by_previous = log_probs.unflatten(-1, (41, 41)).logsumexp(-1)
    torch.testing.assert_close(by_previous.exp(), torch.full((9, 41), 1 / 41, dtype=torch.float64))


def test_what_is_learnt_of_the_previous_phoneme_does_not_steer_the_layers_below_at_first() -> None:
    classifier = FactoredClassifier(INPUTS)
    hidden = torch.randn(9, INPUTS, requires_grad=True)
    log_probs = classifier(hidden).log_softmax(-1).unflatten(-1, (41, 41))
    log_probs.logsumexp(-1)[:, 3].sum().backward()
    assert hidden.grad.abs().max() < 1e-5 < 1e-2 < classifier.previous.weight.grad.abs().max()


# --- in and out of plain weights ------------------------------------------------------------------


def test_a_folded_model_is_the_baselines_and_computes_the_same() -> None:
    model = decoder()
    model.out = random = FactoredClassifier(model.n_units)
    random.load_state_dict({n: torch.randn_like(v) for n, v in random.state_dict().items()})
    plain = decoder(for_training=False)
    weights = folded(model)
    assert weights.keys() == plain.state_dict().keys()
    plain.load_state_dict(weights)
    x, days = torch.randn(3, 40, 6), torch.tensor([0, 1, 2])
    model.eval(), plain.eval()
    with torch.no_grad():
        assert torch.equal(plain(x, days), model(x, days))
    assert folded(plain).keys() == weights.keys()


def test_plain_weights_become_residual_and_come_back_to_the_bit() -> None:
    plain = decoder(for_training=False)
    with torch.no_grad():
        plain.out.bias.normal_()
    weights = {name: value.clone() for name, value in plain.state_dict().items()}
    assert unfolded(weights).keys() == decoder().state_dict().keys()
    model = decoder()
    assert load_public_state_dict(model, weights) == []
    for name, value in folded(model).items():
        assert torch.equal(value, weights[name]), name
    assert not model.out.previous.weight.any() and not model.out.current.bias.any()


def test_a_phoneme_checkpoint_leaves_the_factors_fresh() -> None:
    phonemes = decoder(for_training=False, dataset__n_classes=41, objective__schedule=None)
    model = decoder()
    fresh = {name: value.clone() for name, value in model.out.state_dict().items()}
    (said,) = load_public_state_dict(model, phonemes.state_dict())
    assert "41 classes" in said and "starts from fresh weights" in said
    for name, value in model.out.state_dict().items():
        assert torch.equal(value, fresh[name]), name
    assert torch.equal(model.gru.weight_ih_l0, phonemes.gru.weight_ih_l0)


def test_only_a_diphone_model_in_training_has_factors() -> None:
    assert isinstance(decoder().out, FactoredClassifier)
    for changes in (
        {"for_training": False},
        {"model__classifier": "plain"},
        {"dataset__n_classes": 41, "objective__schedule": None},
    ):
        assert isinstance(decoder(**changes).out, torch.nn.Linear), changes


# --- training -------------------------------------------------------------------------------------


def test_biases_of_all_factors_are_not_decayed() -> None:
    config, model = small_config(**SETTINGS), decoder()
    optimizer = build_optimizer(model, config)
    group = {id(p): g["group_type"] for g in optimizer.param_groups for p in g["params"]}
    groups = {n: group[id(p)] for n, p in model.named_parameters() if n.startswith("out.")}
    assert groups == {
        f"out.{factor}.{kind}": "bias" if kind == "bias" else "other"
        for factor in ("residual", "previous", "current")
        for kind in ("weight", "bias")
    }
