"""Check a request against the service's own model, as botocore ships it: what is required, lengths,
ranges, patterns, choices. botocore itself checks only the first before it sends.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from botocore.loaders import Loader
from botocore.model import ServiceModel

# Java's classes that Python lacks. A letter class inside brackets cannot be said exactly: \w adds
# digits and the underscore, which every pattern of the API that has \p{L} admits anyway.
_CLASSES = {
    r"\p{L}": r"\w",
    r"\p{N}": r"\d",
    r"\p{Z}": " \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000",
    r"\p{Alnum}": "a-zA-Z0-9",
}
# Which option a field of the request comes from, longest path first.
_OPTIONS = {
    "AlgorithmSpecification.TrainingImage": "--image-uri",
    "CheckpointConfig.S3Uri": "--output-prefix",
    "Environment.MLFLOW_TRACKING_URI": "--mlflow-tracking-uri",
    "Environment": "--env",
    "HyperParameters": "configuration value",
    "InputDataConfig": "--s3-data-prefix",
    "OutputDataConfig.KmsKeyId": "--output-kms-key",
    "OutputDataConfig": "--output-prefix",
    "ResourceConfig.InstanceCount": "--instance-count",
    "ResourceConfig.InstanceType": "--instance-type",
    "ResourceConfig.KeepAlivePeriodInSeconds": "--keep-alive-minutes",
    "ResourceConfig.VolumeKmsKeyId": "--volume-kms-key",
    "ResourceConfig.VolumeSizeInGB": "--volume-gb",
    "RetryStrategy": "--retries",
    "RoleArn": "--role",
    "StoppingCondition.MaxWaitTimeInSeconds": "--max-wait-hours",
    "StoppingCondition": "--max-run-hours",
    "Tags": "--tag",
    "TrainingJobName": "--job-name",
    "VpcConfig.SecurityGroupIds": "--security-group-ids",
    "VpcConfig.Subnets": "--subnets",
}
# The way out for a configuration value that no hyperparameter holds.
_IN_IMAGE = (
    " A longer one must be in the image: write it into a file in code/, run ./build_and_push.sh, "
    "and start the job as README_SAGEMAKER.md shows for the SageMaker SDK, which names the file."
)
Path = tuple[str | int, ...]  # where in a request, e.g. ("Tags", 3, "Key")


def breaches(operation: str, request: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for every rule of SageMaker's model that `request` breaks, in its order.

    Text in "<…>" stands for what is not known yet, and breaks none.
    """
    model = _model().operation_model(operation)
    for path, value, rule in _walk(model.input_shape, request, ()):
        if not str(value).startswith("<"):
            yield _sentence(path, value, rule)


def option_of(path: Path) -> str:
    """The option that gave a field of CreateTrainingJob, or the field's own name."""
    field = ".".join(part for part in path if isinstance(part, str))
    option = next(
        (flag for name, flag in _OPTIONS.items() if f"{field}.".startswith(f"{name}.")), field
    )
    if option in ("--env", "configuration value") and len(path) > 1:
        return f"{option} {path[1]}"
    return option


def _sentence(path: Path, value: Any, rule: str) -> str:
    option = option_of(path)
    if value is None:
        return f"{option} is not given and SageMaker needs it."
    if str(path[-1]).endswith("InSeconds"):
        shown, rule = f"{value:,} seconds", f"{rule} seconds"
    elif isinstance(value, (str, int)):
        text = " ".join(str(value).split())
        shown = f"'{text}'" if len(text) < 80 else f"{len(text):,} characters long"
    else:
        shown = f"{len(value)} entries long"
    if rule.startswith("one of ") and len(rule) > 200:
        near = difflib.get_close_matches(str(value), rule[7:].split(", "), n=3, cutoff=0.5)
        rule = "one that this boto3 knows" + (f" (nearest: {', '.join(near)})" if near else "")
    too_long = option.startswith("configuration value ") and rule.startswith("at most ")
    return f"{option} is {shown} and SageMaker wants it to be {rule}.{_IN_IMAGE * too_long}"


@cache
def _model() -> ServiceModel:
    return ServiceModel(Loader().load_service_model("sagemaker", "service-2"), "sagemaker")


def _walk(shape: Any, value: Any, path: Path) -> Iterator[tuple[Path, Any, str]]:
    """(path, value, what would be right) of each value that breaks a rule."""
    if value is None:
        yield path, value, "given"
        return
    for rule in _broken_rules(shape, value):
        yield path, value, rule
    if shape.type_name == "structure":
        for name in dict.fromkeys([*shape.required_members, *value]):
            yield from _walk(shape.members[name], value.get(name), (*path, name))
    elif shape.type_name == "list":
        for number, inner in enumerate(value):
            yield from _walk(shape.member, inner, (*path, number))
    elif shape.type_name == "map":
        for name, inner in value.items():
            yield from _walk(shape.key, name, (*path, name))
            yield from _walk(shape.value, inner, (*path, name))


def _broken_rules(shape: Any, value: Any) -> Iterator[str]:
    rules = shape.metadata
    if "enum" in rules and value not in rules["enum"]:
        yield f"one of {', '.join(rules['enum'])}"
    counted = value if isinstance(value, (int, float)) else len(value)
    unit = {"string": " characters", "list": " entries", "map": " entries"}.get(shape.type_name, "")
    if "max" in rules and counted > rules["max"]:
        yield f"at most {rules['max']:,}{unit}"
    if "min" in rules and counted < rules["min"]:
        yield f"at least {rules['min']:,}{unit}"
    pattern = rules.get("pattern")
    if pattern and not _compiled(pattern).fullmatch(value):
        yield "one line of text" if pattern in (".*", ".+") else f"of the form {pattern}"


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    for java, python in _CLASSES.items():
        pattern = pattern.replace(java, python)
    return re.compile(pattern)
