"""A sweep on this machine: the jobs that SageMaker would start, one after another.

SageMaker's Bayesian and Hyperband searches are the service's own. Here values are drawn beforehand,
repeatably, as a Latin hypercube: however few the jobs, each range is covered evenly.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import BrainToTextError, JobError
from .account import AwsAccount, error_code, explained
from .job_tuning import Sweep, SweptParameter, sweep_name, table_line
from .request import CODE_FOLDER, METRIC_DEFINITIONS, JobSettings

SWEEPS_FOLDER = CODE_FOLDER.parent / ".local" / "sweeps"
SPREAD_FOR_LOG = 100  # "Auto" scales a range logarithmically from this ratio of its ends on


@dataclass(frozen=True)
class SweptJob:
    """One job of a local sweep: what was tried and what came out.

    Attributes:
        value: last value of the sweep's metric in the job's log; None without one.
        reason: why it failed, if it did.
    """

    name: str
    status: str
    value: float | None
    tried: dict[str, Any]
    reason: str = ""


def draw(sweep: Sweep, seed: int = 0) -> list[dict[str, Any]]:
    """The values of every job, by dotted key; the same for the same sweep and seed.

    Grid: every combination. Else a Latin hypercube: `max_jobs` equal strata of each parameter, each
    met once, in an order of its own.
    """
    names = [parameter.name for parameter in sweep.parameters]
    if sweep.strategy == "Grid":
        combinations = itertools.product(*(parameter.values for parameter in sweep.parameters))
        return [dict(zip(names, values, strict=True)) for values in combinations]
    rng = random.Random(seed)
    columns = []
    for parameter in sweep.parameters:
        order = list(range(sweep.max_jobs))
        rng.shuffle(order)
        columns.append(
            [value_at(parameter, (place + rng.random()) / sweep.max_jobs) for place in order]
        )
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def value_at(parameter: SweptParameter, share: float) -> Any:
    """The value a share (0 <= share < 1) of the way through a parameter's range."""
    if parameter.values:
        return parameter.values[int(share * len(parameter.values))]
    low, high = float(parameter.low), float(parameter.high)
    if parameter.whole:
        low, high = low - 0.5 + 1e-9, high + 0.5 - 1e-9  # so that the ends get their full share
    scaling = parameter.scaling
    if scaling == "Auto" and parameter.low > 0:
        wide = parameter.high / parameter.low >= SPREAD_FOR_LOG
        scaling = "Logarithmic" if wide else "Linear"
    if scaling == "Logarithmic":
        value = low * (high / low) ** share
    elif scaling == "ReverseLogarithmic":
        value = 1 - (1 - low) * ((1 - high) / (1 - low)) ** share
    else:
        value = low + share * (high - low)
    return round(value) if parameter.whole else float(f"{value:.6g}")


def run_sweep(
    sweep: Sweep,
    job: JobSettings,
    account: AwsAccount,
    launch: Callable[[JobSettings, AwsAccount], object],
    say: Callable[[str], None] = print,
) -> list[SweptJob]:
    """Run every job to its end; the results so far are kept for `local_table`.

    A job that fails is named with its reason and the sweep goes on. The same sweep under the same
    name goes on where it ended, where the jobs keep their checkpoints (local_process).

    Args:
        sweep: from `read_sweep`.
        job: complete settings of a job on this machine.
        launch: runs one job to its end.
        say: prints a line.
    """
    values, done = draw(sweep), list[SweptJob]()
    name = sweep_name(job)
    say(f"Sweep {name}: {len(values)} jobs, one after another, by {_method(sweep)}")
    for number, tried in enumerate(values, 1):
        own = replace(job, job_name=f"{name}-{number:03d}", overrides={**job.overrides, **tried})
        say(f"Job {number} of {len(values)}: " + " ".join(f"{k}={v}" for k, v in tried.items()))
        done.append(_run(own, tried, sweep.metric, account, launch))
        if done[-1].reason:
            say(f"Job {number} failed: {done[-1].reason}")
        SWEEPS_FOLDER.mkdir(parents=True, exist_ok=True)
        content = {"metric": sweep.metric, "jobs": [asdict(result) for result in done]}
        (SWEEPS_FOLDER / f"{name}.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    return done


def local_table(name: str) -> list[str] | None:
    """The table of a sweep that ran on this machine, best first, its best named; else None.

    Raises:
        JobError: its file is damaged.
    """
    path = SWEEPS_FOLDER / f"{name}.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        jobs = [SweptJob(**job) for job in content["jobs"]]
        metric = content["metric"]
    except (ValueError, TypeError, KeyError) as error:
        raise JobError(f"{path} is damaged: remove it and run the sweep again.") from error

    def value(job: SweptJob) -> float:
        return math.inf if job.value is None else job.value

    ordered = sorted(jobs, key=value)
    said = [f"{metric:>10}  status      job"]
    said += [table_line(value(job), job.status, job.name, job.tried) for job in ordered]
    if ordered and ordered[0].value is not None:
        said.append(f"Best: {ordered[0].name}, {metric} {ordered[0].value:.4f}")
    return said


def last_value(metric: str, log: str) -> float | None:
    """The last value of a metric in a training log, as SageMaker would find it."""
    regex = next(entry["Regex"] for entry in METRIC_DEFINITIONS if entry["Name"] == metric)
    found = re.findall(regex, log)
    return float(found[-1]) if found else None


def _run(
    job: JobSettings,
    tried: Mapping[str, Any],
    metric: str,
    account: AwsAccount,
    launch: Callable[[JobSettings, AwsAccount], object],
) -> SweptJob:
    name = str(job.job_name)
    try:
        launch(job, account)
    except BrainToTextError as error:
        return SweptJob(name, "Failed", None, dict(tried), str(error))
    return SweptJob(name, "Completed", last_value(metric, _log_of(job, account)), dict(tried))


def _log_of(job: JobSettings, account: AwsAccount) -> str:
    from botocore.exceptions import ClientError

    bucket, _, key = f"{job.output_uri(str(job.job_name))}/logs/training_log"[5:].partition("/")
    with explained(f"reading s3://{bucket}/{key}"):
        try:
            answer = account.client("s3").get_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if error_code(error) in ("404", "NoSuchKey"):
                return ""
            raise
        return str(answer["Body"].read().decode("utf-8", "replace"))


def _method(sweep: Sweep) -> str:
    if sweep.strategy == "Grid":
        return "grid"
    own = "" if sweep.strategy == "Random" else f" ({sweep.strategy} search is the service's own)"
    return f"Latin hypercube{own}"
