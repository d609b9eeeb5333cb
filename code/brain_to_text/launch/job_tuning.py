"""A hyperparameter sweep as data: a small YAML file in, a SageMaker tuning request out.

    metric: validation:DER          # or validation:PER
    max_jobs: 12
    max_parallel_jobs: 3
    strategy: Bayesian              # Bayesian, Random, Hyperband or Grid
    parameters:
      lr_max: {min: 0.001, max: 0.01, scaling: Logarithmic}
      model.rnn_dropout: {min: 0.3, max: 0.6}
      model.n_units: {values: [768, 1024]}

Limits are those of the SageMaker API reference, CreateHyperParameterTuningJob.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import yaml

from ..config import config_keys
from ..config_reader import resolve_key
from ..errors import ConfigError, JobError
from .account import AwsAccount, explained
from .pricing import Estimate, estimate
from .request import (
    METRIC_DEFINITIONS,
    JobSettings,
    hyperparameter_text,
    resolve_config,
    training_request,
)

STRATEGIES = ("Bayesian", "Random", "Hyperband", "Grid")
SCALINGS = ("Auto", "Linear", "Logarithmic", "ReverseLogarithmic")
_SETTINGS = {"metric", "max_jobs", "max_parallel_jobs", "strategy", "parameters", "early_stopping"}
# parts of a training request that a tuning job's definition has under the same name
_SHARED = (
    "EnableInterContainerTrafficEncryption",
    "Environment",
    "InputDataConfig",
    "OutputDataConfig",
    "ResourceConfig",
    "RetryStrategy",
    "RoleArn",
    "StoppingCondition",
    "VpcConfig",
)


@dataclass(frozen=True)
class SweptParameter:
    """One setting that a sweep varies.

    Attributes:
        name: dotted key.
        values: to choose from; empty for a range.
        low, high: both ends of a range, included.
        scaling: of a range, as SageMaker names it.
        whole: the range holds whole numbers only.
    """

    name: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    scaling: str = "Auto"
    whole: bool = False

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that stand for the whole range in checks and prices."""
        return self.values or (self.low, self.high)


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says, checked against the configuration."""

    parameters: tuple[SweptParameter, ...]
    metric: str
    max_jobs: int
    max_parallel_jobs: int
    strategy: str
    early_stopping: bool


def read_sweep(spec_file: str | Path, job: JobSettings) -> Sweep:
    """The sweep that a file describes, around `job`.

    Args:
        spec_file: YAML as in this module's docstring.

    Raises:
        ConfigError: the file cannot be read, or a name, value or range in it is not possible.
    """
    spec = _read(spec_file)
    parameters = tuple(_parameter(name, limits, job) for name, limits in spec["parameters"].items())
    strategy = spec.get("strategy", "Bayesian")
    max_jobs = spec.get("max_jobs", 10)
    if strategy == "Grid":
        ranged = [parameter.name for parameter in parameters if not parameter.values]
        if ranged:
            raise ConfigError(
                f"Sweep strategy Grid tries every combination of values, and '{ranged[0]}' is a "
                "range: give it {values: [...]}, or choose another strategy."
            )
        combinations = math.prod(len(parameter.values) for parameter in parameters)
        if spec.get("max_jobs", combinations) != combinations:
            raise ConfigError(
                f"Sweep setting 'max_jobs' is {max_jobs} and the grid has {combinations} "
                "combinations: drop max_jobs."
            )
        max_jobs = combinations
    if strategy == "Hyperband" and spec.get("early_stopping"):
        raise ConfigError(
            "Sweep strategy Hyperband stops jobs early by itself: drop early_stopping."
        )
    return Sweep(
        parameters=parameters,
        metric=spec.get("metric", "validation:DER"),
        max_jobs=max_jobs,
        max_parallel_jobs=spec.get("max_parallel_jobs", 1),
        strategy=strategy,
        early_stopping=bool(spec.get("early_stopping")),
    )


def sweep_price(sweep: Sweep, job: JobSettings, account: AwsAccount | None = None) -> list[str]:
    """Time and money of the whole sweep for people, from its cheapest to its dearest job."""
    cheapest, dearest = (_extreme(sweep, job, account, choose) for choose in (min, max))
    said = [f"Sweep: {sweep.max_jobs} jobs, {sweep.max_parallel_jobs} at a time; the dearest:"]
    said += [f"  {line}" for line in dearest.lines()]
    rounds = math.ceil(sweep.max_jobs / sweep.max_parallel_jobs)
    if cheapest.hours is not None and dearest.hours is not None:
        said.append(f"All jobs: {rounds * cheapest.hours:.1f} to {rounds * dearest.hours:.1f} h")
    if cheapest.usd is not None and dearest.usd is not None:
        low, high = sweep.max_jobs * cheapest.usd, sweep.max_jobs * dearest.usd
        said[-1] += f", ${low:.2f} to ${high:.2f} on demand ({dearest.price_source})"
    return said


def _extreme(sweep: Sweep, job: JobSettings, account: AwsAccount | None, choose: Any) -> Estimate:
    """The estimate with every parameter at whichever end is least (or most) work."""

    def made(changes: Mapping[str, Any], asked: AwsAccount | None = None) -> Estimate:
        config = resolve_config(replace(job, overrides={**job.overrides, **changes}))[2]
        return estimate(config, job.instance_type, job.instance_count, asked)

    def work(changes: Mapping[str, Any]) -> float:
        found = made(changes)
        return found.steps * (found.seconds_per_step or 0.0)

    changes: dict[str, Any] = {}
    for parameter in sweep.parameters:
        changes |= choose(
            ({parameter.name: value} for value in parameter.ends),
            key=lambda change: work({**changes, **change}),
        )
    return made(changes, account)


def tuning_request(spec_file: str | Path, job: JobSettings) -> dict[str, Any]:
    """The CreateHyperParameterTuningJob request for a sweep around `job`.

    Args:
        spec_file: YAML as in this module's docstring.
        job: complete settings; its name becomes the sweep's (at most 32 characters).

    Raises:
        ConfigError: the file cannot be read, or a name, value or range in it is not possible.
        JobError: as `training_request`, or spot capacity or a checkpoint location was asked for.
    """
    if job.spot or job.resume_from or job.checkpoint_s3_uri:
        raise JobError(
            "A sweep's jobs share one definition, so they can have no checkpoint location and thus "
            "no spot capacity: drop --spot, --resume-from and --checkpoint-s3-uri."
        )
    sweep = read_sweep(spec_file, job)
    ranges = _ranges(sweep)
    swept = {entry["Name"] for kind in ranges.values() for entry in kind}
    request = training_request(job)
    algorithm = request["AlgorithmSpecification"]
    static = {k: v for k, v in request["HyperParameters"].items() if k not in swept}
    # every job of the sweep shares this definition: a fixed place would mix logs or checkpoints
    static.pop("output-s3-uri")
    definition = {name: request[name] for name in _SHARED if name in request}
    return {
        "HyperParameterTuningJobName": sweep_name(job),
        "HyperParameterTuningJobConfig": {
            "Strategy": sweep.strategy,
            "HyperParameterTuningJobObjective": {"Type": "Minimize", "MetricName": sweep.metric},
            "ResourceLimits": {
                "MaxNumberOfTrainingJobs": sweep.max_jobs,
                "MaxParallelTrainingJobs": sweep.max_parallel_jobs,
            },
            "ParameterRanges": ranges,
            "TrainingJobEarlyStoppingType": "Auto" if sweep.early_stopping else "Off",
        },
        "TrainingJobDefinition": {
            "AlgorithmSpecification": {
                "TrainingImage": algorithm["TrainingImage"],
                "TrainingInputMode": algorithm["TrainingInputMode"],
                "MetricDefinitions": algorithm["MetricDefinitions"],
            },
            "StaticHyperParameters": static,
            **definition,
        },
        "Tags": request["Tags"],
    }


def sweep_name(job: JobSettings) -> str:
    """What SageMaker allows of the job's name: 32 characters."""
    return str(job.job_name)[:32].rstrip("-")


def submit_sweep(request: Mapping[str, Any], account: AwsAccount) -> str:
    """Start the sweep and return its name.

    Raises:
        JobError: AWS refused, or could not be reached.
    """
    name = str(request["HyperParameterTuningJobName"])
    with explained(f"creating tuning job {name}"):
        account.client("sagemaker").create_hyper_parameter_tuning_job(**request)
    return name


def sweep_table(name: str, account: AwsAccount) -> list[str]:
    """The sweep's training jobs, best first: metric, state, what was tried.

    Raises:
        JobError: there is no such sweep, or AWS refused.
    """
    with explained(f"asking about the sweep {name}"):
        pages = account.client("sagemaker").get_paginator(
            "list_training_jobs_for_hyper_parameter_tuning_job"
        )
        jobs = [
            job
            for page in pages.paginate(HyperParameterTuningJobName=name)
            for job in page["TrainingJobSummaries"]
        ]

    def value(job: Mapping[str, Any]) -> float:
        return job.get("FinalHyperParameterTuningJobObjectiveMetric", {}).get("Value", float("inf"))

    return [
        table_line(
            value(job),
            job["TrainingJobStatus"],
            job["TrainingJobName"],
            job.get("TunedHyperParameters", {}),
        )
        for job in sorted(jobs, key=value)
    ]


def table_line(value: float, status: str, name: str, tried: Mapping[str, Any]) -> str:
    """One job of a sweep for people."""
    settings = " ".join(f"{key}={tried[key]}" for key in sorted(tried))
    return f"{value:10.4f}  {status:<11} {name}  {settings}"


def _read(spec_file: str | Path) -> dict[str, Any]:
    try:
        spec = yaml.safe_load(Path(spec_file).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"Sweep file {spec_file} cannot be read: {reason}.") from error
    if not isinstance(spec, dict) or not isinstance(spec.get("parameters"), dict):
        raise ConfigError(f"Sweep file {spec_file} must have 'parameters' with at least one range.")
    unknown = sorted(spec.keys() - _SETTINGS)
    metrics = [m["Name"] for m in METRIC_DEFINITIONS if m["Name"].startswith("validation:")]
    choices = {"strategy": STRATEGIES, "metric": metrics}
    if unknown:
        raise ConfigError(
            f"Sweep file {spec_file} has the unknown setting '{unknown[0]}': "
            f"use {', '.join(sorted(_SETTINGS))}."
        )
    for name, allowed in choices.items():
        if name in spec and spec[name] not in allowed:
            raise ConfigError(
                f"Sweep setting '{name}' is {spec[name]!r} but must be one of {', '.join(allowed)}."
            )
    for name, most in (("max_jobs", 750), ("max_parallel_jobs", 100)):
        number = spec.get(name, 1)
        if not isinstance(number, int) or not 1 <= number <= most:
            raise ConfigError(f"Sweep setting '{name}' is {number!r} but must be 1 to {most}.")
    return spec


def _parameter(given: str, limits: Any, job: JobSettings) -> SweptParameter:
    """One entry of `parameters`; its ends are tried on the configuration."""
    name = resolve_key(given)
    if not isinstance(limits, dict) or not (
        set(limits) == {"values"} or {"min", "max"} <= set(limits) <= {"min", "max", "scaling"}
    ):
        raise ConfigError(
            f"Sweep parameter '{given}' must be {{min, max, scaling}} or {{values: [...]}}."
        )
    tried = limits.get("values", [limits.get("min"), limits.get("max")])
    if not isinstance(tried, list) or not tried:
        raise ConfigError(f"Sweep parameter '{given}' needs a list of at least one value.")
    for value in tried:
        resolve_config(replace(job, overrides={**job.overrides, name: value}))
    if "values" in limits:
        return SweptParameter(name, values=tuple(tried))
    low, high, scaling = limits["min"], limits["max"], limits.get("scaling", "Auto")
    if not all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in (low, high)):
        raise ConfigError(f"Sweep parameter '{given}' has a range but no numbers: use values.")
    if scaling not in SCALINGS or not low < high:
        raise ConfigError(
            f"Sweep parameter '{given}' needs min < max and a scaling of {', '.join(SCALINGS)}."
        )
    hint = next(hint for path, hint, _ in config_keys() if path == name)
    whole = int in (hint, *get_args(hint))
    if (scaling == "Logarithmic" and low <= 0) or (
        scaling == "ReverseLogarithmic" and (whole or low < 0 or high >= 1)
    ):
        raise ConfigError(
            f"Sweep parameter '{given}' cannot be scaled {scaling} from {low} to {high}: "
            "Logarithmic needs min > 0, ReverseLogarithmic fractions from 0 to below 1."
        )
    return SweptParameter(name, low=low, high=high, scaling=scaling, whole=whole)


def _ranges(sweep: Sweep) -> dict[str, list[dict[str, Any]]]:
    """SageMaker's ParameterRanges."""
    ranges: dict[str, list[dict[str, Any]]] = {}
    for parameter in sweep.parameters:
        if parameter.values:
            ranges.setdefault("CategoricalParameterRanges", []).append(
                {
                    "Name": parameter.name,
                    "Values": [hyperparameter_text(value) for value in parameter.values],
                }
            )
            continue
        kind = "IntegerParameterRanges" if parameter.whole else "ContinuousParameterRanges"
        ranges.setdefault(kind, []).append(
            {
                "Name": parameter.name,
                "MinValue": str(parameter.low),
                "MaxValue": str(parameter.high),
                "ScalingType": parameter.scaling,
            }
        )
    return ranges
