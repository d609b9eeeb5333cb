"""YAML and overrides in, a typed configuration out; every wrong key or value is one clear sentence.

The way of a key: text (a YAML file, an option, a hyperparameter) -> plain YAML values, without
aliases, duplicates or depth -> the type its field in `config` names, within its limits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import logging
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from .config import INT_LIMIT, TrainingConfig, config_keys, hints_of
from .config_checks import check_combinations
from .errors import ConfigError, short_repr

log = logging.getLogger("brain_to_text")
MOST_BYTES = 256_000  # of a configuration file; a real one has 3,000
DEEPEST = 12  # lists and mappings inside each other; a real configuration has 5

# Keys that are accepted, so that existing files load, and have no effect: what to use instead, or
# why they mean nothing here.
LEGACY_KEYS = {
    "gpu_number": "SageMaker decides which GPU a process gets",
    "mode": "this program only trains; evaluate_model.py evaluates",
    "output_dir": "use --output-data-dir",
    "checkpoint_dir": "the trainer has --checkpoint-dir; a job keeps its states beside its outputs",
    "save_val_data": "the validation data is the dataset itself",
    "dataset.dataset_dir": "use --s3-bucket and --s3-data-prefix, or --data-dir",
    "dataset.loader_shuffle": "batches are drawn at random by (seed, step)",
    "dataset.test_percentage": "the split is given by the files' names",
    "model.input_network.n_input_layers": "there is one day layer per session",
    "dataset.data_transforms.random_walk_std": "the public recipe does not use a random walk",
    "dataset.data_transforms.random_walk_axis": "there is no random walk",
    "compile": "nothing is compiled",
    "use_wandb": "TensorBoard events are written always, MLflow with MLFLOW_TRACKING_URI",
    "use_composite_loss": "set objective.phoneme_weight, or objective.schedule",
    "model.type": "the model is a GRU",
}
# The one value under which that is true, where another would have changed the result.
LEGACY_VALUES = {
    "model.input_network.n_input_layers": 1,
    "dataset.data_transforms.random_walk_std": 0,
    "use_wandb": False,
    "use_composite_loss": False,
    "model.type": "gru",
}
SCHEMA_DEFAULTS = "defaults"  # as --config-file: no file, every key as the schema has it
# Keys of earlier code for the joint loss (use_composite_loss, alpha_schedule_start, ...).
_JOINT_LOSS = re.compile(r"(^|[._])(composite|alpha)(_|$)")


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
    document = {} if path is None else _read_file(Path(path))
    given: dict[str, str] = {}
    for name, value in (overrides or {}).items():
        full = resolve_key(name)
        if full in given:
            raise ConfigError(
                f"Setting '{full}' is given twice, as {given[full]} and as {name}: give it once."
            )
        given[full] = name
        _set_path(document, full, value)
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


def resolve_key(name: str) -> str:
    """The dotted path that a command-line or hyperparameter name means.

    Raises:
        ConfigError: no key has that name, or several do.
    """
    wanted = name.replace("-", "_")
    paths = [*(path for path, _, _ in config_keys()), *LEGACY_KEYS]
    if wanted in paths:
        return wanted
    matches = [path for path in paths if path.rsplit(".", 1)[-1] == wanted]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ConfigError(f"Setting '{name}' is ambiguous: write one of {', '.join(matches)}.")
    raise _unknown(name, "")


def split_overrides(words: Iterable[str]) -> dict[str, str]:
    """`--batch-size 32` and `--batch-size=32` as {key: value}; a value may begin with a minus.

    Raises:
        ConfigError: a word that is no option, an option without a value, or one given twice.
    """
    overrides: dict[str, str] = {}
    remaining = iter(words)
    for word in remaining:
        if not word.startswith("--") or len(word) < 3:
            raise ConfigError(
                f"Argument {short_repr(word)} was not understood: options are pairs, as "
                "--batch-size 32."
            )
        name, equals, value = word[2:].partition("=")
        if not equals:
            following = next(remaining, None)
            if following is None or following.startswith("--"):
                raise ConfigError(f"Option --{name} needs a value: write --{name} VALUE.")
            value = following
        if name in overrides:
            raise ConfigError(f"Option --{name} is given twice: give it once.")
        overrides[name] = value
    return overrides


# --- text to plain values -------------------------------------------------------------------------


class _StrictLoader(yaml.SafeLoader):
    """A safe loader whose every refusal is a YAMLError."""

    yaml_implicit_resolvers = {  # noqa: RUF012 -- as yaml declares it
        first: [(tag, regex) for tag, regex in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {mark.line + 1} has an alias (*name): write the value out")
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.YAMLError(f"line {mark.line + 1} is nested too deeply")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for name in (name for name, _ in node.value if isinstance(name, yaml.ScalarNode)):
            line, value = name.start_mark.line + 1, self.construct_object(name)
            if value in lines:  # however it is spelt: 1 and 01
                raise yaml.YAMLError(
                    f"{short_repr(value)} stands on line {lines[value]} and again on line {line}: "
                    "keep one"
                )
            lines[value] = line
        return super().construct_mapping(node, deep)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise yaml.YAMLError(
                f"{short_repr(node.value)} on line {node.start_mark.line + 1} cannot be read"
            ) from error


def read_yaml(text: str | bytes) -> Any:
    """The plain values of a YAML text.

    Raises:
        yaml.YAMLError: it is not YAML, or holds an alias, a key twice, or a value that cannot be
            read; says where.
    """
    try:
        return yaml.load(text, _StrictLoader)
    except UnicodeDecodeError as error:
        raise yaml.YAMLError(f"it is not UTF-8: {error}") from error


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Config file {short_repr(str(path))} cannot be read "
            f"({getattr(error, 'strerror', None) or error}): "
            "give an existing YAML file with --config-file."
        ) from error
    if len(content) > MOST_BYTES:
        raise ConfigError(
            f"Config file {path} has more than {MOST_BYTES:,} bytes, so it is no configuration: "
            "give a YAML file with --config-file."
        )
    return read_document(content, f"Config file {path}")


def read_document(content: bytes, name: str) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Args:
        name: of the file, which begins the message.

    Raises:
        ConfigError: it is not YAML, or holds something else.
    """
    try:
        document = read_yaml(content) or {}
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{name} is not valid YAML: {reason}.") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{name} must hold keys and values, not {_kind(document)}.")
    return document


def _text_as_yaml(value: Any) -> Any:
    """What a text stands for, as far as it is YAML: hyperparameters and options are all text."""
    try:
        return read_yaml(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return value


# --- plain values to typed ones -------------------------------------------------------------------


def _build(cls: Any, document: Any, prefix: str, source: str, legacy: list[str]) -> Any:
    if not isinstance(document, Mapping):
        raise ConfigError(
            f"Setting '{prefix.rstrip('.')}'{source} must be a mapping of keys, "
            f"not {short_repr(document)} ({_kind(document)})."
        )
    hints = hints_of(cls)
    entries = {entry.name: entry for entry in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for name, value in document.items():
        path = f"{prefix}{name}"
        if path in LEGACY_KEYS:
            _check_legacy(path, value, source)
            legacy.append(path)
        elif name not in entries:
            raise _unknown(path, source)
        elif dataclasses.is_dataclass(hints[name]):
            values[name] = _build(hints[name], value, f"{path}.", source, legacy)
        else:
            values[name] = _setting(value, hints[name], entries[name].metadata, path, source)
    return cls(**values)


def _check_legacy(path: str, value: Any, source: str) -> None:
    only, value = LEGACY_VALUES.get(path), _text_as_yaml(value)
    same = value.lower() if isinstance(value, str) else value
    if only is not None and same not in (only, None):
        raise ConfigError(
            f"Setting '{path}'{source} is {short_repr(value)} but only {str(only).lower()} is "
            f"supported: {LEGACY_KEYS[path]}."
        )


def _setting(value: Any, hint: Any, limits: Mapping[str, Any], path: str, source: str) -> Any:
    """`value` as the type `hint` and within limits, or a ConfigError that says what is allowed."""
    refused = f"Setting '{path}'{source} is {short_repr(value)}"
    try:
        typed = _typed(value, hint)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{refused} ({_kind(value)}) but must be {_describe(hint)}.") from error
    low, high = limits.get("minimum"), limits.get("maximum")
    for number in _numbers(typed):
        if isinstance(number, float) and not math.isfinite(number):
            raise ConfigError(f"{refused} but must be a finite number.")
        if isinstance(number, int) and high is None and number > INT_LIMIT:
            raise ConfigError(f"{refused} but must be at most {INT_LIMIT}.")
        if (low is not None and number < low) or (high is not None and number > high):
            allowed = f"at least {low:g}" if high is None else f"from {low:g} to {high:.10g}"
            raise ConfigError(f"{refused} but must be {allowed}.")
    return typed


def _typed(value: Any, hint: Any) -> Any:
    """`value` as the type that `hint` names; text may be YAML.

    Raises:
        ValueError, OverflowError: it is not of that type.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in sorted(inner, key=lambda option: option is not type(None)):
            with contextlib.suppress(ValueError, OverflowError):
                return _typed(value, option)
    elif hint is type(None):
        if value is None or str(value).strip().lower() in ("none", "null", "~", ""):
            return None
    elif hint is str:
        if isinstance(value, str):
            return value
    elif origin is Literal:
        for choice in inner:
            if value == choice or str(value).lower() == str(choice).lower():
                return choice
    else:
        return _plain(_text_as_yaml(value), hint)
    raise ValueError


def _plain(value: Any, hint: Any) -> Any:
    """As `_typed`, for a value that stands for itself: a number, true or false, a collection."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, bool):
        if hint is bool:
            return value
    elif hint is int:
        # hyperparameters arrive as JSON numbers
        if isinstance(value, (int, float)) and value == int(value):
            return int(value)
    elif hint is float:
        if isinstance(value, (int, float, str)):
            return float(value)  # YAML 1.1 reads 1e-3 as text
    elif origin is list and isinstance(value, (list, tuple)):
        return [_typed(item, inner[0]) for item in value]
    elif origin is dict and isinstance(value, Mapping):
        names = [_typed(name, inner[0]) for name in value]
        if len(set(names)) == len(names):  # and not 1 and "1"
            lists = typing.get_origin(inner[1]) is list
            # {block: trial} for {block: [trial]}
            items = ([v] if lists and isinstance(v, int) else v for v in value.values())
            return {name: _typed(v, inner[1]) for name, v in zip(names, items, strict=True)}
    raise ValueError


def _numbers(value: Any) -> Iterator[float]:
    """Every number in a setting."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def _set_path(document: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        existing = document.get(parent)
        if existing is None:
            existing = document[parent] = {}
        if not isinstance(existing, dict):
            return  # the section is no mapping: `_build` says so
        document = existing
    document[last] = value


# --- words ----------------------------------------------------------------------------------------


def _unknown(name: str, source: str) -> ConfigError:
    what = f"Unknown setting {short_repr(name)}{source}."
    if _JOINT_LOSS.search(name):
        return ConfigError(
            f"{what} The joint loss is set by objective.phoneme_weight, or by objective.schedule: "
            "[[step, weight], ...]."
        )
    known = [path for path, _, _ in config_keys()]
    if name in known:
        first, _, rest = name.partition(".")
        return ConfigError(f"{what} In a file it is written nested: {first}: {{{rest}: ...}}.")
    leaf = {path.rsplit(".", 1)[-1]: path for path in known}
    wanted = name[:80].replace("-", "_")
    close = difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
    close += difflib.get_close_matches(wanted.rsplit(".", 1)[-1], leaf, n=1, cutoff=0.6)
    if not close:
        return ConfigError(f"{what} See README_SAGEMAKER.md, Configuration.")
    return ConfigError(f"{what} Did you mean '{leaf.get(close[0], close[0])}'?")


def _describe(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if hint is type(None):
        return "null"
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(hint))
    if origin is list:
        (item,) = typing.get_args(hint)
        if typing.get_origin(item) is list:
            return "a list of lists of numbers"
        if item is str:
            return "a list of names (in quotes where they look like numbers)"
        return f"a list of {_describe(item).removeprefix('a ')}s"
    if origin is dict:
        return (
            "a mapping of sessions (in quotes where they look like numbers) to block numbers to "
            "lists of trial numbers, each once"
        )
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(hint, "text")


def _kind(value: Any) -> str:
    names = {int: "number", float: "number", bool: "true/false", str: "text", list: "list"}
    return "null" if value is None else names.get(type(value), "mapping")
