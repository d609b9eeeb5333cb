"""The lines of a run's log: each one's writer beside its reader.

The trainer writes them; CloudWatch's metrics, `--watch`, `--fetch`, the curves of a report and the
main job's summary read them. Their wording is a contract (README_SAGEMAKER.md, Monitoring).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class _Field:
    """One number of a line: its name in metrics.jsonl, its label and form in the log."""

    name: str
    label: str
    form: str
    factor: float = 1.0


# In their order on the line, the contract's first. A number that a run does not have (MFU on an
# unlisted device, terms of a joint loss elsewhere) is left out.
TRAIN_FIELDS = (
    _Field("loss", "loss", "{:.2f}"),
    _Field("grad_norm", "grad norm", "{:.2f}"),
    _Field("seconds_per_step", "time", "{:.3f}"),
    _Field("diphone_loss", "diphone", "{:.3f}"),
    _Field("phoneme_loss", "phoneme", "{:.3f}"),
    _Field("phoneme_weight", "phoneme weight", "{:.2f}"),
    _Field("learning_rate", "lr", "{:.2e}"),
    _Field("trials_per_second", "trials/s", "{:.1f}"),
    _Field("frames_per_second", "frames/s", "{:.0f}"),
    _Field("mfu", "MFU", "{:.3f}"),
    _Field("gpu_memory_gb", "GPU GB", "{:.1f}"),
    _Field("data_wait_share", "data wait", "{:.1f}%", 100),
    _Field("requests", "GETs", "{:.0f}"),
    _Field("bytes_fetched", "MB", "{:.1f}", 1e-6),
    _Field("cache_hit_rate", "cache hits", "{:.0f}%", 100),
    _Field("retries", "retries", "{:.0f}"),
)
VALIDATION_FIELDS = (
    _Field("der", "DER (avg)", "{:.4f}"),
    _Field("ctc_loss", "CTC Loss (avg)", "{:.4f}"),
    _Field("seconds", "time", "{:.3f}"),
    _Field("per", "PER (avg)", "{:.4f}"),
    _Field("per_path", "PER (diphone path)", "{:.4f}"),
)

_NUMBER = r"([-+]?[0-9]*[.]?[0-9]+(?:[eE][-+]?[0-9]+)?)"
# CloudWatch finds these in a job's log.
METRIC_DEFINITIONS: tuple[dict[str, str], ...] = tuple(
    {"Name": name, "Regex": regex}
    for name, regex in (
        ("train:loss", rf"Train batch [0-9]+: loss: {_NUMBER}"),
        ("train:grad_norm", rf"Train batch [0-9]+: .*?grad norm: {_NUMBER}"),
        ("train:seconds_per_batch", rf"Train batch [0-9]+: .*?time: {_NUMBER}"),
        ("train:trials_per_second", rf"Train batch [0-9]+: .*?trials/s: {_NUMBER}"),
        ("train:data_wait_percent", rf"Train batch [0-9]+: .*?data wait: {_NUMBER}%"),
        ("validation:DER", rf"Val batch [0-9]+: .*?DER \(avg\): {_NUMBER}"),
        ("validation:PER", rf"Val batch [0-9]+: .*?PER \(avg\): {_NUMBER}"),
        ("validation:CTC_loss", rf"Val batch [0-9]+: .*?CTC Loss \(avg\): {_NUMBER}"),
        ("validation:best_DER", rf"New best test DER .*--> {_NUMBER}"),
        ("validation:best_PER", rf"New best test PER .*--> {_NUMBER}"),
    )
)

_ENTRY = re.compile(r"(?P<kind>Train|Val) batch (?P<step>[0-9]+): (?P<fields>.*)")
_VALUE = re.compile(r"(?P<label>[A-Za-z/][A-Za-z/() ]*?): (?P<number>[-+0-9.eE]+|-?inf|nan)%?")
_TOTAL = re.compile(r"Train batches: (?P<steps>[0-9]+)")


def train_line(numbers: Mapping[str, Any]) -> str:
    """The line of a training step, from its entry in metrics.jsonl."""
    return f"Train batch {numbers['step']}: {_fields_text(TRAIN_FIELDS, numbers)}"


def validation_line(numbers: Mapping[str, Any], primary: str) -> str:
    """The line of a validation, from its entry in metrics.jsonl.

    Args:
        primary: "DER" or "PER", the rate that chooses the model; it stands first.
    """
    first = [field for field in VALIDATION_FIELDS if field.name == primary.lower()]
    rest = [field for field in VALIDATION_FIELDS if field.name not in ("der", primary.lower())]
    return f"Val batch {numbers['step']}: {_fields_text([*first, *rest], numbers)}"


def total_line(steps: int) -> str:
    """How many training steps the run has."""
    return f"Train batches: {steps}"


def best_line(metric: str, before: float, now: float) -> str:
    """A validation was better than all before it."""
    return f"New best test {metric} {before:.4f} --> {now:.4f}"


def read_line(line: str) -> tuple[Literal["train", "validation"], dict[str, float]] | None:
    """(kind, numbers by the names of metrics.jsonl, "step" first) that a line was made of.

    Ours or the public baseline's; None for other lines.
    """
    match = _ENTRY.search(line)
    if match is None:
        return None
    trains = match["kind"] == "Train"
    known = {field.label: field for field in (TRAIN_FIELDS if trains else VALIDATION_FIELDS)}
    numbers: dict[str, float] = {"step": int(match["step"])}
    for found in _VALUE.finditer(match["fields"]):
        field = known.get(found["label"].strip())
        try:
            if field is not None:
                numbers[field.name] = float(found["number"]) / field.factor
        except ValueError:
            continue  # a line cut in the middle of a number
    return "train" if trains else "validation", numbers


def rows_of_log(text: str) -> dict[str, list[dict[str, float]]]:
    """The numbers of a whole log as rows by kind, as in metrics.jsonl."""
    rows: dict[str, list[dict[str, float]]] = {}
    for line in text.splitlines():
        if read := read_line(line):
            rows.setdefault(read[0], []).append(read[1])
    return rows


def total_steps(line: str) -> int | None:
    """The run's steps, from the line that `total_line` made; None for other lines."""
    match = _TOTAL.search(line)
    return int(match["steps"]) if match else None


def error_rate(row: Mapping[str, float]) -> tuple[str, float] | None:
    """("DER" or "PER", value) of a validation's row: the rate that chooses the model."""
    return next(((name.upper(), row[name]) for name in ("der", "per") if name in row), None)


def best_validation(rows: Iterable[dict[str, float]]) -> dict[str, float] | None:
    """The validation with the lowest error rate; the first of equals."""
    rated = [(rate[1], row) for row in rows if (rate := error_rate(row))]
    return min(rated, key=lambda pair: pair[0])[1] if rated else None


def _fields_text(fields: Iterable[_Field], numbers: Mapping[str, Any]) -> str:
    return " ".join(
        f"{field.label}: {field.form.format(field.factor * numbers[field.name])}"
        for field in fields
        if numbers.get(field.name) is not None
    )
