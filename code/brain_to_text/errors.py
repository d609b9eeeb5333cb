"""What a user can act on: one sentence saying what, where, why, and what to type next.

An error ends what was asked for; findings are collected by checks that look at everything first.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any


class BrainToTextError(Exception):
    """Base of every error raised on purpose; front doors print it without a traceback."""


class ConfigError(BrainToTextError):
    """A configuration key, value or combination that cannot work."""


class DataError(BrainToTextError):
    """A dataset, file or trial that breaks the schema, is damaged or has changed."""


class StorageError(BrainToTextError):
    """A bucket, prefix, object or folder that cannot be reached, read or written."""


class CheckpointError(BrainToTextError):
    """A checkpoint that cannot be written, read, or resumed from."""


class InUseError(CheckpointError):
    """A file or folder that belongs to another run."""


class TrainingError(BrainToTextError):
    """A run that cannot go on: divergence, out of memory, no data to train on."""


class JobError(BrainToTextError):
    """A SageMaker job, image or account that is not as it must be."""


class OutputError(BrainToTextError):
    """Standard output that takes nothing more."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with data, configuration or job, may spoil a run, or is good to know.

    Attributes:
        key, trial: the file and the trial in it; None where a whole file or more is meant.
        reason: one line about that place; without a place, a whole sentence.
        kind: short and stable: groups findings in tables, and tells them apart.
        severity: "error" for what cannot be trained on, "warning" for what deserves a look, "note".
    """

    key: str | None
    trial: str | None
    reason: str
    kind: str
    severity: str = "error"

    def __str__(self) -> str:
        place = ":".join(part for part in (self.key, self.trial) if part is not None)
        return f"{place}: {self.reason}" if place else self.reason


def error(kind: str, reason: str) -> Finding:
    """A finding that stops a run."""
    return Finding(None, None, reason, kind)


def warning(kind: str, reason: str) -> Finding:
    """A finding that may cost time, money or accuracy, or that nobody could look at."""
    return Finding(None, None, reason, kind, "warning")


def note(kind: str, reason: str) -> Finding:
    """A finding that is good to know."""
    return Finding(None, None, reason, kind, "note")


def short_repr(value: Any) -> str:
    """A value for an error message: never long, never over several lines."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    try:
        return short.repr(value)
    except ValueError:  # Python refuses to write a whole number of thousands of digits
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else "a value"
