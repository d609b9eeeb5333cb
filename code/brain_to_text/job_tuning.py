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

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from .aws_account import AwsAccount, explained
from .config import config_keys, resolve_key
from .errors import ConfigError, JobError
from .sagemaker_job import (
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
    spec = _read(spec_file)
    ranges = _ranges(spec["parameters"], job)
    swept = {entry["Name"] for kind in ranges.values() for entry in kind}
    request = training_request(job)
    algorithm = request["AlgorithmSpecification"]
    static = {k: v for k, v in request["HyperParameters"].items() if k not in swept}
    # every job of the sweep shares this definition: a fixed place would mix logs or checkpoints
    static.pop("output-s3-uri")
    definition = {name: request[name] for name in _SHARED if name in request}
    return {
        "HyperParameterTuningJobName": str(job.job_name)[:32].rstrip("-"),
        "HyperParameterTuningJobConfig": {
            "Strategy": spec.get("strategy", "Bayesian"),
            "HyperParameterTuningJobObjective": {
                "Type": "Minimize",
                "MetricName": spec.get("metric", "validation:DER"),
            },
            "ResourceLimits": {
                "MaxNumberOfTrainingJobs": spec.get("max_jobs", 10),
                "MaxParallelTrainingJobs": spec.get("max_parallel_jobs", 1),
            },
            "ParameterRanges": ranges,
            "TrainingJobEarlyStoppingType": "Auto" if spec.get("early_stopping") else "Off",
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
        f"{value(job):10.4f}  {job['TrainingJobStatus']:<11} {job['TrainingJobName']}  "
        + " ".join(f"{k}={v}" for k, v in sorted(job.get("TunedHyperParameters", {}).items()))
        for job in sorted(jobs, key=value)
    ]


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


def _ranges(parameters: Mapping[str, Any], job: JobSettings) -> dict[str, list[dict[str, Any]]]:
    """Parameter ranges by kind; both ends of each are tried on the configuration."""
    ranges: dict[str, list[dict[str, Any]]] = {}
    types = {path: hint for path, hint, _ in config_keys()}
    for given, limits in parameters.items():
        name = resolve_key(given)
        if not isinstance(limits, dict) or not (
            set(limits) == {"values"} or {"min", "max"} <= set(limits) <= {"min", "max", "scaling"}
        ):
            raise ConfigError(
                f"Sweep parameter '{given}' must be {{min, max, scaling}} or {{values: [...]}}."
            )
        tried = limits.get("values", [limits.get("min"), limits.get("max")])
        for value in tried:
            resolve_config(replace(job, overrides={**job.overrides, name: value}))
        if "values" in limits:
            values = [hyperparameter_text(value) for value in tried]
            ranges.setdefault("CategoricalParameterRanges", []).append(
                {"Name": name, "Values": values}
            )
            continue
        scaling = limits.get("scaling", "Auto")
        if scaling not in SCALINGS or not limits["min"] < limits["max"]:
            raise ConfigError(
                f"Sweep parameter '{given}' needs min < max and a scaling of {', '.join(SCALINGS)}."
            )
        kind = "IntegerParameterRanges" if types[name] is int else "ContinuousParameterRanges"
        ranges.setdefault(kind, []).append(
            {
                "Name": name,
                "MinValue": str(limits["min"]),
                "MaxValue": str(limits["max"]),
                "ScalingType": scaling,
            }
        )
    return ranges
