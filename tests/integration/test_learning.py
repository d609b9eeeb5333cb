"""The smoke configuration learns the smoke data, for the right reasons.

Runs of rnn_args_smoke.yaml, all by the real trainer on the real files: as it is (DER and PER fall
below 0.05, and a language model of the training sentences lowers the word error rate on held-out
sentences), with labels permuted between trials (what is learnt fits every trial alike: the labels'
own statistics), and without training the day layers (clearly worse, because sessions differ).
"""

from __future__ import annotations

import json
from pathlib import Path

import evaluate_model
import h5py
import prepare_dataset
import pytest
import torch
from brain_to_text.config_reader import load_config
from brain_to_text.dataset.indexing import index_dataset
from brain_to_text.dataset.manifest import load_manifest, write_manifest
from brain_to_text.dataset.synthetic import SyntheticDataset, synthesize
from brain_to_text.model.trained_model import open_model
from brain_to_text.scoring.error_rates import ErrorCounts
from brain_to_text.scoring.evaluate import run_model
from brain_to_text.storage.store import open_store
from brain_to_text.streaming.trial_stream import TrialStream
from brain_to_text.training.rnn_trainer_s3 import BrainToTextDecoder_Trainer_S3, RunPaths

CONFIG = Path(prepare_dataset.__file__).with_name("rnn_args_smoke.yaml")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def trained(folder: Path, data: Path, **overrides: object) -> dict[str, float]:
    """The last validation of a run."""
    config = load_config(CONFIG, {key.replace("__", "."): v for key, v in overrides.items()})
    paths = RunPaths(folder / "model", folder / "output", folder / "checkpoints")
    state = BrainToTextDecoder_Trainer_S3(config, str(data), paths).train()
    assert state.finished
    return state.validations[-1]


@pytest.fixture(scope="module")
def smoke_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smoke")
    assert prepare_dataset.main(["synthesize", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def reference_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reference")


@pytest.fixture(scope="module")
def reference(smoke_data: Path, reference_folder: Path) -> dict[str, float]:
    return trained(reference_folder, smoke_data)


def test_error_rates_fall_below_a_twentieth(reference: dict[str, float]) -> None:
    assert reference["der"] < 0.05
    assert reference["per"] < 0.05


def test_a_language_model_of_the_training_sentences_lowers_the_word_error_rate(
    reference: dict[str, float], reference_folder: Path, tmp_path: Path
) -> None:
    for package in ("flashlight", "kenlm"):
        pytest.importorskip(
            package, reason="pip install -r docker/requirements_sagemaker_words.txt"
        )
    assert reference["per"] < 0.10
    # the same electrodes and sentences, but a weaker signal: else no word would be wrong
    data = tmp_path / "data"
    assert synthesize(open_store(data), SyntheticDataset(gain=0.3)).trials
    manifest = load_manifest(open_store(str(data)))
    assert manifest is not None
    train, val = (
        {manifest.trials[i].sentence_label for i in manifest.select(split)}
        for split in ("train", "val")
    )
    assert not train & val, "validation sentences are held out"
    rates = {}
    for model in ("none", "training"):
        arguments = ["--model", reference_folder / "model", "--data-dir", data]
        arguments += ["--language-model", model, "--output-dir", tmp_path / model]
        assert evaluate_model.main([str(argument) for argument in arguments]) == 0
        summary = json.loads((tmp_path / model / "summary.json").read_text())
        rates[model] = summary["rates"]["WER"]["value"]
    assert rates["training"] < rates["none"]  # 0.011 against 0.063 when this was written


def own_and_others_error_rates(folder: Path, data: Path) -> tuple[float, float]:
    """PER of a run's best weights against each validation trial's own labels, and its mean over
    the labels of every other trial."""
    store = open_store(str(data))
    manifest = load_manifest(store)
    assert manifest is not None
    artefact = open_model(str(folder / "model"))
    with TrialStream(store, manifest) as stream:
        trials = run_model(artefact, stream, "val", torch.device("cpu")).trials
    decoded = [trial.hypothesis for trial in trials]
    labels = [trial.reference for trial in trials]
    assert all(labels)

    def rate(references: list) -> float:
        pairs = zip(references, decoded, strict=True)
        return sum((ErrorCounts.between(*pair) for pair in pairs), ErrorCounts()).rate

    turned = [rate(labels[by:] + labels[:by]) for by in range(len(labels))]
    return turned[0], sum(turned[1:]) / len(turned[1:])


def test_what_is_decoded_fits_its_own_trial(
    reference: dict[str, float], reference_folder: Path, smoke_data: Path
) -> None:
    own, others = own_and_others_error_rates(reference_folder, smoke_data)
    assert own == pytest.approx(reference["per"])
    assert others > 0.7


def test_nothing_but_the_labels_statistics_is_learnt_from_permuted_labels(tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert synthesize(open_store(data)).trials
    for path in data.rglob("*.hdf5"):  # each trial gets the features of the one before
        with h5py.File(path, "r+") as file:
            trials = list(file.values())
            features = [trial["input_features"][:] for trial in trials]
            for trial, values in zip(trials, [features[-1], *features], strict=False):
                del trial["input_features"]
                trial["input_features"] = values
                trial.attrs["n_time_steps"] = len(values)
    write_manifest(open_store(data), index_dataset(open_store(data)))
    result = trained(tmp_path / "run", data, dataset__on_damaged_trial="exclude")
    own, others = own_and_others_error_rates(tmp_path / "run", data)
    assert own > 0.97 * others
    assert result["per"] > 0.6
    assert result["der"] > 0.7


def test_without_day_layers_it_is_clearly_worse(tmp_path: Path) -> None:
    # sessions that mix their electrodes unrelated to each other, so that only a day layer helps
    data = tmp_path / "data"
    assert synthesize(open_store(data), SyntheticDataset(session_change=1)).trials
    own = trained(tmp_path / "own", data, num_training_batches=100)
    fixed = trained(
        tmp_path / "fixed",
        data,
        num_training_batches=100,
        model__input_network__input_trainable=False,
    )
    assert fixed["per"] > 1.5 * own["per"]  # 0.015 against 0.005 when this was written
    assert fixed["der"] > 1.5 * own["der"]  # 0.092 against 0.045
