"""The training configuration as typed dataclasses.

Key names are the mission's and the public baseline's, defaults the baseline's recipe;
`config_reader` makes a configuration of YAML and of overrides, `config_checks` looks at the whole.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

PUBLIC_WIDTH = 512  # 2 features of 256 electrodes
INT_LIMIT = 2**31 - 1
SEED_LIMIT = 2**32 - 1  # what numpy's seed takes


def key(
    default: Any,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    *,
    free_on_resume: bool = False,
) -> Any:
    """A dataclass field that carries what users may write there, and why they would.

    Args:
        default: the value when the key is absent; lists and dicts are copied per instance.
        help: one line for the configuration table of the guide.
        minimum, maximum: inclusive limits for numbers.
        free_on_resume: True where the value changes how fast or how talkative a run is, never what
            it computes: it may differ between the job that stopped and the one that resumes.
    """
    metadata = {
        "help": help,
        "minimum": minimum,
        "maximum": maximum,
        "free_on_resume": free_on_resume,
    }
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class InputNetworkConfig:
    input_layer_sizes: list[int] | None = key(None, "[width of the day layer]; null: the data's")
    input_trainable: bool = key(True, "train the day layers")
    input_layer_dropout: float = key(0.2, "dropout after the day layer", 0, 0.99)


@dataclass
class ModelConfig:
    n_input_features: int | None = key(
        None, "features per 20 ms bin that are used; null: the data's", 1
    )
    n_units: int = key(768, "units per GRU layer", 1)
    rnn_dropout: float = key(0.4, "dropout between GRU layers", 0, 0.99)
    rnn_trainable: bool = key(True, "train the GRU")
    n_layers: int = key(5, "GRU layers", 1)
    patch_size: int = key(14, "bins concatenated into one GRU input", 1)
    patch_stride: int = key(4, "bins between two GRU inputs", 1)
    bidirectional: bool = key(False, "read each trial both ways (offline use only)")
    classifier: Literal["factored", "plain"] = key(
        "plain", "factored: diphone classes share their phonemes' weights in training"
    )
    input_network: InputNetworkConfig = field(default_factory=InputNetworkConfig)


@dataclass
class DataTransformsConfig:
    white_noise_std: float = key(1.0, "std of noise added to every bin and channel", 0)
    constant_offset_std: float = key(0.2, "std of an offset per trial and channel", 0)
    static_gain_std: float = key(0.0, "std of a random channel mixing per trial", 0)
    random_cut: int = key(3, "cut 0 … random_cut-1 leading bins per trial", 0)
    smooth_data: bool = key(True, "smooth over time with a Gaussian")
    smooth_kernel_size: int = key(100, "bins the Gaussian is evaluated on", 1, 100_000)
    smooth_kernel_std: float = key(2.0, "std of the Gaussian in bins", 1e-3)
    time_mask_share: float = key(0.0, "share of each trial set to zero in contiguous spans", 0, 0.9)
    time_mask_max_bins: int = key(40, "longest masked span in bins", 1)
    channel_mask_share: float = key(0.0, "share of channels set to zero, drawn per trial", 0, 0.9)


@dataclass
class DatasetConfig:
    neural_dim: int | None = key(None, "features per bin in the files; null: the data's", 1)
    batch_size: int = key(64, "trials per step, over all ranks", 1)
    n_classes: Literal[41, 1681] = key(41, "41 phonemes or 1681 diphones, blank included")
    max_seq_elements: int = key(500, "longest label sequence", 1)
    days_per_batch: int = key(4, "sessions drawn per batch", 1)
    length_groups: int = key(1, "parts by length of which a batch is drawn from one", 1, 16)
    seed: int = key(1, "seed of the batch plan", 0, SEED_LIMIT)
    num_dataloader_workers: int = key(4, "threads that prepare batches", 1, 64, free_on_resume=True)
    must_include_days: list[int] | None = key(
        None, "sessions (by position; -1: the last) that every batch contains"
    )
    feature_subset: list[int] | None = key(None, "features to use, by index")
    bad_trials_dict: dict[str, dict[int, list[int]]] | None = key(
        None, "trials to leave out: session -> block number -> trial numbers"
    )
    sessions: list[str] | None = key(None, "sessions in day-layer order; null: all, sorted")
    dataset_probability_val: list[float] | None = key(
        None, "per session: 0 leaves it out of validation; null: all that have validation data"
    )
    on_damaged_trial: Literal["stop", "exclude"] = key(
        "stop", "what to do about trials found damaged at start"
    )
    max_concurrent_reads: int = key(48, "S3 requests in flight", 1, 256, free_on_resume=True)
    cache_gb: float | Literal["auto"] = key(
        "auto", "RAM for trials already read, GB; 0 turns it off", 0, 1e6, free_on_resume=True
    )
    prefetch_batches: int = key(4, "batches prepared ahead", 1, free_on_resume=True)
    prefetch_mb: float = key(
        2048.0, "RAM for batches prepared ahead, MB", 1, 1e6, free_on_resume=True
    )
    read_timeout_seconds: float = key(
        10.0, "silence before a read is retried", 0.1, 3600, free_on_resume=True
    )
    retry_budget_seconds: float = key(
        120.0, "time spent on one trial before the run stops", 0, 86400, free_on_resume=True
    )
    data_transforms: DataTransformsConfig = field(default_factory=DataTransformsConfig)


@dataclass
class ObjectiveConfig:
    """Loss = weight x phoneme CTC + (1 - weight) x diphone CTC."""

    phoneme_weight: float = key(0.0, "fixed weight of the phoneme term (diphone sets)", 0, 1)
    ctc_kernel: Literal["auto", "torch"] = key(
        "auto",
        "CTC on GPUs; auto: ours in Triton, which never makes the host wait, where it agrees with "
        "torch's on that GPU",
    )
    schedule: list[list[float]] | None = key(
        None,
        "weight of the phoneme term by step: [[step, or share of the run up to 1, weight], ...], "
        "linear in between",
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
        "auto", "mixed-precision type; auto: bfloat16; float16 on any GPU without bfloat16 (T4)"
    )
    allow_tf32: bool = key(True, "TF32 for float32 matrix products on GPUs")

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
    early_stopping_val_steps: int = key(20, "validations without improvement", 1)

    num_training_batches: int = key(120000, "training steps", 1)
    lr_scheduler_type: Literal["cosine", "linear"] = key("cosine", "shape of the decay")
    lr_max: float = key(0.005, "peak learning rate", 0)
    lr_min: float = key(0.0001, "final learning rate", 0)
    lr_decay_steps: int | None = key(None, "last step of the decay; null: the last step", 1)
    lr_warmup_steps: int = key(1000, "steps of linear warm-up", 0)
    lr_max_day: float = key(0.005, "peak learning rate of the day layers", 0)
    lr_min_day: float = key(0.0001, "final learning rate of the day layers", 0)
    lr_decay_steps_day: int | None = key(None, "as lr_decay_steps, day layers", 1)
    lr_warmup_steps_day: int = key(1000, "as lr_warmup_steps, day layers", 0)
    beta0: float = key(0.9, "AdamW beta 1", 0, 0.999999)
    beta1: float = key(0.999, "AdamW beta 2", 0, 0.999999)
    epsilon: float = key(0.1, "AdamW epsilon; belongs together with lr_max", 1e-12)
    weight_decay: float = key(0.001, "weight decay of weights and h0", 0)
    weight_decay_day: float = key(0.0, "weight decay of the day layers", 0)
    grad_norm_clip_value: float = key(10.0, "gradient norm clip; 0 turns it off", 0)
    seed: int = key(10, "seed of weights, dropout and augmentation", 0, SEED_LIMIT)
    ema_decay: float = key(
        0.0, "decay of averaged weights used for validation; 0: off", 0, 0.999999
    )

    batches_per_train_log: int = key(200, "steps between two log lines", 1, free_on_resume=True)
    batches_per_val_step: int = key(2000, "steps between two validations", 1)
    batches_per_save: int = key(
        0, "steps between two checkpoints; 0: by time only", 0, free_on_resume=True
    )
    log_individual_day_val_PER: bool = key(  # noqa: N815
        True, "log validation per session", free_on_resume=True
    )
    log_val_skip_logs: bool = key(
        False, "log the sessions left out of validation", free_on_resume=True
    )
    checkpoint_interval_seconds: float = key(
        600.0, "time between two checkpoints", 0, free_on_resume=True
    )
    rank_timeout_seconds: float = key(
        300.0,
        "silence of one of several processes before the others end the run; at least twice "
        "dataset.retry_budget_seconds",
        1,
        86400,
        free_on_resume=True,
    )
    non_finite_patience: int = key(
        10, "refused non-finite updates in a row before the run stops", 1
    )
    try_largest_batches_first: Literal["auto", "true", "false"] = key(
        "auto",
        "find out-of-memory at once; auto: for runs of an hour or more on a GPU",
        free_on_resume=True,
    )

    @property
    def width(self) -> int:
        """Features per bin that the model takes; the public corpus's until the data was seen."""
        return self.model.n_input_features or PUBLIC_WIDTH

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


def config_keys(cls: type = TrainingConfig, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every leaf key as (dotted path, type, dataclass field), in order of definition."""
    hints = hints_of(cls)
    for entry in dataclasses.fields(cls):
        hint = hints[entry.name]
        if dataclasses.is_dataclass(hint):
            yield from config_keys(hint, f"{prefix}{entry.name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{entry.name}", hint, entry


def free_on_resume() -> set[str]:
    """Dotted paths of the keys that may change when a run resumes."""
    return {path for path, _, entry in config_keys() if entry.metadata["free_on_resume"]}


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """The types of a section's fields, by name."""
    return typing.get_type_hints(cls)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every key in a configuration as nested dicts."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and f"{prefix}{name}" != "dataset.bad_trials_dict":
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(old, new) of every key whose value differs between two configurations as nested dicts."""
    old, new = dict(leaves(before)), dict(leaves(after))
    return {
        name: (old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    }
