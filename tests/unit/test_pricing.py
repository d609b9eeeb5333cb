"""Hours and dollars: arithmetic, sources, and honesty about what is only estimated."""

import dataclasses

import pytest
from brain_to_text.config_reader import load_config
from brain_to_text.gpus import GPUS
from brain_to_text.launch import pricing
from brain_to_text.launch.pricing import (
    cheaper_choice,
    estimate,
    gpu_of,
    hourly_price,
    instance_types,
    prices,
)
from brain_to_text.launch.request import CODE_FOLDER, DEFAULT_CONFIG
from support.aws_emulation import emulated_aws, launcher_policy, log_in


@pytest.fixture
def config():
    return load_config(CODE_FOLDER / DEFAULT_CONFIG)


def test_every_row_of_the_table_is_complete():
    for name, row in instance_types().items():
        assert row.ram_gib > 0
        assert (row.gpus > 0) == (gpu_of(name) is not None)


def test_a_measurement_replaces_the_estimate(config, monkeypatch):
    measured = dataclasses.replace(GPUS["A10G"], seconds_per_step=0.36)
    monkeypatch.setitem(GPUS, "A10G", measured)
    made = estimate(config, "ml.g5.2xlarge")
    assert made.measured
    assert made.hours == pytest.approx(150_000 * 0.36 / 3600 + pricing.START_HOURS, rel=0.02)
    assert made.usd == pytest.approx(made.hours * 1.515)
    half = dataclasses.replace(config, num_training_batches=75_000)
    assert estimate(half, "ml.g5.2xlarge").hours == pytest.approx(made.hours / 2, rel=0.02)


def test_several_gpus_pay_for_the_exchange_of_gradients(config):
    """The figures of `plan_scaling.py` by TCP, in tests/benchmarks/RESULTS.md."""
    steps = config.num_training_batches
    for name, instances, hours, usd in (
        ("ml.g5.12xlarge", 1, 4.6, 32),
        ("ml.g5.48xlarge", 1, 4.4, 90),
        ("ml.p4d.24xlarge", 1, 1.3, 50),
        ("ml.p4d.24xlarge", 2, 3.9, 292),
        ("ml.p5.48xlarge", 2, 3.8, 850),
    ):
        made = estimate(config, name, instances)
        training = steps * made.seconds_per_step / 3600
        assert training == pytest.approx(hours, abs=0.05), name
        assert training * made.usd_per_hour * instances == pytest.approx(usd, rel=0.02), name


@pytest.mark.parametrize(
    ("name", "instances", "instead"),
    [
        ("ml.g5.2xlarge", 1, None),
        ("ml.g5.2xlarge", 2, "ml.g5.xlarge"),
        ("ml.g5.12xlarge", 1, "ml.g5.xlarge"),
        ("ml.p4d.24xlarge", 1, None),  # there is no smaller one of these
        ("ml.p4d.24xlarge", 2, "ml.p4d.24xlarge"),
        ("ml.p5en.48xlarge", 2, "ml.p5en.48xlarge"),  # at whatever price
    ],
)
def test_more_gpus_that_cost_more_and_gain_little_are_named(config, name, instances, instead):
    said = cheaper_choice(config, name, instances)
    assert (said is None) == (instead is None)
    if said:
        assert f"use --instance-type {instead} --instance-count 1." in said


@pytest.mark.parametrize("name", ["ml.unknown.xlarge", "ml.m5.xlarge", "ml.p5en.48xlarge"])
def test_what_is_not_known_is_said(config, name):
    made = estimate(config, name)
    assert made.usd is None
    assert any("not known" in line for line in made.lines())


@pytest.mark.aws
def test_the_price_list_is_asked_first_and_the_dated_table_steps_in(monkeypatch):
    with emulated_aws(monkeypatch) as aws:
        aws.prices = {"ml.g5.2xlarge": 1.234, "ml.g5.xlarge": 0.5}
        assert hourly_price("ml.g5.2xlarge", aws.account) == (1.234, "AWS Price List, us-east-1")
        aws.prices.clear()
        assert hourly_price("ml.g5.2xlarge", aws.account) == (1.515, prices())
        log_in(aws, monkeypatch, launcher_policy(without="pricing:GetProducts"))
        assert hourly_price("ml.g5.2xlarge", aws.account) == (1.515, prices())
    assert "not verified" in prices()
