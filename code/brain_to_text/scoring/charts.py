"""Where lines, ticks and labels of a chart go; `templates/charts.html` draws them.

Colours are CSS variables of the page (templates/style.css); series differ in dash pattern and end
label too, and cells of a matrix in their opacity, so that no chart depends on telling hues apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 466, 14, 220  # of the plot, in a chart of 480 by 260
_MAX_POINTS = 600  # per drawn line; more are averaged


def line_chart(
    title: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    y_label: str = "",
    log_y: bool = False,
    percent: bool = False,
    from_zero: bool = False,
) -> dict[str, Any] | None:
    """Lines over a shared axis of training batches; None when there is nothing to draw.

    Args:
        title: for the caption and for screen readers.
        series: name → (x, y), both [n]; points where either is not finite are left out.
        log_y: logarithmic y axis; values not above 0 are left out.
        percent: show y as percentages.
        from_zero: let the y axis start at 0.
    """
    lines = {}
    for name, one in series.items():
        x, y = (np.asarray(values, dtype=float) for values in one)
        kept = np.isfinite(x) & np.isfinite(y) & (y > 0 if log_y else True)
        if kept.any():
            lines[name] = _thinned(x[kept], y[kept])
    if not lines:
        return None
    all_x, all_y = (np.concatenate(values) for values in zip(*lines.values(), strict=True))
    x_range = _padded(all_x.min(), all_x.max(), 0)
    least, most = all_y.min(), all_y.max()
    y_range: tuple[float, float] = (
        (least / 2, most * 2) if log_y else _padded(0 if from_zero else least, most, 0.05)
    )
    scale = np.log10 if log_y else np.asarray

    def place_x(values: Any) -> Any:
        low, high = x_range
        return _LEFT + (values - low) / (high - low) * (_RIGHT - _LEFT)

    def place_y(values: Any) -> Any:
        low, high = scale(y_range)
        return _BOTTOM - (scale(values) - low) / (high - low) * (_BOTTOM - _TOP)

    return {
        "title": title,
        "y_label": y_label,
        "percent": percent,
        "lines": [
            (name, list(zip(place_x(x), place_y(y), x, y, strict=True)))
            for name, (x, y) in lines.items()
        ],
        "x_ticks": [(place_x(tick), tick) for tick in ticks(*x_range)],
        "y_ticks": [(place_y(tick), tick) for tick in ticks(*y_range, log=log_y)],
    }


def number(value: float, percent: bool = False) -> str:
    """At most three significant digits, thousands as k."""
    if percent:
        return f"{100 * value:.3g} %"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    if abs(value) >= 10_000:
        return f"{value / 1000:.4g}k"
    if float(value).is_integer() or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def ticks(low: float, high: float, log: bool = False, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`."""
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        factors = (1, 2, 5) if last - first <= 2 else (1,)
        found = [f * 10.0**e for e in range(first, last + 1) for f in factors]
        return [tick for tick in found if low * 0.999 <= tick <= high * 1.001]
    step = 10 ** math.floor(math.log10((high - low) / about))
    for factor in (1, 2, 5, 10):
        if (high - low) / (step * factor) <= about:
            step *= factor
            break
    first_tick = math.ceil(low / step - 1e-9)
    last_tick = math.floor(high / step + 1e-9)
    return [tick * step for tick in range(first_tick, last_tick + 1)]


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    if high <= low:
        spread = abs(low) * 0.1 or 1.0
        return low - (spread if share and low else 0), high + spread
    return low - (share * (high - low) if low else 0), high + share * (high - low)


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_MAX_POINTS` points: neighbours averaged, so that a spike still shows as a bump."""
    if len(x) <= _MAX_POINTS:
        return x, y
    groups = np.array_split(np.arange(len(x)), _MAX_POINTS)
    return np.array([x[g].mean() for g in groups]), np.array([y[g].mean() for g in groups])
