"""Self-contained HTML pages about a model and about a dataset: what the templates need.

No script, no font, no image and no style sheet is loaded: a page opens from a USB stick.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from ..dataset.manifest import TrialManifest
from ..dataset.trial_record import TrialRecord
from ..dataset.trial_table import SPLITS
from ..dataset.validation import SplitSummary, ValidationReport
from ..errors import Finding
from ..labels.phonemes import BLANK, PHONEMES

_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 466, 14, 220  # of the plot, in a chart of 480 by 260
_MAX_POINTS = 600  # per drawn line; more are averaged
_REMARKS = 200  # rows of one table; summary.json or --json has all
_BARS = 12  # of a histogram
_DUPLICATES = ("duplicate trial", "repeated number")
_GROUPS = {
    "session": "by session",
    "corpus": "by corpus",
    "sentence": "on sentences seen in training, and others",
    "length": "by phonemes in the sentence",
    "block": "by block, worst first",
}
# title → name of a line → kind and key of its numbers
_CURVES: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "Loss (nats per frame)": {
        "training": ("train", "loss"),
        "phoneme term": ("train", "phoneme_loss"),
        "validation CTC": ("validation", "ctc_loss"),
    },
    "Error rates on validation": {
        "DER": ("validation", "der"),
        "PER": ("validation", "per"),
        "PER, diphone path": ("validation", "per_path"),
    },
    "Learning rate": {"learning rate": ("train", "learning_rate")},
    "Gradient norm": {"before clipping": ("train", "grad_norm")},
    "Throughput": {"trials per second": ("train", "trials_per_second")},
    "Waiting for data": {"share of the time": ("train", "data_wait_share")},
}
_IN_PERCENT = ("Error rates on validation", "Waiting for data")


# --- charts: where lines and ticks go; templates/charts.html draws them ---------------------------

# Colours are CSS variables of the page (templates/style.css); series differ in dash pattern and end
# label too, and cells of a matrix in their opacity: no chart depends on telling hues apart.


def line_chart(
    title: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    percent: bool = False,
) -> dict[str, Any] | None:
    """Lines over a shared axis of training batches, from zero; None without anything to draw.

    Args:
        title: for the caption and for screen readers.
        series: name → (x, y), both [n]; points where either is not finite are left out.
        percent: show y as percentages.
    """
    lines = {}
    for name, one in series.items():
        x, y = (np.asarray(values, dtype=float) for values in one)
        drawn = np.isfinite(x) & np.isfinite(y)
        if drawn.any():
            # where there are too many, neighbours are averaged: a spike still shows as a bump
            groups = np.array_split(np.flatnonzero(drawn), min(drawn.sum(), _MAX_POINTS))
            lines[name] = tuple(np.array([v[g].mean() for g in groups]) for v in (x, y))
    if not lines:
        return None
    first, last = min(x[0] for x, _ in lines.values()), max(x[-1] for x, _ in lines.values())
    last = max(last, first + 1)
    top = 1.05 * max(0.0, *(y.max() for _, y in lines.values())) or 1.0

    def place_x(values: Any) -> Any:
        return _LEFT + (values - first) / (last - first) * (_RIGHT - _LEFT)

    def place_y(values: Any) -> Any:
        return _BOTTOM - values / top * (_BOTTOM - _TOP)

    return {
        "title": title,
        "percent": percent,
        "lines": [
            (name, list(zip(place_x(x), place_y(y), x, y, strict=True)))
            for name, (x, y) in lines.items()
        ],
        "x_ticks": [(place_x(tick), tick) for tick in ticks(first, last)],
        "y_ticks": [(place_y(tick), tick) for tick in ticks(0, top)],
    }


def number(value: float, percent: bool = False) -> str:
    """A few significant digits, thousands as k."""
    if percent:
        return f"{100 * value:.3g} %"
    return f"{value / 1000:.4g}k" if abs(value) >= 10_000 else f"{value:.4g}"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`."""
    power = 10 ** math.floor(math.log10((high - low) / about))
    step = next(power * f for f in (1, 2, 5, 10) if (high - low) / (power * f) <= about)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [tick * step for tick in range(first, last + 1)]


# --- templates -----------------------------------------------------------------------------------


# Everything that a page shows but `Markup` is escaped.
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.globals["ticks"] = ticks
TEMPLATES.filters |= {
    "anchor": lambda heading: "".join(c if c.isalnum() else "-" for c in heading.lower()),
    "between": lambda rate: f"{100 * rate['low']:.2f} to {100 * rate['high']:.2f} %",
    "number": number,
    "percent": lambda value: f"{100 * value:.2f} %",
    "points": lambda difference: f"{100 * difference:+.2f}",
    "preformatted": lambda text: Markup("<pre>{}</pre>").format(text),
    "thousands": lambda count: f"{count:,}",
}


# --- a model --------------------------------------------------------------------------------------


def model_report(contents: Mapping[str, Any]) -> str:
    """The page about one model, from plain dicts; whatever is absent is left out.

    Args:
        contents:
            title, subtitle, split: text.
            rates: name → {value, low, high} of DER, PER, PER (diphone path), WER.
            n_trials: scored trials.
            metrics: rows by kind, "train" and "validation", by the names of metrics.jsonl.
            counts: name → {substitutions, deletions, insertions, reference_labels}.
            groups: name of a rate → "session" | "corpus" | "block" | "length" | "sentence" → name →
                {value, low, high, n_trials, tokens}; the charts show PER, the tables all.
            confusion: [41, 41] counts, row 0 insertions, column 0 deletions.
            worst_diphones: rows {diphone, rate, errors, tokens}.
            examples: rows {heading, name, sentence, decoded, alignment, posteriors, labels, kind,
                seconds_per_frame}.
            comparison: {other, n_trials, left_out, metrics: name → as `compare_paired`}.
            members: of an ensemble, rows {model, rates}.
            remarks: sentences about what was left out or is in doubt.
            config: YAML text. words, data, environment: facts.
    """
    remarks = contents.get("remarks", ())
    matrix = np.asarray(contents.get("confusion") or 0)
    return TEMPLATES.get_template("model.html").render(
        {
            "title": "Model report",
            **contents,
            "doubts": [line for line in remarks if line.startswith("WARNING")],
            "others": [line for line in remarks if not line.startswith("WARNING")],
            "most": _REMARKS,
            "curves": _curves(contents.get("metrics", {})),
            "charted": _groups(contents.get("groups", {})),
            "symbols": ["none" if c == BLANK else p.strip() for c, p in enumerate(PHONEMES)],
            "confusion": matrix.tolist() if matrix.any() else None,
        }
    )


def _curves(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any] | None]:
    charts = []
    for title, lines in _CURVES.items():
        series = {}
        for name, (kind, key) in lines.items():
            rows = [r for r in metrics.get(kind, ()) if isinstance(r.get(key), (int, float))]
            series[name] = [row["step"] for row in rows], [row[key] for row in rows]
        charts.append(line_chart(title, series, title in _IN_PERCENT))
    return charts


def _groups(rates: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per kind of group that has several: its bars of one rate, and the rows of all rates."""
    found = []
    for kind, heading in _GROUPS.items():
        rows = {name: kinds[kind] for name, kinds in rates.items() if len(kinds.get(kind, ())) > 1}
        if not rows:
            continue
        metric = "PER" if "PER" in rows else next(iter(rows))
        bars = [
            {**row, "name": str(name), "note": f"{row['n_trials']} trials"}
            for name, row in rows[metric].items()
        ]
        if kind == "block":
            bars = sorted(bars, key=lambda bar: -bar["value"])[:20]
        columns = [column for name in rows for column in (name, "95 % interval", "labels")]
        found.append(
            {
                "heading": heading,
                "headers": [kind, "trials", *columns],
                "metric": metric,
                "bars": bars,
                "rates": rows,
            }
        )
    return found


# --- a dataset ------------------------------------------------------------------------------------


def dataset_page(report: ValidationReport) -> str:
    """The page about a validated dataset: what is in it, and what is wrong with it."""
    manifest = report.manifest
    duplicates = [f for f in report.findings if f.kind in _DUPLICATES]
    sessions = manifest.sessions
    return TEMPLATES.get_template("dataset.html").render(
        {
            "title": f"Dataset {report.url}",
            "subtitle": f"checked {time.strftime('%Y-%m-%d %H:%M')}, every trial of every file",
            "sessions": sessions,
            "counts": {split: len(manifest.select(split)) for split in SPLITS},
            "n_errors": len(report.errors),
            "n_warnings": len(report.warnings),
            "findings": _folded(f for f in report.findings if f.kind not in _DUPLICATES),
            "duplicates": _folded(duplicates),
            "n_between": sum(f.severity == "error" for f in duplicates),
            "shared_sentences": report.shared_sentences,
            "by_session": _by_session(report.rows),
            "splits": report.rows,
            "lengths": _lengths(manifest.trials),
            "facts": dataset_facts(manifest, report.url),
        }
    )


def dataset_facts(manifest: TrialManifest, url: str) -> dict[str, Any]:
    """What a page says about a dataset in a table."""
    by_split = {split: len(manifest.select(split)) for split in SPLITS}
    sessions, size = manifest.sessions, sum(file.size for file in manifest.files.values())
    return {
        "Location": url,
        "Fingerprint": manifest.fingerprint(),
        "Trials": ", ".join(f"{count:,} {split}" for split, count in by_split.items() if count),
        "Sessions": f"{len(sessions)}, {sessions[0]} … {sessions[-1]}" if sessions else "none",
        "Features per bin": manifest.n_features,
        "Classes": manifest.n_classes or None,
        "Label form": manifest.label_form,
        "Files": f"{len(manifest.files):,}, {size / 1e6:,.1f} MB",
    }


def _folded(findings: Iterable[Finding]) -> list[tuple[str, list[Finding], int]]:
    """(title, the first findings, how many more) by severity and kind."""
    by_kind: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        by_kind[finding.severity, finding.kind].append(finding)
    return [
        (
            f"{severity.capitalize()}: {kind} ({len(group):,})",
            group[:_REMARKS],
            max(len(group) - _REMARKS, 0),
        )
        for (severity, kind), group in by_kind.items()
    ]


def _by_session(rows: Sequence[SplitSummary]) -> dict[str, list[dict[str, Any]]]:
    """Bars of two charts: trials, and bins per trial, of each session."""
    per_session: dict[str, list[SplitSummary]] = defaultdict(list)
    for row in rows:
        per_session[row.session].append(row)
    trials, bins = [], []
    for session, splits in per_session.items():
        note = ", ".join(f"{row.trials} {row.split}" for row in splits)
        trials.append({"name": session, "value": sum(r.trials for r in splits), "note": note})
        if found := [row for row in splits if row.trials]:
            bins.append(
                {
                    "name": session,
                    "value": np.average(
                        [r.bins[1] for r in found], weights=[r.trials for r in found]
                    ),
                    "low": min(r.bins[0] for r in found),
                    "high": max(r.bins[2] for r in found),
                    "note": "bins; mean, shortest, longest",
                }
            )
    return {"Trials per session": trials, "Bins of 20 ms per trial, by session": bins}


def _lengths(trials: Sequence[TrialRecord]) -> dict[str, list[dict[str, Any]]]:
    """Bars of three histograms."""
    spoken = [(t.n_time_steps, t.phoneme_ids) for t in trials if t.phoneme_ids is not None]
    labels = [len(t.class_ids) for t in trials if t.class_ids is not None]
    bins = [n / len(phonemes) for n, phonemes in spoken if len(phonemes)]
    return {
        "Seconds per trial": _histogram([0.02 * t.n_time_steps for t in trials], 1),
        "Labels per trial": _histogram(labels, 0),
        "Bins per phoneme": _histogram(bins, 1),
    }


def _histogram(values: Sequence[float], digits: int) -> list[dict[str, Any]]:
    """Trials by ranges of equal width."""
    if not values or min(values) == max(values):
        return []
    counts, edges = np.histogram(values, bins=_BARS)
    return [
        {"name": f"{low:.{digits}f} – {high:.{digits}f}", "value": float(count)}
        for count, low, high in zip(counts, edges, edges[1:], strict=False)
    ]
