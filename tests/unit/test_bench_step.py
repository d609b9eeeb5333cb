"""The step benchmark measures what it is told to."""

from __future__ import annotations

import re

import pytest
import torch
from benchmarks import bench_step
from brain_to_text.config import TrainingConfig
from brain_to_text.launch.pricing import table

SMALL = ["--units", "8", "--layers", "2", "--features", "6", "--bins", "90", "--batch-size", "4"]
SMALL += ["--rounds", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def tf32_as_it_was():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def configured(*words: str) -> TrainingConfig:
    return bench_step.configured(bench_step.build_parser().parse_args(words))


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


def test_both_ways_of_validation_are_warm_before_the_clock_starts(monkeypatch) -> None:
    asked, real, clocks = [], bench_step.evaluate, []

    def spy(model, augmentation, dataset, *rest, **options):
        asked.append((len(clocks), sum(map(len, dataset._batches))))
        return real(model, augmentation, dataset, *rest, **options)

    def timed(work, device):
        clocks.append(work)
        work()
        return 1.0

    monkeypatch.setattr(bench_step, "evaluate", spy)
    monkeypatch.setattr(bench_step, "timed", timed)
    bench_step.main([*SMALL, "--validation", "9"])
    assert asked == [(0, 4), (2, 9)]


@pytest.mark.parametrize("measured", [None, ("A10G", 0.2)])
def test_every_type_is_projected_and_measured_ones_from_the_measurement(capsys, measured) -> None:
    args = bench_step.build_parser().parse_args(["--project"])
    bench_step.project(configured("--project"), args, measured)
    rows = {
        row.split()[0]: row.split()
        for row in capsys.readouterr().out.splitlines()
        if row[:3] == "ml."
    }
    supported = {name for name, row in table()["types"].items() if row["gpu"] not in (None, "V100")}
    assert rows.keys() == supported
    assert rows["ml.g5.2xlarge"][6:13] == ["73", "44", "11", "1", "129", "5.4", "8"]
    assert rows["ml.p5en.48xlarge"][12] == "-", "nobody knows its price"
    if measured is not None:
        assert rows["ml.g5.2xlarge"][-3:] == ["200", "8.3", "13"]
        assert rows["ml.g4dn.xlarge"][-3:] == ["-", "-", "-"]
