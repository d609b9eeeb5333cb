"""Data against configuration: everything that a user lists and the data does not have is named."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import brain_to_text
import numpy as np
import pytest
from brain_to_text.config_reader import load_config
from brain_to_text.dataset.indexing import index_dataset
from brain_to_text.dataset.selection import against_config, ctc_problem, select_trials
from brain_to_text.dataset.trial_table import TrialTable
from brain_to_text.errors import ConfigError
from brain_to_text.storage.store import open_store

FITTING = {
    "n_classes": 1681,
    "batch_size": 4,
    "days_per_batch": 2,
    "patch_size": 6,
    "patch_stride": 2,
}


@pytest.fixture(scope="module")
def manifest(tiny_dataset):
    return index_dataset(open_store(tiny_dataset.folder))


def config(**settings):
    return load_config(None, {**FITTING, **settings})


def test_the_data_decides_what_is_null(manifest):
    given = config(must_include_days="[-1, 0]")
    selection = select_trials(manifest, given)
    assert given.dataset.neural_dim == given.model.n_input_features == 32
    assert given.model.input_network.input_layer_sizes == [32]
    assert given.dataset.sessions == list(selection.sessions) == manifest.sessions
    assert given.dataset.must_include_days == [2, 0]
    assert selection.warnings == ()
    subset = config(feature_subset="[3, 1]")
    select_trials(manifest, subset)
    assert (subset.dataset.neural_dim, subset.model.n_input_features) == (32, 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_classes": 41}, ["1681 classes", "rnn_args_diphone_sagemaker.yaml"]),
        ({"neural_dim": 512}, ["32 features per bin", "null"]),
        ({"n_input_features": 31}, ["gives 32", "null"]),
        ({"feature_subset": "[0, 32]"}, ["from 0 to 31; 32 is outside"]),
        (
            {"sessions": "[t15.2023.08.12, x, t15.2023.08.11, t15.2023.08.18]"},
            ["t15.2023.08.12, x", "did you mean t15.2023.08.1"],
        ),
        ({"days_per_batch": 4}, ["3 sessions", "--dataset.days_per_batch 3"]),
        ({"must_include_days": "[3]"}, ["names session 3", "0 to 2"]),
        ({"must_include_days": "[-4]"}, ["names session -4", "down to -3"]),
    ],
)
def test_what_cannot_train_is_one_error(manifest, settings, words):
    given = config(**settings)
    before = dataclasses.asdict(given)
    (finding,) = against_config(manifest, given)
    assert finding.severity == "error" and dataclasses.asdict(given) == before
    assert all(word in finding.reason for word in words), finding
    with pytest.raises(ConfigError, match=r"."):
        select_trials(manifest, given)


def test_exclusions_that_match_nothing_are_a_warning_by_name(manifest):
    excluded = "{t15.2023.08.12: {1: [3]}, t15.2023.08.11: {9: [3], 1: [3, 300]}}"
    selection = select_trials(manifest, config(bad_trials_dict=excluded))
    (warning,) = selection.warnings
    for nothing in ("08.12 block 1 trial 3", "08.11 block 9 trial 3", "08.11 block 1 trial 300"):
        assert f"t15.2023.{nothing}" in warning
    assert len(selection.excluded) == 1
    matching = "{t15.2023.08.11: {1: [3], 2: [5]}}"
    selection = select_trials(manifest, config(bad_trials_dict=matching))
    assert selection.warnings == () and len(selection.excluded) == 2


def test_a_label_needs_a_frame_and_two_equal_ones_a_blank_between(manifest):
    def problem(n_time_steps, phonemes, cut=0):
        given = {"phoneme_ids": phonemes, "class_ids": phonemes, "n_time_steps": n_time_steps}
        trial = dataclasses.replace(manifest.trials[0], **given)
        return ctc_problem(TrialTable.of([trial], [], 32, "phoneme"), 0, 6, 2, cut)

    labels = np.array([5, 5, 7], np.int32)
    assert problem(14, labels) is None  # 5 frames for 3 labels and a blank
    assert problem(12, labels) is None
    assert problem(12, labels, 3) == (
        "12 bins give 3 frames at patches of 6 bins every 2, but CTC needs 4 for its 3 labels"
    )
    assert problem(12, None) == "it has no labels"


def test_what_only_the_trials_show_is_found_without_packages_of_others(manifest, tmp_path):
    """The launcher has boto3 and pyyaml alone."""
    (tmp_path / "manifest").write_bytes(manifest.to_bytes())
    program = """
import sys
from pathlib import Path
sys.modules.update(dict.fromkeys(["numpy", "h5py", "torch", "s3fs", "fsspec", "obstore"]))
from brain_to_text.config_reader import load_config
from brain_to_text.dataset.manifest import TrialManifest
from brain_to_text.dataset.selection import against_config
manifest = TrialManifest.from_bytes(Path(sys.argv[1]).read_bytes(), "data")
settings = {"n_classes": 1681, "batch_size": 4, "days_per_batch": 2}
for finding in against_config(manifest, load_config(None, settings)):
    print(finding.kind, finding)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "manifest")]
    path = {"PYTHONPATH": str(Path(brain_to_text.__file__).parents[1])}
    said = subprocess.run(command, env=path, capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"data Trial .*:trial_.* bins give .* frames at .*\n", said), said
