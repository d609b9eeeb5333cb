"""Charts as SVG text: no library, no network, readable in light and dark mode.

Colours are CSS variables of the page (templates/style.css); series differ in dash pattern and end
label too, and cells of a matrix in their opacity, so that no chart depends on telling hues apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT = 480, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 14, 14, 40
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
_MAX_POINTS = 600  # per drawn line; more are averaged


@dataclass(frozen=True)
class Series:
    """One line of a chart: y over x, both [n]; points where either is not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Bar:
    """One bar, with the ends of its interval where known."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass
class _Axes:
    """Maps data to the viewBox and draws the frame."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log_y: bool = False
    width: int = WIDTH
    height: int = HEIGHT
    parts: list[str] = field(default_factory=list)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return _LEFT + (value - low) / (high - low) * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        if self.log_y:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.height - _BOTTOM - (value - low) / (high - low) * (self.height - _TOP - _BOTTOM)

    def frame(self, x_label: str, y_label: str, percent: bool) -> None:
        right, bottom = self.width - _RIGHT, self.height - _BOTTOM
        for tick in _ticks(*self.y_range, log=self.log_y):
            y = self.y(tick)
            self.parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>')
            self.parts.append(_text(_LEFT - 6, y + 4, _number(tick, percent), "end"))
        for tick in _ticks(*self.x_range):
            self.parts.append(_text(self.x(tick), bottom + 16, _number(tick), "middle"))
        self.parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
        self.parts.append(_text((_LEFT + right) / 2, self.height - 6, x_label, "middle"))
        middle = (_TOP + bottom) / 2
        self.parts.append(
            f'<text transform="translate(12 {middle:.0f}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_label)}</text>"
        )


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str = "training batch",
    y_label: str = "",
    log_y: bool = False,
    percent: bool = False,
    from_zero: bool = False,
) -> Markup:
    """Lines over a shared x axis with a legend; empty when there is nothing to draw.

    Args:
        title: for the caption and for screen readers.
        log_y: logarithmic y axis; values not above 0 are left out.
        percent: show y as percentages.
        from_zero: let the y axis start at 0.
    """
    lines = []
    for one in series:
        x, y = np.asarray(one.x, dtype=float), np.asarray(one.y, dtype=float)
        kept = np.isfinite(x) & np.isfinite(y) & (y > 0 if log_y else True)
        if kept.any():
            lines.append((one.name, *_thinned(x[kept], y[kept])))
    if not lines:
        return Markup()
    all_x = np.concatenate([x for _, x, _ in lines])
    all_y = np.concatenate([y for _, _, y in lines])
    axes = _Axes(
        _padded(all_x.min(), all_x.max(), 0),
        _log_range(all_y) if log_y else _padded(0 if from_zero else all_y.min(), all_y.max(), 0.05),
        log_y,
    )
    axes.frame(x_label, y_label, percent)
    legend = []
    for index, (name, x, y) in enumerate(lines):
        style = f"s{index % 4}"
        points = " ".join(f"{axes.x(a):.1f},{axes.y(b):.1f}" for a, b in zip(x, y, strict=True))
        dash = _DASHES[index % 4]
        if len(x) > 1:
            axes.parts.append(
                f'<polyline class="line {style}" stroke-dasharray="{dash}" points="{points}"/>'
            )
        if len(x) <= 40:
            axes.parts += [
                f'<circle class="dot {style}" cx="{axes.x(a):.1f}" cy="{axes.y(b):.1f}" r="3">'
                f"<title>{escape(name)} {_number(a)}: {_number(b, percent)}</title></circle>"
                for a, b in zip(x, y, strict=True)
            ]
        legend.append(_legend_entry(name, style, dash, _number(y[-1], percent)))
    return _figure(title, axes.width, axes.height, axes.parts, legend)


def bar_chart(title: str, bars: Sequence[Bar], *, percent: bool = True) -> Markup:
    """Horizontal bars with whiskers for intervals, one row each, in the given order."""
    bars = [bar for bar in bars if math.isfinite(bar.value)]
    if not bars:
        return Markup()
    row, left = 18, 16 + 8 * max(len(bar.name) for bar in bars)
    height = 2 * 6 + row * len(bars)
    top = max(
        max(bar.value, bar.high if bar.high is not None and math.isfinite(bar.high) else 0)
        for bar in bars
    )
    scale = (WIDTH - left - 76) / max(top, 1e-9)
    parts = []
    for index, bar in enumerate(bars):
        y = 6 + row * index
        note = f" ({bar.note})" if bar.note else ""
        interval = ""
        if bar.low is not None and bar.high is not None and math.isfinite(bar.low + bar.high):
            interval = f", {_number(bar.low, percent)} to {_number(bar.high, percent)}"
        tip = f"{bar.name}: {_number(bar.value, percent)}{interval}{note}"
        parts.append(
            f'<g><title>{escape(tip)}</title><rect class="fill s0" x="{left}" y="{y + 3}" '
            f'width="{max(bar.value * scale, 0.5):.1f}" height="{row - 6}" rx="2"/>'
        )
        end = bar.value * scale
        if interval:
            low, high = left + bar.low * scale, left + bar.high * scale  # type: ignore[operator]
            middle = y + row / 2
            parts.append(
                f'<path class="whisker" d="M{low:.1f} {middle}H{high:.1f}'
                f'M{low:.1f} {middle - 3}v6M{high:.1f} {middle - 3}v6"/>'
            )
            end = max(end, high - left)
        parts.append(_text(left - 6, y + row / 2 + 4, bar.name, "end"))
        parts.append(_text(left + end + 6, y + row / 2 + 4, _number(bar.value, percent), "start"))
        parts.append("</g>")
    return _figure(title, WIDTH, height, parts)


def matrix_chart(title: str, matrix: np.ndarray, labels: Sequence[str]) -> Markup:
    """A square matrix of counts as cells, rows normalised: share of each row's total as opacity.

    Args:
        matrix: [n, n] counts, reference by hypothesis.
        labels: [n] names.
    """
    n, cell, margin = len(labels), 13, 40
    totals = matrix.sum(axis=1)
    size = margin + n * cell + 6
    parts = [_text(margin + n * cell / 2, 10, "decoded", "middle")]
    parts.append(
        f'<text transform="translate(9 {margin + n * cell / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">reference</text>'
    )
    for index, label in enumerate(labels):
        middle = margin + index * cell + cell / 2
        parts.append(_text(margin - 3, middle + 3, label, "end", "tiny"))
        parts.append(
            f'<text class="tiny" transform="translate({middle + 3:.1f} {margin - 4}) rotate(-90)">'
            f"{escape(label)}</text>"
        )
        parts.append(
            f'<path class="grid" d="M{margin} {margin + index * cell}h{n * cell}'
            f'M{margin + index * cell} {margin}v{n * cell}"/>'
        )
    for r, c in zip(*np.nonzero(matrix), strict=True):
        share = matrix[r, c] / totals[r]
        parts.append(
            f'<rect class="heat{" off" if r != c else ""}" x="{margin + c * cell}" '
            f'y="{margin + r * cell}" width="{cell}" height="{cell}" '
            f'fill-opacity="{min(1.0, 0.08 + 0.92 * math.sqrt(share)):.2f}">'
            f"<title>{escape(labels[r])} decoded as {escape(labels[c])}: {int(matrix[r, c])} of "
            f"{int(totals[r])} ({100 * share:.1f} %)</title></rect>"
        )
    return _figure(title, size, size, parts, scroll=True)


def posterior_chart(
    title: str, posteriors: np.ndarray, labels: Sequence[str], seconds_per_frame: float
) -> Markup:
    """Probability of each shown class over time, dark where it is high.

    Args:
        posteriors: [n_classes_shown, n_frames] in 0 … 1.
        labels: [n_classes_shown].
        seconds_per_frame: 0.08 with a patch stride of 4 bins.
    """
    n, frames = posteriors.shape
    row, left, bottom = 14, 62, 34
    width = max(WIDTH, min(960, left + 14 + 5 * frames))
    cell = (width - left - 14) / max(frames, 1)
    parts = []
    for index, label in enumerate(labels):
        y = 4 + index * row
        parts.append(_text(left - 5, y + row - 4, label, "end", "tiny"))
        parts.append(f'<path class="grid" d="M{left} {y + row}H{width - 14}"/>')
        for frame in np.flatnonzero(posteriors[index] >= 0.04):
            probability = float(posteriors[index, frame])
            parts.append(
                f'<rect class="heat" x="{left + frame * cell:.1f}" y="{y + 1}" '
                f'width="{cell:.1f}" height="{row - 2}" fill-opacity="{min(probability, 1):.2f}">'
                f"<title>{escape(label)} at {frame * seconds_per_frame:.2f} s: "
                f"{100 * probability:.0f} %</title></rect>"
            )
    base = 4 + n * row
    for tick in _ticks(0.0, frames * seconds_per_frame):
        x = left + tick / seconds_per_frame * cell
        parts.append(_text(x, base + 14, _number(tick), "middle", "tiny"))
    parts.append(_text((left + width) / 2, base + 28, "seconds", "middle", "tiny"))
    return _figure(title, width, base + bottom, parts, scroll=True)


# --- pieces ---------------------------------------------------------------------------------------


def _figure(
    title: str,
    width: float,
    height: float,
    parts: Sequence[str],
    legend: Sequence[str] = (),
    scroll: bool = False,
) -> Markup:
    least = f"min-width:{min(width, 620):.0f}px;" if scroll else ""
    style = f' style="{least}max-width:{1.5 * width:.0f}px"'
    keys = f'<p class="legend">{"".join(legend)}</p>' if legend else ""
    return Markup(
        f"<figure><figcaption>{escape(title)}</figcaption>{keys}"
        f'<div class="{"scroll" if scroll else "chart"}">'
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}"{style} role="img" '
        f'aria-label="{escape(title, quote=True)}">{"".join(parts)}</svg></div></figure>'
    )


def _legend_entry(name: str, style: str, dash: str, last: str) -> str:
    return (
        f'<span><svg viewBox="0 0 26 8" class="key" aria-hidden="true"><path class="line {style}" '
        f'stroke-dasharray="{dash}" d="M1 4H25"/></svg>{escape(name)} '
        f'<b title="last value">{last}</b></span>'
    )


def _text(x: float, y: float, content: str, anchor: str, style: str = "") -> str:
    name = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{name}>{escape(content)}</text>'


def _number(value: float, percent: bool = False) -> str:
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


def _ticks(low: float, high: float, log: bool = False, about: int = 5) -> list[float]:
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        factors = (1, 2, 5) if last - first <= 2 else (1,)
        ticks = [f * 10.0**e for e in range(first, last + 1) for f in factors]
        return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
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


def _log_range(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low / 1.2, high * 1.2) if high > low * 1.01 else (low / 2, high * 2)


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_MAX_POINTS` points: neighbours averaged, so that a spike still shows as a bump."""
    if len(x) <= _MAX_POINTS:
        return x, y
    groups = np.array_split(np.arange(len(x)), _MAX_POINTS)
    return np.array([x[g].mean() for g in groups]), np.array([y[g].mean() for g in groups])
