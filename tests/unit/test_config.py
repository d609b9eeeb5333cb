"""The configuration: files load, overrides apply, every mistake is named."""

import contextlib
import re
from pathlib import Path

import pytest
import yaml
from brain_to_text.config import TrainingConfig, changed, config_keys
from brain_to_text.config_reader import (
    LEGACY_KEYS,
    config_from_dict,
    load_config,
    resolve_key,
    split_overrides,
)
from brain_to_text.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st

CODE = Path(__file__).parents[2] / "code"
SHIPPED = sorted(CODE.glob("rnn_args_*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configs_load_and_survive_a_round_trip(path, tmp_path):
    config = load_config(path)
    copy = tmp_path / "args.yaml"
    copy.write_text(config.to_yaml())
    assert load_config(copy) == config


def test_the_diphone_file_is_the_missions_table_and_the_phoneme_file_the_default_recipe():
    assert load_config(CODE / "rnn_args_phoneme_sagemaker.yaml") == TrainingConfig()
    config = load_config(CODE / "rnn_args_diphone_sagemaker.yaml")
    pairs = changed(TrainingConfig().to_dict(), config.to_dict())
    assert {name: new for name, (_, new) in pairs.items()} == {
        "batches_per_val_step": 1500,
        "dataset.batch_size": 48,
        "dataset.n_classes": 1681,
        "lr_max": 0.004,
        "model.classifier": "factored",
        "model.n_units": 1024,
        "model.rnn_dropout": 0.5,
        "num_training_batches": 150_000,
        "weight_decay": 0.002,
    }


def test_public_baseline_file_loads_with_one_warning(caplog, tmp_path):
    document = TrainingConfig().to_dict()
    document |= {"gpu_number": "1", "mode": "train", "output_dir": "x", "checkpoint_dir": "x/c"}
    document |= {"save_val_data": False, "init_checkpoint_path": "None"}
    document["dataset"] |= {"dataset_dir": "d", "loader_shuffle": False, "test_percentage": 0.1}
    document["dataset"]["data_transforms"] |= {"random_walk_std": 0.0, "random_walk_axis": -1}
    document["model"] |= {"type": "GRU"}
    document["model"]["input_network"] |= {"n_input_layers": 1}
    document |= {"use_wandb": False, "use_composite_loss": False, "compile": "auto"}
    path = tmp_path / "rnn_args.yaml"
    path.write_text(yaml.safe_dump(document))
    with caplog.at_level("WARNING", logger="brain_to_text"):
        assert load_config(path) == TrainingConfig()
    assert len(caplog.records) == 1
    assert all(key in caplog.text for key in LEGACY_KEYS)


@pytest.mark.parametrize(
    ("name", "value", "path", "expected"),
    [
        ("batch-size", "32", "dataset.batch_size", 32),
        ("model.n_units", "768", "model.n_units", 768),
        ("num_training_batches", 1000.0, "num_training_batches", 1000),
        ("lr_max", "1e-3", "lr_max", 1e-3),
        ("early_stopping", "True", "early_stopping", True),
        ("dataset.sessions", '["a", "b"]', "dataset.sessions", ["a", "b"]),
        ("seed", "3", "seed", 3),
        ("cache_gb", "auto", "dataset.cache_gb", "auto"),
        ("cache_gb", "2.5", "dataset.cache_gb", 2.5),
        ("schedule", "[[0.3, 1]]", "objective.schedule", [[0.3, 1.0]]),
    ],
)
def test_overrides_take_dotted_or_short_names_and_text_values(name, value, path, expected):
    config = load_config(None, {"n_classes": 1681, name: value})
    for part in path.split("."):
        config = getattr(config, part)
    assert config == expected and type(config) is type(expected)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"n_unit": 1}, ["Unknown setting 'n_unit'", "model.n_units"]),
        ({"use_composite_loss": True}, ["objective.phoneme_weight", "objective.schedule"]),
        ({"batch_size": 2, "dataset.batch_size": 3}, ["dataset.batch_size", "given twice"]),
        ({"seed": 2**32}, ["seed", "4294967296", "from 0 to 4294967295"]),
        ({"lr_max": "9" * 400}, ["lr_max", "must be a number"]),
        ({"n_units": 2**31}, ["model.n_units", "2147483647"]),
        ({"bad_trials_dict": "{t15: {x: [1]}}"}, ["bad_trials_dict", "block numbers"]),
        ({"model": 5, "model.n_units": 4}, ["Unknown setting 'model'"]),
        ({"seed": 1.5}, ["seed", "1.5", "whole number"]),
        ({"use_amp": "perhaps"}, ["use_amp", "perhaps", "true or false"]),
        ({"model.n_layers": 0}, ["model.n_layers", "at least 1"]),
        ({"rnn_dropout": 1.5}, ["model.rnn_dropout", "from 0 to 0.99"]),
        ({"lr_max": ".inf"}, ["lr_max", "finite"]),
        ({"lr_scheduler_type": "step"}, ["lr_scheduler_type", "cosine, linear"]),
        ({"sessions": "[a, a]"}, ["lists a more than once"]),
        ({"sessions": "[]"}, ["dataset.sessions is empty"]),
        ({"sessions": "[a]", "dataset_probability_val": "[1, 1]"}, ["2 entries for 1 sessions"]),
        ({"dataset_probability_val": "[1]"}, ["needs dataset.sessions"]),
        ({"days_per_batch": 65}, ["days_per_batch", "batch_size"]),
        ({"must_include_days": "[0,1,2,3,4]"}, ["must_include_days", "days_per_batch"]),
        ({"neural_dim": 256, "n_input_features": 512}, ["n_input_features", "256", "null"]),
        ({"feature_subset": "[0, 1]", "n_input_features": 3}, ["n_input_features", "2"]),
        ({"feature_subset": "[0, 512]", "neural_dim": 512}, ["feature_subset", "512 is outside"]),
        ({"input_layer_sizes": "[256]", "neural_dim": 512}, ["input_layer_sizes", "[512]"]),
        ({"n_input_layers": 2}, ["n_input_layers", "only 1"]),
        ({"lr_min": 1}, ["lr_min", "exceeds lr_max"]),
        ({"phoneme_weight": 0.5}, ["objective.phoneme_weight", "1681"]),
        ({"objective.schedule.start": 0.5}, ["'objective.schedule.start'", "objective.schedule"]),
        ({"phoneme_weight": 0.5, "schedule": "[[0, 1]]", "n_classes": 1681}, ["not both"]),
        ({"schedule": "[]", "n_classes": 1681}, ["must list pairs", "[[0.3, 1.0], [0.7, 0.4]]"]),
        ({"schedule": "[0, 1]", "n_classes": 1681}, ["objective.schedule", "a list of"]),
        ({"schedule": "[[0, 1.5]]", "n_classes": 1681}, ["[0, 1.5]", "from 0 to 1"]),
        ({"schedule": "[[0.5, 1], [9, 0]]", "n_classes": 1681}, ["step 60000 to step 9"]),
        (
            {"schedule": "[[0, 1], [120001, 0]]", "n_classes": 1681},
            ["step 120001", "num_training_batches = 120000"],
        ),
        ({"model.type": "transformer"}, ["model.type", "only gru", "the model is a GRU"]),
        ({"init_from_checkpoint": True}, ["init_checkpoint_path"]),
        ({"n_units": 300_000}, ["model.n_units 300000", "GB for weights", "no GPU has more"]),
        ({"batch_size": 3_000_000}, ["dataset.batch_size 3000000", "GB, more than 64 GPUs"]),
        ({"sessions": "[20230811]"}, ["dataset.sessions", "in quotes where they look like"]),
        ({"bad_trials_dict": "{t15: {1: [1], '1': [2]}}"}, ["bad_trials_dict", "each once"]),
    ],
)
def test_each_mistake_is_one_sentence_that_names_key_and_value(overrides, words):
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"model: [", ["not valid YAML"]),
        (b"- a\n", ["must hold keys and values"]),
        (b"model: 5\n", ["'model'", "mapping of keys"]),
        (b"learning_rate: 5\n", ["Unknown setting 'learning_rate'"]),
        (b"model.n_units: 5\n", ["written nested: model: {n_units: ...}"]),
        (b"\xff\xfe\x00", ["not valid YAML"]),
        (b"seed: 1\nlr_max: 1\nseed: 2\n", ["'seed' stands on line 1 and again on line 3"]),
        (b"a: {1: x}\nb:\n  1: x\n  01: x\n", ["1 stands on line 3 and again on line 4"]),
        (b"a: &a [x, x]\nb: [*a, *a]\n", ["line 2 has an alias"]),
        (b"[" * 100_000, ["nested too deeply"]),
        (b"seed: " + b"9" * 5000, ["line 1 cannot be read"]),
        (b"seed: !!timestamp x\n", ["line 1 cannot be read"]),
        (b"# x\n" * 100_000, ["more than 256,000 bytes"]),
    ],
)
def test_a_bad_file_is_named(content, words, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert all(word in str(caught.value) for word in [*words, "mine.yaml"]), str(caught.value)


def test_a_missing_file_says_what_to_type():
    with pytest.raises(ConfigError, match="--config-file"):
        load_config("/nowhere/x.yaml")


def test_dates_are_text_and_exclusions_the_same_however_their_numbers_are_written():
    config = load_config(None, {"sessions": "[2023-08-11, 2023-08-13]"})
    assert config.dataset.sessions == ["2023-08-11", "2023-08-13"]
    for written in ("{t15: {1: [3, 4]}}", '{"t15": {"1": ["3", 4.0]}}'):
        config = load_config(None, {"bad_trials_dict": written})
        assert config.dataset.bad_trials_dict == {"t15": {1: [3, 4]}}


def test_options_are_pairs():
    assert split_overrides(["--seed", "-1", "--a.b=c=d", "--x", ""]) == {
        "seed": "-1",
        "a.b": "c=d",
        "x": "",
    }
    for words, said in (
        (["seed", "1"], "'seed' was not understood"),
        (["--seed"], "--seed needs a value"),
        (["--seed", "--lr_max", "1"], "--seed needs a value"),
        (["--seed", "1", "--seed", "2"], "--seed is given twice"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            split_overrides(words)


NASTY = [
    *("2024-01-01", "2024-13-45", "9" * 400, "-" + "9" * 5000, "1e400", ".nan", "-.inf", "0x10"),
    *("[", "[" * 100, "{a: {b: {c: {}}}}", "&a [*a]", "*a", "!!python/object:os.system x"),
    *("!!int x", "!!timestamp x", "!!bool 3", "!!binary '='", "!!set {a}", "!!omap [a]", "1:30"),
    *("~", "yes", "'", '"', "\x00", "\ufeff", "\ud800", "é", "? [a]", "{? [a] : 1}", "{<<: 3}"),
    *("- a", "a: b: c", "|", "%YAML 9", "@", "''", "true", "-1", "0", "1e3", "[1,2,[3]]", "{1: 2}"),
    *("{null: 1}", "{1.5: 2}", "{t15: {1: [0]}}", "{t15: {1: {2: 3}}}", "4294967296", "[.nan]"),
    *("[4294967296]", "1" + "0" * 30, "0x" + "f" * 6000),
]


def sentence_or_success(*arguments):
    try:
        load_config(*arguments)
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 600, str(error)


def test_no_value_escapes_as_another_error():
    one_of_each_type = {str(hint): path for path, hint, _ in config_keys()}
    for path in (*one_of_each_type.values(), *LEGACY_KEYS):
        for value in NASTY:
            sentence_or_success(None, {path: value})


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=5,
    )
)
def test_no_document_escapes_as_another_error(document):
    with contextlib.suppress(ConfigError):
        config_from_dict(document)


def test_every_key_has_help_and_resolves_to_itself():
    for path, _, entry in config_keys():
        if "help" in entry.metadata:
            assert entry.metadata["help"]
            assert resolve_key(path) == path
