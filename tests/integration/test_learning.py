"""The smoke configuration learns synthetic data, for the right reasons.

One run of rnn_args_smoke.yaml by the real trainer on real files, whose sessions mix their
electrodes unrelated to each other. Error rates fall; what is decoded fits its own trial's labels
and no other's; a session needs its own day layer; and a language model of the training sentences
lowers the word error rate on held-out sentences.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import evaluate_model
import prepare_dataset
import pytest
import torch
from brain_to_text.config_reader import load_config
from brain_to_text.dataset.manifest import load_manifest
from brain_to_text.dataset.synthetic import SyntheticDataset, synthesize
from brain_to_text.model.trained_model import ModelArtefact, open_model
from brain_to_text.scoring.decoding import DecodedTrial
from brain_to_text.scoring.error_rates import ErrorCounts
from brain_to_text.scoring.evaluate import run_model
from brain_to_text.storage.store import open_store
from brain_to_text.streaming.trial_stream import TrialStream
from brain_to_text.training.rnn_trainer_s3 import BrainToTextDecoder_Trainer_S3, RunPaths

CONFIG = Path(prepare_dataset.__file__).with_name("rnn_args_smoke.yaml")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """The folder of the run, with its data, and the last validation."""
    folder = tmp_path_factory.mktemp("learned")
    assert synthesize(open_store(folder / "data"), SyntheticDataset(session_change=1)).trials
    paths = RunPaths(folder / "model", folder / "output", folder / "checkpoints")
    config = load_config(CONFIG, {"num_training_batches": "100"})
    state = BrainToTextDecoder_Trainer_S3(config, str(folder / "data"), paths).train()
    assert state.finished
    return folder, state.validations[-1]


def decoded(folder: Path, model: ModelArtefact) -> list[DecodedTrial]:
    store = open_store(folder / "data")
    manifest = load_manifest(store)
    assert manifest is not None
    with TrialStream(store, manifest) as stream:
        return run_model(model, stream, "val", torch.device("cpu")).trials


def rate(trials: list[DecodedTrial], turned_by: int = 0) -> float:
    """PER against each trial's labels, or against those of the trial so many places further."""
    references = [trial.reference for trial in trials]
    references = references[turned_by:] + references[:turned_by]
    pairs = zip(references, (trial.hypothesis for trial in trials), strict=True)
    return sum((ErrorCounts.between(*pair) for pair in pairs), ErrorCounts()).rate


def test_error_rates_fall(learned: tuple[Path, dict[str, float]]) -> None:
    _, result = learned
    assert result["der"] < 0.1  # 0.045 when this was written
    assert result["per"] < 0.05


def test_what_is_decoded_fits_its_own_trial(learned: tuple[Path, dict[str, float]]) -> None:
    """Permuted labels are not fitted: nothing but the features tells a trial from the others."""
    folder, result = learned
    trials = decoded(folder, open_model(folder / "model"))
    assert rate(trials) == pytest.approx(result["per"])
    others = [rate(trials, by) for by in range(1, len(trials))]
    assert sum(others) / len(others) > 0.7


def test_a_session_needs_its_own_day_layer(learned: tuple[Path, dict[str, float]]) -> None:
    folder, _ = learned
    model = open_model(folder / "model")
    swapped = replace(model, sessions=(*model.sessions[1:], model.sessions[0]))
    assert rate(decoded(folder, swapped)) > 0.5


def test_a_language_model_of_the_training_sentences_lowers_the_word_error_rate(
    learned: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    for package in ("flashlight", "kenlm"):
        pytest.importorskip(
            package, reason="pip install -r docker/requirements_sagemaker_words.txt"
        )
    # the same electrodes and sentences, but a weaker signal: else no word would be wrong
    data = tmp_path / "data"
    assert synthesize(open_store(data), SyntheticDataset(session_change=1, gain=0.3)).trials
    manifest = load_manifest(open_store(str(data)))
    assert manifest is not None
    train, val = (
        {manifest.trials[i].sentence_label for i in manifest.select(split)}
        for split in ("train", "val")
    )
    assert not train & val, "validation sentences are held out"
    rates = {}
    for model in ("none", "training"):
        arguments = ["--model", learned[0] / "model", "--data-dir", data]
        arguments += ["--language-model", model, "--output-dir", tmp_path / model]
        assert evaluate_model.main([str(argument) for argument in arguments]) == 0
        summary = json.loads((tmp_path / model / "summary.json").read_text())
        rates[model] = summary["rates"]["WER"]["value"]
    assert rates["training"] < rates["none"]  # 0.011 against 0.063 when this was written
