"""The step benchmark measures what it is told to."""

from __future__ import annotations

import re

import pytest
import torch
from benchmarks import bench_step
from brain_to_text.config import TrainingConfig
from brain_to_text.launch.pricing import instance_types

SMALL = ["--units", "8", "--layers", "2", "--features", "6", "--bins", "90", "--batch-size", "4"]
SMALL += ["--rounds", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def tf32_as_it_was():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def configured(*words: str) -> TrainingConfig:
    return bench_step.configured(*bench_step.build_parser().parse_known_args(words))


@pytest.fixture
def file(tmp_path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: {bidirectional: true, n_units: 24, rnn_dropout: 0.1}\n"
        "dataset: {n_classes: 1681}\n"
        "objective: {ctc_kernel: triton, schedule: [[10, 0.0], [60, 0.6]]}\n"
    )
    return str(path)


def test_a_configuration_counts_but_for_what_is_given_beside_it(file) -> None:
    config = configured("--config", file)
    assert config.model.bidirectional and config.model.n_units == 24
    assert config.objective.ctc_kernel == "triton"
    assert config.objective.phoneme_weight == 0.6 and config.objective.schedule is None
    words = ["--no-bidirectional", "--units", "32", "--ctc-kernel", "torch", "--rnn-dropout", "0"]
    config = configured("--config", file, *words, "--phoneme-weight", "0")
    assert not config.model.bidirectional and config.model.n_units == 32
    assert config.objective.ctc_kernel == "torch" and config.objective.phoneme_weight == 0
    assert config.model.rnn_dropout == 0


@pytest.mark.parametrize(
    ("words", "allowed"),
    [(["--amp-dtype", "off"], False), (["--amp-dtype", "off", "--tf32"], True), ([], True)],
)
def test_float32_is_float32_unless_tf32_is_asked_for(words, allowed, monkeypatch) -> None:
    decided = []
    monkeypatch.setattr(bench_step, "allow_tf32", decided.append)
    monkeypatch.setattr(bench_step, "compare_step", lambda *_: 1.0)
    bench_step.main([*SMALL, *words])
    assert decided == [allowed]


def test_a_sweep_keeps_to_what_is_given(capsys) -> None:
    bench_step.main([*SMALL, "--sweep", "--ours-only"])
    assert re.findall(r"(?m)^(\d+ x \d+)", capsys.readouterr().out.split("peak GB")[1]) == [
        "4 x 90"
    ]


def test_steps_with_data_come_from_the_dataset_and_its_cache_on_the_device(capsys) -> None:
    bench_step.main([*SMALL, "--with-data"])
    rows = re.findall(r"(?m)^streamed +[\d.]+ +[\d.]+ +[\d.]+ +(\d+)$", capsys.readouterr().out)
    assert len(rows) == 3 and int(rows[-1]) > 50


def test_validation_decodes_alike_in_batches_and_one_at_a_time(capsys) -> None:
    bench_step.main([*SMALL, "--validation", "5"])
    assert "trials with equal labels: 5" in capsys.readouterr().out


@pytest.mark.parametrize("measured", [{}, {"A10G": 0.2}])
def test_every_type_is_projected_and_measured_ones_from_the_measurement(capsys, measured) -> None:
    bench_step.project(configured("--project"), measured)
    rows = {
        row.split()[0]: row.split()
        for row in capsys.readouterr().out.splitlines()
        if row[:3] == "ml."
    }
    types = instance_types().items()
    assert rows.keys() == {name for name, row in types if row.gpu not in (None, "V100")}
    step = ["200", "8.3", "13"] if measured else ["129", "5.4", "8"]
    assert rows["ml.g5.2xlarge"][6:13] == ["73", "44", "10", "1", *step]
    assert rows["ml.p5en.48xlarge"][12] == "-", "nobody knows its price"
    assert rows["ml.g4dn.xlarge"][-1] == "estimate"
