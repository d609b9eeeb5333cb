"""What a check found: a severity, a short stable name, one line with the fix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing that will stop a job (error) or may spoil it (warning).

    Attributes:
        name: stable and short, for tests and the troubleshooting table.
        text: one line: what, where, why, what to type next.
    """

    severity: Literal["error", "warning"]
    name: str
    text: str


def error(name: str, text: str) -> Finding:
    """A finding that will stop the job."""
    return Finding("error", name, text)


def warning(name: str, text: str) -> Finding:
    """A finding that may cost time or money."""
    return Finding("warning", name, text)
