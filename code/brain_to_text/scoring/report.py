"""Self-contained HTML pages about a model and about a dataset: rows and charts for the templates.

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

from ..dataset.manifest_format import SPLITS
from ..dataset.trial_record import Finding, TrialRecord
from ..dataset.validation import SplitSummary, ValidationReport
from ..labels.phonemes import BLANK, PHONEMES
from . import charts
from .charts import Bar, Series

_TEMPLATES = Path(__file__).with_name("templates")
_REMARKS = 200  # rows of one table; summary.json or --json has all
_BARS = 12  # of a histogram
_DUPLICATES = ("duplicate trial", "duplicate session", "repeated number")
_GROUPS = {
    "session": "by session",
    "corpus": "by corpus",
    "sentence": "on sentences seen in training, and others",
    "length": "by phonemes in the sentence",
    "block": "by block, worst first",
}


def render(template: str, contents: Mapping[str, Any]) -> str:
    """A page from one of the templates; everything in `contents` but `Markup` is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "anchor": lambda heading: "".join(c if c.isalnum() else "-" for c in heading.lower()),
        "thousands": lambda number: f"{number:,}",
        "preformatted": lambda text: Markup("<pre>{}</pre>").format(text),
    }
    return environment.get_template(template).render(contents)


# --- a model --------------------------------------------------------------------------------------


def model_report(contents: Mapping[str, Any]) -> str:
    """The page about one model, from plain dicts; whatever is absent is left out.

    Args:
        contents:
            title, subtitle: text.
            rates: name → {value, low, high} of DER, PER, PER (diphone path), WER.
            n_trials: scored trials.
            metrics: what `read_metrics` returns.
            counts: name → {substitutions, deletions, insertions, reference_labels}.
            groups: name of a rate → "session" | "corpus" | "block" | "length" | "sentence" → name →
                {value, low, high, n_trials, tokens}; the charts show PER, the tables all.
            confusion: [41, 41] counts, row 0 insertions, column 0 deletions.
            worst_diphones: rows {diphone, rate, errors, tokens}.
            examples: rows {name, sentence, decoded, alignment, posteriors, labels,
                seconds_per_frame}.
            comparison: {other, n_trials, left_out, metrics: name → fields of `PairedComparison`}.
            members: of an ensemble, rows {model, rates, comparison}.
            remarks: sentences about what was left out or is in doubt.
            words: {settings, examples}.
            config: YAML text. data, environment: facts.
    """
    rates = contents.get("rates", {})
    headline = [
        (name, _percent(rate["value"]), _between(rate)) for name, rate in rates.items() if rate
    ]
    if contents.get("n_trials"):
        headline.append(("Trials", f"{contents['n_trials']:,}", contents.get("split", "")))
    remarks = list(contents.get("remarks", ()))
    doubts = [line for line in remarks if line.startswith("WARNING")]
    others = [line for line in remarks if line not in doubts]
    more = len(others) - _REMARKS
    shown = others[:_REMARKS] + ([f"And {more:,} more: see summary.json."] if more > 0 else [])
    words = contents.get("words") or {}
    return render(
        "model.html",
        {
            "title": contents.get("title", "Model report"),
            "subtitle": contents.get("subtitle", ""),
            "headline_numbers": headline,
            "rates": rates,
            "doubts": doubts,
            "remarks": [(line,) for line in shown],
            "n_remarks": f"{len(others):,}",
            "comparison": _comparison(contents.get("comparison")),
            "members": _members(contents),
            "curves": _curves(contents.get("metrics", {})),
            "groups": _groups(contents.get("groups", {})),
            "errors": _errors(contents),
            "examples": [_example(example) for example in contents.get("examples", ())],
            "words": {
                "settings": words.get("settings"),
                "examples": [
                    (r["reference"], r["decoded"], r["errors"]) for r in words.get("examples", ())
                ],
            },
            "data": contents.get("data"),
            "environment": contents.get("environment"),
            "config": contents.get("config"),
        },
    )


def _curves(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Markup]:
    def of(kind: str, name: str, key: str) -> Series:
        rows = [r for r in metrics.get(kind, ()) if isinstance(r.get(key), (int, float))]
        return Series(name, [row["step"] for row in rows], [row[key] for row in rows])

    validation = metrics.get("validation", ())
    one_rate = all(row.get("per_path") is None for row in validation)
    rates = [] if one_rate else [of("validation", "DER", "der")]
    rates += [
        of("validation", "PER", "per"),
        of("validation", "PER, diphone path", "per_path"),
    ]
    losses = [of("train", "training", "loss"), of("validation", "validation CTC", "ctc_loss")]
    terms = []
    if any("phoneme_weight" in row for row in metrics.get("train", ())):
        terms = [of("train", "diphone", "loss"), of("train", "phoneme", "phoneme_loss")]
    share = [of("train", "share of the time", "data_wait_share")]
    speed = [of("train", "trials per second", "trials_per_second")]
    rate = [of("train", "learning rate", "learning_rate")]
    norm = [of("train", "before clipping", "grad_norm")]
    nats = "nats per frame"
    return [
        charts.line_chart("Loss", losses, y_label=nats, log_y=True),
        charts.line_chart("Error rates on validation", rates, percent=True, from_zero=True),
        charts.line_chart("Learning rate", rate, from_zero=True),
        charts.line_chart("Gradient norm", norm, log_y=True),
        charts.line_chart("Throughput", speed, from_zero=True),
        charts.line_chart("Waiting for data", share, percent=True, from_zero=True),
        charts.line_chart("Loss terms", terms, y_label=nats, log_y=True),
    ]


def _groups(rates: Mapping[str, Any]) -> dict[str, Any]:
    drawn, tables = [], []
    for kind, heading in _GROUPS.items():
        groups = {
            name: kinds[kind] for name, kinds in rates.items() if len(kinds.get(kind, ())) > 1
        }
        if not groups:
            continue
        metric = "PER" if "PER" in groups else next(iter(groups))
        rows = list(groups[metric].items())
        if kind == "block":
            rows = sorted(rows, key=lambda row: -row[1]["value"])[:20]
        bars = [
            Bar(str(name), row["value"], row["low"], row["high"], f"{row['n_trials']} trials")
            for name, row in rows
        ]
        drawn.append(charts.bar_chart(f"{metric} {heading}", bars))
        columns = [column for name in groups for column in (name, "95 % interval", "labels")]
        numbers = [
            (
                name,
                row["n_trials"],
                *(cell for rows_of in groups.values() for cell in _rate_cells(rows_of.get(name))),
            )
            for name, row in groups[metric].items()
        ]
        title = f"Error rates {heading.split(',')[0]}: numbers"
        tables.append((title, [kind, "trials", *columns], numbers))
    return {"charts": drawn, "tables": tables}


def _rate_cells(rate: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if not rate:
        return "", "", ""
    return _percent(rate["value"]), _between(rate), f"{rate['tokens']:,}"


def _errors(contents: Mapping[str, Any]) -> dict[str, Any]:
    kinds = ("substitutions", "deletions", "insertions")
    shown: dict[str, Any] = {
        "counts": [
            (
                name,
                *(f"{c[kind]:,}" for kind in kinds),
                f"{c['reference_labels']:,}",
                _percent(sum(c[kind] for kind in kinds) / max(c["reference_labels"], 1)),
            )
            for name, c in contents.get("counts", {}).items()
        ],
        "diphones": [
            (r["diphone"], _percent(r["rate"]), r["errors"], r["tokens"])
            for r in contents.get("worst_diphones", ())
        ],
    }
    matrix = np.asarray(contents.get("confusion") or 0)
    if matrix.any():
        labels = [symbol.strip() for symbol in PHONEMES]
        labels[BLANK] = "none"
        title = "Phoneme confusions (row “none”: insertions; column: deletions)"
        shown["matrix"] = charts.matrix_chart(title, matrix, labels)
        shown["confusions"] = _top_confusions(matrix, labels)
    return shown


def _top_confusions(matrix: np.ndarray, labels: Sequence[str], most: int = 25) -> list[tuple]:
    off = matrix.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:most]
    return [
        (labels[r], labels[c], int(off[r, c]), _percent(off[r, c] / max(matrix[r].sum(), 1)))
        for r, c in (np.unravel_index(flat, off.shape) for flat in order)
        if off[r, c]
    ]


def _example(example: Mapping[str, Any]) -> dict[str, Any]:
    chart = charts.posterior_chart(
        f"Posteriors of the most probable {example.get('kind', 'classes')}",
        np.asarray(example["posteriors"]),
        example["labels"],
        example["seconds_per_frame"],
    )
    return {**example, "chart": chart}


def _comparison(comparison: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not comparison:
        return None
    rows = [
        (
            name,
            _percent(c["rate_a"]),
            _percent(c["rate_b"]),
            f"{100 * c['difference']['value']:+.2f} points",
            f"{100 * c['difference']['low']:+.2f} to {100 * c['difference']['high']:+.2f}",
            f"{c['p_value']:.2g}",
            f"{c['trials_better']} / {c['trials_worse']}",
        )
        for name, c in comparison["metrics"].items()
    ]
    return {"left_out": {}, **comparison, "rows": rows}


def _members(contents: Mapping[str, Any]) -> dict[str, Any] | None:
    members = contents.get("members")
    if not members:
        return None
    names = [n for n in ("DER", "PER", "WER") if any(n in m.get("rates", {}) for m in members)]

    def row(model: str, rates: Mapping[str, Any], per: Mapping[str, Any] | None) -> tuple:
        cells = [f"{_percent(rates[n]['value'])}" if n in rates else "" for n in names]
        if per is None:
            return (model, *cells, "", "", "")
        d = per["difference"]
        interval = f"{100 * d['low']:+.2f} to {100 * d['high']:+.2f}"
        return (model, *cells, f"{100 * d['value']:+.2f} points", interval, f"{per['p_value']:.2g}")

    rows = [row("the whole", contents.get("rates", {}), None)]
    rows += [row(m["model"], m.get("rates", {}), m.get("comparison")) for m in members]
    return {"headers": [*names, "PER difference", "95 % interval", "p"], "rows": rows}


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %" if math.isfinite(value) else "–"


def _between(rate: Mapping[str, Any]) -> str:
    low, high = rate.get("low"), rate.get("high")
    if low is None or high is None or not math.isfinite(low + high):
        return ""
    return f"{100 * low:.2f} to {100 * high:.2f} %"


# --- a dataset ------------------------------------------------------------------------------------


def dataset_page(report: ValidationReport) -> str:
    """The page about a validated dataset: what is in it, and what is wrong with it."""
    manifest = report.manifest
    counts = {split: len(manifest.select(split)) for split in SPLITS}
    duplicates = [f for f in report.findings if f.kind in _DUPLICATES]
    sessions = manifest.sessions
    verdict = "nothing to repair" if not report.errors else "to repair or exclude"
    return render(
        "dataset.html",
        {
            "title": f"Dataset {report.url}",
            "subtitle": f"checked {time.strftime('%Y-%m-%d %H:%M')}, every trial of every file",
            "headline_numbers": [
                (
                    "Sessions",
                    f"{len(sessions)}",
                    " … ".join(dict.fromkeys([*sessions[:1], *sessions[-1:]])),
                ),
                *((f"Trials, {s}", f"{n:,}", "" if n else "none") for s, n in counts.items()),
                ("Errors", f"{len(report.errors):,}", verdict),
                ("Warnings", f"{len(report.warnings):,}", "worth a look"),
            ],
            "findings": _folded(f for f in report.findings if f.kind not in _DUPLICATES),
            "duplicates": _folded(duplicates),
            "n_between": sum(f.severity == "error" for f in duplicates),
            "shared_sentences": report.shared_sentences,
            "splits": _splits(report.rows),
            "lengths": _lengths(manifest.trials),
            "facts": {
                "Location": report.url,
                "Fingerprint": manifest.fingerprint(),
                "Features per bin": manifest.n_features,
                "Classes": manifest.n_classes or None,
                "Label form": manifest.label_form,
                "Files": f"{len(manifest.files):,}, "
                f"{sum(f.size for f in manifest.files.values()) / 1e6:,.1f} MB",
                "Notes": "; ".join(report.notes) or None,
            },
        },
    )


def _folded(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Rows by severity and kind."""
    by_kind: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        by_kind[finding.severity, finding.kind].append(finding)
    return [
        {
            "title": f"{severity.capitalize()}: {kind} ({len(group):,})",
            "rows": [(f.key, f.trial or "", f.reason) for f in group[:_REMARKS]],
            "more": max(len(group) - _REMARKS, 0),
        }
        for (severity, kind), group in by_kind.items()
    ]


def _splits(rows: Sequence[SplitSummary]) -> dict[str, Any]:
    per_session: dict[str, list[SplitSummary]] = defaultdict(list)
    for row in rows:
        per_session[row.session].append(row)
    trials, bins = [], []
    for session, splits in per_session.items():
        note = ", ".join(f"{row.trials} {row.split}" for row in splits)
        trials.append(Bar(session, sum(row.trials for row in splits), note=note))
        if found := [row for row in splits if row.trials]:
            mean = np.average([r.bins[1] for r in found], weights=[r.trials for r in found])
            shortest, longest = min(r.bins[0] for r in found), max(r.bins[2] for r in found)
            note = "bins; mean, shortest, longest"
            bins.append(Bar(session, float(mean), shortest, longest, note))
    return {
        "charts": [
            charts.bar_chart("Trials per session", trials, percent=False),
            charts.bar_chart("Bins of 20 ms per trial, by session", bins, percent=False),
        ],
        "rows": [
            (
                row.session,
                row.split,
                f"{row.trials:,}",
                row.damaged,
                f"{row.bins[0]} … {row.bins[1]:.0f} … {row.bins[2]}",
                f"{row.labels[0]:.0f} … {row.labels[1]}" if row.labels[1] else "none",
                *(f"{v:.3f}" if row.trials else "" for v in (row.mean, row.std)),
                *(f"{v:.2f}" if row.trials else "" for v in (row.minimum, row.maximum)),
            )
            for row in rows
        ],
    }


def _lengths(trials: Sequence[TrialRecord]) -> list[Markup]:
    spoken = [t for t in trials if t.phoneme_ids is not None and len(t.phoneme_ids)]
    return [
        _histogram("Seconds per trial", [0.02 * t.n_time_steps for t in trials], 1),
        _histogram(
            "Labels per trial", [len(t.class_ids) for t in trials if t.class_ids is not None], 0
        ),
        _histogram(
            "Bins per phoneme",
            [t.n_time_steps / len(t.phoneme_ids) for t in spoken],  # type: ignore[arg-type]
            1,
        ),
    ]


def _histogram(title: str, values: Sequence[float], digits: int) -> Markup:
    """Trials by ranges of equal width."""
    if not values or min(values) == max(values):
        return Markup()
    count, edges = np.histogram(values, bins=_BARS)
    bars = [
        Bar(f"{low:.{digits}f} – {high:.{digits}f}", float(n))
        for n, low, high in zip(count, edges, edges[1:], strict=False)
    ]
    return charts.bar_chart(f"{title} (number of trials)", bars, percent=False)
