"""Read a training job's log lines: what step it is at, how well it does, how long it will take."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_TRAIN = re.compile(
    r"Train batch (?P<step>[0-9]+): loss: (?P<loss>\S+) .*?time: (?P<seconds>[0-9.]+)"
)
_VALIDATION = re.compile(r"Val batch (?P<step>[0-9]+): (?P<fields>.*)")
_FIELD = re.compile(r"(?P<name>[A-Z][\w ]*?(?: \([\w ]+\))): (?P<value>[-+0-9.eE]+)")
_TOTAL = re.compile(r"Train batches: (?P<steps>[0-9]+)")
_BAR_CELLS = 24


@dataclass(frozen=True)
class Validation:
    """One validation line: the step it followed, and its figures by name ("DER (avg)", ...)."""

    step: int
    values: dict[str, float]

    @property
    def error_rate(self) -> tuple[str, float] | None:
        """The error rate that chooses the model: DER where there is one, else PER."""
        for name in ("DER", "PER"):
            value = self.values.get(f"{name} (avg)")
            if value is not None:
                return name, value
        return None


@dataclass
class Progress:
    """What the log lines so far say.

    Attributes:
        step: last training step logged; -1 before the first.
        total_steps: of the whole run; None until known.
        seconds_per_step: from the last training line.
        validations: every validation, in order.
    """

    step: int = -1
    total_steps: int | None = None
    loss: float | None = None
    seconds_per_step: float | None = None
    validations: list[Validation] = field(default_factory=list)

    def read(self, line: str) -> None:
        """Take in one log line; lines that say nothing about progress change nothing."""
        if match := _TRAIN.search(line):
            self.step = int(match["step"])
            self.loss = _number(match["loss"])
            self.seconds_per_step = float(match["seconds"])
        elif match := _VALIDATION.search(line):
            fields = {m["name"]: _number(m["value"]) for m in _FIELD.finditer(match["fields"])}
            values = {name: value for name, value in fields.items() if value is not None}
            self.validations.append(Validation(int(match["step"]), values))
        elif match := _TOTAL.search(line):
            self.total_steps = int(match["steps"])

    @classmethod
    def of(cls, lines: Iterable[str]) -> Progress:
        """The progress that a whole log tells."""
        progress = cls()
        for line in lines:
            progress.read(line)
        return progress

    @property
    def best(self) -> Validation | None:
        """The validation with the lowest error rate; the first of equals."""
        rated = [v for v in self.validations if v.error_rate is not None]
        return min(rated, key=lambda v: v.error_rate[1]) if rated else None  # type: ignore[index]

    def bar(self) -> str:
        """One line for the terminal: bar, step, loss, best error rate, time left."""
        steps = self.step + 1
        if not self.total_steps:
            return f"step {steps:,}"
        share = min(steps / self.total_steps, 1.0)
        full = int(share * _BAR_CELLS)
        parts = [f"[{'#' * full}{'-' * (_BAR_CELLS - full)}] {100 * share:.0f}%"]
        parts.append(f"step {steps:,}/{self.total_steps:,}")
        if self.loss is not None:
            parts.append(f"loss {self.loss:.2f}")
        if self.best is not None and self.best.error_rate is not None:
            name, value = self.best.error_rate
            parts.append(f"best {name} {value:.4f}")
        if self.seconds_per_step is not None:
            parts.append(f"{duration((self.total_steps - steps) * self.seconds_per_step)} left")
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as people say them: 45 s, 12 min, 3 h 05 min."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    minutes = round(whole / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
