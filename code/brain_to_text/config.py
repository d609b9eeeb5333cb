"""Typed training configuration: YAML in, dataclasses out, every wrong key or value a clear error.

Key names are the mission's and the public baseline's (its `rnn_args.yaml` loads unchanged); keys
that exist only here are marked with `added=True`. Defaults are the public baseline's recipe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import itertools
import logging
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from .errors import ConfigError

log = logging.getLogger("brain_to_text")

# Keys of earlier trainers that mean nothing here: accepted, so that existing files load, and named.
LEGACY_KEYS = {
    "gpu_number": "SageMaker decides which GPU a process gets",
    "mode": "this program only trains; evaluate_model.py evaluates",
    "output_dir": "use --output-data-dir",
    "checkpoint_dir": "use --checkpoint-dir",
    "save_val_data": "the validation data is the dataset itself",
    "dataset.dataset_dir": "use --s3-bucket and --s3-data-prefix, or --data-dir",
    "dataset.gpu_cache_gb": "trials are kept in RAM (dataset.cache_gb)",
    "dataset.loader_shuffle": "batches are drawn at random by (seed, step)",
    "dataset.test_percentage": "the split is given by the files' names",
}


def key(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    added: bool = False,
    free_on_resume: bool = False,
) -> Any:
    """A dataclass field that carries what users may write there, and why they would.

    Args:
        default: the value when the key is absent; lists and dicts are copied per instance.
        help: one line for the configuration table of the guide.
        minimum, maximum: inclusive limits for numbers.
        added: True for keys that the public baseline does not have.
        free_on_resume: True for keys that change how fast or how talkative a run is, never what it
            computes: they may differ between the job that stopped and the one that resumes.
    """
    metadata = {
        "help": help,
        "minimum": minimum,
        "maximum": maximum,
        "added": added,
        "free_on_resume": free_on_resume,
    }
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class InputNetworkConfig:
    n_input_layers: int = key(1, "day layers per session; only 1 exists", minimum=1, maximum=1)
    input_layer_sizes: list[int] = key([512], "width of the day layer; equals neural_dim")
    input_trainable: bool = key(True, "train the day layers")
    input_layer_dropout: float = key(0.2, "dropout after the day layer", minimum=0, maximum=0.99)


@dataclass
class ModelConfig:
    n_input_features: int = key(512, "features per 20 ms bin", minimum=1)
    n_units: int = key(768, "units per GRU layer", minimum=1)
    rnn_dropout: float = key(0.4, "dropout between GRU layers", minimum=0, maximum=0.99)
    rnn_trainable: bool = key(True, "train the GRU")
    n_layers: int = key(5, "GRU layers", minimum=1)
    patch_size: int = key(14, "bins concatenated into one GRU input", minimum=1)
    patch_stride: int = key(4, "bins between two GRU inputs", minimum=1)
    bidirectional: bool = key(False, "read each trial both ways (offline use only)", added=True)
    classifier: Literal["factored", "plain"] = key(
        "plain", "factored: diphone classes share their phonemes' weights in training", added=True
    )
    input_network: InputNetworkConfig = field(default_factory=InputNetworkConfig)


@dataclass
class DataTransformsConfig:
    white_noise_std: float = key(1.0, "std of noise added to every bin and channel", minimum=0)
    constant_offset_std: float = key(0.2, "std of an offset per trial and channel", minimum=0)
    random_walk_std: float = key(0.0, "kept for old files; only 0 is supported", minimum=0)
    random_walk_axis: int = key(-1, "kept for old files")
    static_gain_std: float = key(0.0, "std of a random channel mixing per trial", minimum=0)
    random_cut: int = key(3, "cut 0 … random_cut-1 leading bins per trial", minimum=0)
    smooth_data: bool = key(True, "smooth over time with a Gaussian")
    smooth_kernel_size: int = key(100, "bins the Gaussian is evaluated on", minimum=1)
    smooth_kernel_std: float = key(2.0, "std of the Gaussian in bins", minimum=1e-3)
    time_mask_share: float = key(
        0.0,
        "share of each trial set to zero in contiguous spans",
        minimum=0,
        maximum=0.9,
        added=True,
    )
    time_mask_max_bins: int = key(40, "longest masked span in bins", minimum=1, added=True)


@dataclass
class DatasetConfig:
    neural_dim: int = key(512, "features per bin in the files", minimum=1)
    batch_size: int = key(64, "trials per step, over all ranks", minimum=1)
    n_classes: Literal[41, 1681] = key(41, "41 phonemes or 1681 diphones, blank included")
    max_seq_elements: int = key(500, "longest label sequence", minimum=1)
    days_per_batch: int = key(4, "sessions drawn per batch", minimum=1)
    seed: int = key(1, "seed of the batch plan", minimum=0)
    num_dataloader_workers: int = key(
        4, "threads that prepare batches", minimum=1, maximum=64, free_on_resume=True
    )
    must_include_days: list[int] | None = key(None, "session indices that every batch contains")
    feature_subset: list[int] | None = key(None, "features to use, by index")
    bad_trials_dict: dict[str, Any] | None = key(
        None, "trials to leave out: session -> block number -> trial numbers"
    )
    sessions: list[str] | None = key(None, "sessions in day-layer order; null: all, sorted")
    dataset_probability_val: list[float] | None = key(
        None, "per session: 0 leaves it out of validation; null: all that have validation data"
    )
    on_damaged_trial: Literal["stop", "exclude"] = key(
        "stop", "what to do about trials found damaged at start", added=True
    )
    max_concurrent_reads: int = key(
        48, "S3 requests in flight", minimum=1, maximum=256, added=True, free_on_resume=True
    )
    cache_gb: float | Literal["auto"] = key(
        "auto",
        "RAM for trials already read, GB; 0 turns it off",
        minimum=0,
        added=True,
        free_on_resume=True,
    )
    cache_dtype: Literal["stored", "float16"] = key(
        "stored", "precision of cached trials", added=True
    )
    prefetch_batches: int = key(
        4, "batches prepared ahead", minimum=1, added=True, free_on_resume=True
    )
    prefetch_mb: float = key(
        2048.0, "RAM for batches prepared ahead, MB", minimum=1, added=True, free_on_resume=True
    )
    read_timeout_seconds: float = key(
        10.0, "silence before a read is retried", minimum=0.1, added=True, free_on_resume=True
    )
    retry_budget_seconds: float = key(
        120.0,
        "time spent on one trial before the run stops",
        minimum=0,
        added=True,
        free_on_resume=True,
    )
    data_transforms: DataTransformsConfig = field(default_factory=DataTransformsConfig)


@dataclass
class ObjectiveConfig:
    """Loss = weight x phoneme CTC + (1 - weight) x diphone CTC."""

    phoneme_weight: float = key(
        0.0, "fixed weight of the phoneme term (diphone sets)", minimum=0, maximum=1, added=True
    )
    ctc_kernel: Literal["auto", "torch", "triton"] = key(
        "auto",
        "CTC on GPUs; auto: ours in Triton, which never makes the host wait, where it agrees with "
        "torch's on that GPU; triton: the same, and an error where it does not",
        added=True,
    )
    schedule: list[list[float]] | None = key(
        None,
        "weight of the phoneme term by step: [[step, or share of the run up to 1, weight], ...], "
        "linear in between",
        added=True,
    )

    def phoneme_weights(self, n_steps: int) -> list[tuple[float, float]]:
        """The (step, weight) points between which the weight is linear, in a run of `n_steps`."""
        if self.schedule is None:
            return [(0.0, self.phoneme_weight)]
        return [(at * n_steps if at <= 1 else at, weight) for at, weight in self.schedule]


@dataclass
class TrainingConfig:
    """Everything that decides what a run computes; written resolved to `checkpoint/args.yaml`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    use_amp: bool = key(True, "mixed precision on GPUs")
    amp_dtype: Literal["auto", "bfloat16", "float16"] = key(
        "auto", "mixed-precision type; auto: bfloat16 where the GPU has it", added=True
    )
    allow_tf32: bool = key(True, "TF32 for float32 matrix products on GPUs", added=True)
    compile: Literal["auto", "true", "false"] = key(
        "auto", "torch.compile of elementwise parts; auto: on GPUs", added=True
    )

    gradient_compression: Literal["none", "bfloat16"] = key(
        "none", "type in which gradients travel between processes", added=True
    )

    init_from_checkpoint: bool = key(False, "start from init_checkpoint_path's weights")
    init_checkpoint_path: str | None = key(None, "file, folder, model.tar.gz or s3:// URL")
    save_best_checkpoint: bool = key(True, "keep the best model by validation error rate")
    save_all_val_steps: bool = key(False, "keep a model at every validation", free_on_resume=True)
    save_final_model: bool = key(False, "keep the last model too", free_on_resume=True)
    save_val_metrics: bool = key(True, "write val_metrics.pkl", free_on_resume=True)
    save_val_logits: bool = key(
        False, "write the best validation's logits to the output folder", free_on_resume=True
    )
    early_stopping: bool = key(False, "stop when validation no longer improves")
    early_stopping_val_steps: int = key(20, "validations without improvement", minimum=1)

    num_training_batches: int = key(120000, "training steps", minimum=1)
    lr_scheduler_type: Literal["cosine", "linear"] = key("cosine", "shape of the decay")
    lr_max: float = key(0.005, "peak learning rate", minimum=0)
    lr_min: float = key(0.0001, "final learning rate", minimum=0)
    lr_decay_steps: int | None = key(None, "last step of the decay; null: the last step", minimum=1)
    lr_warmup_steps: int = key(1000, "steps of linear warm-up", minimum=0)
    lr_max_day: float = key(0.005, "peak learning rate of the day layers", minimum=0)
    lr_min_day: float = key(0.0001, "final learning rate of the day layers", minimum=0)
    lr_decay_steps_day: int | None = key(None, "as lr_decay_steps, day layers", minimum=1)
    lr_warmup_steps_day: int = key(1000, "as lr_warmup_steps, day layers", minimum=0)
    beta0: float = key(0.9, "AdamW beta 1", minimum=0, maximum=0.999999)
    beta1: float = key(0.999, "AdamW beta 2", minimum=0, maximum=0.999999)
    epsilon: float = key(0.1, "AdamW epsilon; belongs together with lr_max", minimum=1e-12)
    weight_decay: float = key(0.001, "weight decay of weights and h0", minimum=0)
    weight_decay_day: float = key(0.0, "weight decay of the day layers", minimum=0)
    grad_norm_clip_value: float = key(10.0, "gradient norm clip; 0 turns it off", minimum=0)
    seed: int = key(10, "seed of weights, dropout and augmentation", minimum=0)
    ema_decay: float = key(
        0.0,
        "decay of averaged weights used for validation; 0: off",
        minimum=0,
        maximum=0.999999,
        added=True,
    )

    batches_per_train_log: int = key(
        200, "steps between two log lines", minimum=1, free_on_resume=True
    )
    batches_per_val_step: int = key(2000, "steps between two validations", minimum=1)
    batches_per_save: int = key(
        0, "steps between two checkpoints; 0: by time only", minimum=0, free_on_resume=True
    )
    log_individual_day_val_PER: bool = key(True, "log validation per session", free_on_resume=True)  # noqa: N815
    log_val_skip_logs: bool = key(
        False, "log the sessions left out of validation", free_on_resume=True
    )
    checkpoint_interval_seconds: float = key(
        600.0, "time between two checkpoints", minimum=0, added=True, free_on_resume=True
    )
    keep_checkpoints: int = key(
        2, "resume checkpoints kept", minimum=1, added=True, free_on_resume=True
    )
    non_finite_patience: int = key(
        10, "refused non-finite updates in a row before the run stops", minimum=1, added=True
    )
    try_largest_batches_first: Literal["auto", "true", "false"] = key(
        "auto",
        "find out-of-memory at once; auto: for runs of an hour or more on a GPU",
        added=True,
        free_on_resume=True,
    )

    def to_dict(self) -> dict[str, Any]:
        """This configuration as plain types, in the order of its definition."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """YAML text that `load_config` reads back to an equal configuration."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @property
    def primary_metric(self) -> Literal["DER", "PER"]:
        """The validation error rate that selects the best model."""
        return "DER" if self.dataset.n_classes == 1681 else "PER"


def load_config(
    path: str | Path | None = None, overrides: Mapping[str, Any] | None = None
) -> TrainingConfig:
    """Read a YAML file, apply overrides by (dotted) key, check everything.

    Args:
        path: YAML file; None for the defaults.
        overrides: values by dotted path ("model.n_units") or by a last part that is unambiguous
            ("n_units", "batch-size"); text values are read as YAML.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type, value out of range, or a combination
            that cannot work; names the key, the value, what is allowed and the nearest valid key.
    """
    document: Any = {}
    if path is not None:
        try:
            document = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ConfigError(
                f"Config file {path} cannot be read ({error.strerror}): "
                "give an existing YAML file with --config-file."
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"Config file {path} is not valid YAML: {reason}.") from error
    if not isinstance(document, dict):
        raise ConfigError(f"Config file {path} must hold keys and values, not {_kind(document)}.")
    for name, value in (overrides or {}).items():
        _set_path(document, resolve_key(name), value)
    return config_from_dict(document, f" in {Path(path).name}" if path is not None else "")


def config_from_dict(document: Mapping[str, Any], source: str = "") -> TrainingConfig:
    """A checked configuration from nested plain types.

    Args:
        document: keys as in the YAML files; absent keys take their defaults.
        source: " in FILE" for error messages, or empty.

    Raises:
        ConfigError: as `load_config`.
    """
    legacy: list[str] = []
    config = _build(TrainingConfig, document, "", source, legacy)
    if legacy:
        named = "; ".join(f"{name} ({LEGACY_KEYS[name]})" for name in legacy)
        log.warning("Ignored settings that have no effect here: %s", named)
    check_combinations(config)
    return config


def config_keys(cls: type = TrainingConfig, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every leaf key as (dotted path, type, dataclass field), in order of definition."""
    hints = typing.get_type_hints(cls)
    for entry in dataclasses.fields(cls):
        hint = hints[entry.name]
        nested = _dataclass_in(hint)
        if nested is not None:
            yield from config_keys(nested, f"{prefix}{entry.name}.")
        if nested is None or hint is not nested:
            yield f"{prefix}{entry.name}", hint, entry


def resolve_key(name: str) -> str:
    """The dotted path that a command-line or hyperparameter name means.

    Raises:
        ConfigError: no key has that name, or several do.
    """
    wanted = name.replace("-", "_")
    paths = [path for path, _, _ in config_keys()]
    if wanted in paths or wanted in LEGACY_KEYS:
        return wanted
    matches = [path for path in paths if path.rsplit(".", 1)[-1] == wanted]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ConfigError(f"Setting '{name}' is ambiguous: write one of {', '.join(matches)}.")
    raise ConfigError(f"Unknown setting '{name}'.{_nearest(wanted, paths)}")


def differences(before: TrainingConfig, after: TrainingConfig) -> list[str]:
    """One line per key whose value differs: 'key: old -> new'."""
    old, new = dict(_leaves(before.to_dict())), dict(_leaves(after.to_dict()))
    return [
        f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def check_combinations(config: TrainingConfig) -> None:
    """Raise ConfigError for values that are fine alone and impossible together."""
    model, dataset, transforms = config.model, config.dataset, config.dataset.data_transforms
    used = dataset.neural_dim if dataset.feature_subset is None else len(dataset.feature_subset)
    if model.n_input_features != used:
        raise ConfigError(
            f"model.n_input_features is {model.n_input_features} but the dataset gives {used} "
            "(dataset.neural_dim, or the length of dataset.feature_subset): make them equal."
        )
    if model.input_network.input_layer_sizes != [model.n_input_features]:
        raise ConfigError(
            f"model.input_network.input_layer_sizes is {model.input_network.input_layer_sizes} "
            f"but the day layer is square: write [{model.n_input_features}]."
        )
    if dataset.feature_subset is not None:
        bad = [f for f in dataset.feature_subset if not 0 <= f < dataset.neural_dim]
        if bad or len(set(dataset.feature_subset)) != len(dataset.feature_subset) or not used:
            raise ConfigError(
                "dataset.feature_subset must list distinct indices from 0 to "
                f"{dataset.neural_dim - 1}{f'; {bad[0]} is outside' if bad else ''}."
            )
    if dataset.days_per_batch > dataset.batch_size:
        raise ConfigError(
            f"dataset.days_per_batch ({dataset.days_per_batch}) exceeds dataset.batch_size "
            f"({dataset.batch_size}): every session drawn must give at least one trial."
        )
    if dataset.must_include_days and len(dataset.must_include_days) > dataset.days_per_batch:
        raise ConfigError(
            f"dataset.must_include_days lists {len(dataset.must_include_days)} sessions but a "
            f"batch has dataset.days_per_batch = {dataset.days_per_batch}."
        )
    if dataset.sessions is not None:
        repeated = sorted({s for s in dataset.sessions if dataset.sessions.count(s) > 1})
        if repeated:
            raise ConfigError(f"dataset.sessions lists {repeated[0]} more than once: list it once.")
        if not dataset.sessions:
            raise ConfigError("dataset.sessions is empty: list sessions, or null for all.")
        val = dataset.dataset_probability_val
        if val is not None and len(val) != len(dataset.sessions):
            raise ConfigError(
                f"dataset.dataset_probability_val has {len(val)} entries for "
                f"{len(dataset.sessions)} sessions: give one per session, or null."
            )
    elif dataset.dataset_probability_val is not None:
        raise ConfigError("dataset.dataset_probability_val needs dataset.sessions listed too.")
    if transforms.random_walk_std != 0:
        raise ConfigError(
            f"dataset.data_transforms.random_walk_std is {transforms.random_walk_std} but only 0 "
            "is supported: the public recipe does not use it."
        )
    for suffix in ("", "_day"):
        low, high = getattr(config, f"lr_min{suffix}"), getattr(config, f"lr_max{suffix}")
        if low > high:
            raise ConfigError(f"lr_min{suffix} ({low}) exceeds lr_max{suffix} ({high}).")
    weighted = config.objective.phoneme_weight > 0 or config.objective.schedule is not None
    if weighted and dataset.n_classes != 1681:
        raise ConfigError(
            "objective.phoneme_weight and objective.schedule need dataset.n_classes 1681: "
            "with 41 classes the phoneme loss is the only one."
        )
    if config.objective.phoneme_weight > 0 and config.objective.schedule is not None:
        raise ConfigError("Give objective.phoneme_weight or objective.schedule, not both.")
    _check_schedule(config.objective, config.num_training_batches)
    if config.init_from_checkpoint and not config.init_checkpoint_path:
        raise ConfigError("init_from_checkpoint is true but init_checkpoint_path is not given.")


def _check_schedule(objective: ObjectiveConfig, n_steps: int) -> None:
    if objective.schedule is None:
        return
    example = "write it like [[0.3, 1.0], [0.7, 0.4]]"
    pairs = all(len(point) == 2 for point in objective.schedule)
    if not objective.schedule or not pairs:
        raise ConfigError(
            f"objective.schedule is {objective.schedule} but must list pairs of a step (or a share "
            f"of the run, up to 1) and a weight: {example}."
        )
    for at, weight in objective.schedule:
        if not (math.isfinite(at) and at >= 0 and 0 <= weight <= 1):
            raise ConfigError(
                f"objective.schedule has [{at:g}, {weight:g}] but a step is at least 0 and a "
                f"weight from 0 to 1: {example}."
            )
    steps = [step for step, _ in objective.phoneme_weights(n_steps)]
    for before, after in itertools.pairwise(steps):
        if after <= before:
            raise ConfigError(
                f"objective.schedule goes from step {before:g} to step {after:g} (of "
                f"num_training_batches = {n_steps}): list its steps in ascending order."
            )


def _schedule_as_list(value: Any) -> Any:
    """`objective.schedule` with the older {start, end, step_size, interval} as a list of points."""
    if isinstance(value, str):
        with contextlib.suppress(yaml.YAMLError):
            value = yaml.safe_load(value)
    if not isinstance(value, Mapping):
        return value
    old = {"start": 0.0, "end": 0.6, "step_size": 0.1, "interval": 10000} | dict(value)
    try:
        start, end, size, interval = (float(v) for v in old.values())
        changes = math.ceil(round((end - start) / size, 9))
        points = [[0.0, start], [changes * interval, end]] if changes > 0 else [[0.0, start]]
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"objective.schedule is {dict(value)} but must list pairs of a step (or a share of the "
            "run, up to 1) and a weight: write it like [[0.3, 1.0], [0.7, 0.4]]."
        ) from error
    log.warning(
        "objective.schedule is a list of [step, weight] now, linear in between: %s is read as %s",
        dict(value),
        points,
    )
    return points


# --- from plain YAML types to dataclasses ---------------------------------------------------------


def _build(cls: Any, document: Any, prefix: str, source: str, legacy: list[str]) -> Any:
    if isinstance(document, str):  # an override: --objective.schedule '{start: 0, end: 0.6}'
        with contextlib.suppress(yaml.YAMLError):
            document = yaml.safe_load(document)
    if not isinstance(document, Mapping):
        raise ConfigError(
            f"Setting '{prefix.rstrip('.')}'{source} must be a mapping of keys, "
            f"not {document!r} ({_kind(document)})."
        )
    hints = typing.get_type_hints(cls)
    entries = {entry.name: entry for entry in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for name, value in document.items():
        path = f"{prefix}{name}"
        if path in LEGACY_KEYS:
            legacy.append(path)
            continue
        if name not in entries:
            everything = [known for known, _, _ in config_keys()]
            raise ConfigError(f"Unknown setting '{path}'{source}.{_nearest(path, everything)}")
        if path == "objective.schedule":
            value = _schedule_as_list(value)
        hint, nested = hints[name], _dataclass_in(hints[name])
        if nested is not None and (value is not None or hint is nested):
            values[name] = _build(nested, value, f"{path}.", source, legacy)
        else:
            values[name] = _coerce(value, hint, entries[name].metadata, path, source)
    return cls(**values)


def _coerce(value: Any, hint: Any, limits: Mapping[str, Any], path: str, source: str) -> Any:
    """`value` as the type `hint`, or a ConfigError that says what is allowed."""
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    if isinstance(value, str) and value.strip().lower() in ("none", "null", "~", ""):
        value = None if type(None) in options else value
    for option in options:
        converted, ok = _convert(value, option)
        if ok:
            _check_limits(converted, limits, path, source)
            return converted
    raise ConfigError(
        f"Setting '{path}'{source} is {value!r} ({_kind(value)}) but must be {_describe(hint)}."
    )


def _convert(value: Any, option: Any) -> tuple[Any, bool]:
    origin = typing.get_origin(option)
    if option is type(None):
        return None, value is None
    if origin is Literal:
        for choice in typing.get_args(option):
            same_type = isinstance(value, bool) == isinstance(choice, bool)
            if (value == choice and same_type) or str(value).lower() == str(choice).lower():
                return choice, True
        return None, False
    if isinstance(value, str) and option is not str:
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            return None, False
        if isinstance(value, str) and option is float and re.fullmatch(r"[-+.\deE]+", value):
            try:
                value = float(value)  # YAML 1.1 reads 1e-3 as text
            except ValueError:
                return None, False
    if option is bool:
        return value, isinstance(value, bool)
    if option is int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # hyperparameters arrive as JSON numbers
        return value, isinstance(value, int) and not isinstance(value, bool)
    if option is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return (float(value), True) if number else (None, False)
    if option is str:
        return value, isinstance(value, str)
    if origin is list:
        (item,) = typing.get_args(option)
        if not isinstance(value, (list, tuple)):
            return None, False
        items = [_convert(v, item) for v in value]
        return [v for v, _ in items], all(ok for _, ok in items)
    if origin is dict:
        return value, isinstance(value, dict)
    return value, option is Any


def _check_limits(value: Any, limits: Mapping[str, Any], path: str, source: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    low, high = limits.get("minimum"), limits.get("maximum")
    if not math.isfinite(value):
        raise ConfigError(f"Setting '{path}'{source} is {value} but must be a finite number.")
    if (low is not None and value < low) or (high is not None and value > high):
        if low is not None and high is not None:
            allowed = f"from {low:g} to {high:g}"
        else:
            allowed = f"at least {low:g}" if low is not None else f"at most {high:g}"
        raise ConfigError(f"Setting '{path}'{source} is {value:g} but must be {allowed}.")


def _set_path(document: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        existing = document.get(parent)
        if not isinstance(existing, dict):
            existing = document[parent] = {}
        document = existing
    document[last] = value


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and f"{prefix}{name}" != "dataset.bad_trials_dict":
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _dataclass_in(hint: Any) -> Any | None:
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def _describe(hint: Any) -> str:
    if _is_union(hint):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if hint is type(None):
        return "null"
    origin = typing.get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(hint))
    if origin is list:
        return f"a list of {_describe(typing.get_args(hint)[0])}s"
    if origin is dict:
        return "a mapping"
    names = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    article = "" if hint in (bool, str) else "a "
    return article + names.get(hint, getattr(hint, "__name__", str(hint)))


def _kind(value: Any) -> str:
    names = {int: "number", float: "number", bool: "true/false", str: "text", list: "list"}
    return "null" if value is None else names.get(type(value), "mapping")


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:
        leaf = {path.rsplit(".", 1)[-1]: path for path in known}
        match = difflib.get_close_matches(name.rsplit(".", 1)[-1], leaf, n=1, cutoff=0.6)
        close = [leaf[match[0]]] if match else []
    return f" Did you mean '{close[0]}'?" if close else " See README_SAGEMAKER.md, Configuration."
