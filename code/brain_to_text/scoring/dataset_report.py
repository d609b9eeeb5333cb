"""The page about a dataset: what is in it, what is wrong with it, how it drifts."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from ..dataset.drift import MEAN_MOVED, STD_MOVED
from ..dataset.manifest import SPLITS
from ..dataset.trial_record import Finding, TrialRecord
from ..dataset.validation import SplitSummary, ValidationReport
from . import charts
from .charts import Bar, Series
from .report import details, figures, key_values, page, table, tiles

_FINDINGS = 200  # rows of one table; the JSON report has all
_BARS = 12  # of a histogram
_DUPLICATES = ("duplicate trial", "duplicate session", "repeated number")


def dataset_page(report: ValidationReport) -> str:
    """One self-contained HTML document about a validated dataset."""
    manifest = report.manifest
    counts = {split: len(manifest.select(split)) for split in SPLITS}
    others = [f for f in report.findings if f.kind not in _DUPLICATES]
    duplicates = [f for f in report.findings if f.kind in _DUPLICATES]
    verdict = "nothing to repair" if not report.errors else "to repair or exclude"
    headline = tiles(
        [
            ("Sessions", f"{len(manifest.sessions)}", _first_and_last(manifest.sessions)),
            *(
                (f"Trials, {split}", f"{count:,}", "" if count else "none")
                for split, count in counts.items()
            ),
            ("Errors", f"{len(report.errors):,}", verdict),
            ("Warnings", f"{len(report.warnings):,}", "worth a look"),
        ]
    )
    sections = [
        ("", headline),
        ("Errors and warnings", _findings(others) or "<p>None.</p>"),
        ("Duplicates", _duplicates(duplicates, report.shared_sentences)),
        ("Sessions and splits", _splits(report.rows)),
        ("Lengths and labels", _lengths(manifest.trials)),
        ("Drift between sessions", _drift(report)),
        (
            "Dataset",
            key_values(
                {
                    "Location": report.url,
                    "Fingerprint": manifest.fingerprint(),
                    "Features per bin": manifest.n_features,
                    "Classes": manifest.n_classes or None,
                    "Label form": manifest.label_form,
                    "Files": f"{len(manifest.files):,}, "
                    f"{sum(f.size for f in manifest.files.values()) / 1e6:,.1f} MB",
                    "Notes": "; ".join(report.notes) or None,
                }
            ),
        ),
    ]
    checked = f"checked {time.strftime('%Y-%m-%d %H:%M')}, every trial of every file"
    return page(f"Dataset {report.url}", sections, checked)


def _findings(findings: Sequence[Finding]) -> str:
    """One foldable table per kind, errors first."""
    by_kind: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        by_kind[finding.severity, finding.kind].append(finding)
    parts = []
    for (severity, kind), group in by_kind.items():
        rows = [(f.key, f.trial or "", f.reason) for f in group[:_FINDINGS]]
        more = len(group) - len(rows)
        note = f"<p>And {more:,} more: see --json.</p>" if more else ""
        title = f"{severity.capitalize()}: {kind} ({len(group):,})"
        parts.append(details(title, table(["file", "trial", "what"], rows, text=(2,)) + note))
    return "".join(parts)


def _duplicates(findings: Sequence[Finding], shared_sentences: int) -> str:
    between = [f for f in findings if f.severity == "error"]
    lines = [
        "Features are compared by their means over parts of the time and of the channels, so that "
        "neither storage nor rounding hides a copy; block and trial numbers within a session. "
        + (
            f"{len(between):,} trials occur twice where they must not."
            if between
            else "No trial of one split is in another."
        )
    ]
    if shared_sentences:
        lines.append(
            f"{shared_sentences:,} sentences were spoken for training and for validation, too: a "
            "language model of the training sentences has seen them."
        )
    return "".join(f"<p>{line}</p>" for line in lines) + _findings(findings)


def _splits(rows: Sequence[SplitSummary]) -> str:
    per_session: dict[str, dict[str, SplitSummary]] = defaultdict(dict)
    for row in rows:
        per_session[row.session][row.split] = row
    trials = [
        Bar(
            session,
            sum(row.trials for row in splits.values()),
            note=", ".join(f"{row.trials} {split}" for split, row in splits.items()),
        )
        for session, splits in per_session.items()
    ]
    bins = [
        Bar(
            session,
            float(np.average([r.bins[1] for r in found], weights=[r.trials for r in found])),
            min(r.bins[0] for r in found),
            max(r.bins[2] for r in found),
            "bins; mean, shortest, longest",
        )
        for session, splits in per_session.items()
        if (found := [row for row in splits.values() if row.trials])
    ]
    body = table(
        ["session", "split", "trials", "damaged", "bins", "labels", "mean", "std", "min", "max"],
        [
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
    )
    return figures(
        [
            charts.bar_chart("Trials per session", trials, percent=False),
            charts.bar_chart("Bins of 20 ms per trial, by session", bins, percent=False),
        ]
    ) + details("Counts, lengths and value ranges: numbers", body)


def _lengths(trials: Sequence[TrialRecord]) -> str:
    spoken = [t for t in trials if t.phoneme_ids is not None and len(t.phoneme_ids)]
    labelled = [t for t in trials if t.class_ids is not None]
    return figures(
        [
            _histogram("Seconds per trial", [0.02 * t.n_time_steps for t in trials], 1),
            _histogram("Labels per trial", [len(t.class_ids) for t in labelled], 0),  # type: ignore[arg-type]
            _histogram(
                "Bins per phoneme",
                [t.n_time_steps / len(t.phoneme_ids) for t in spoken],  # type: ignore[arg-type]
                1,
            ),
        ]
    )


def _histogram(title: str, values: Sequence[float], digits: int) -> str:
    """Trials by ranges of equal width."""
    if not values or min(values) == max(values):
        return ""
    count, edges = np.histogram(values, bins=_BARS)
    bars = [
        Bar(f"{low:.{digits}f} – {high:.{digits}f}", float(n))
        for n, low, high in zip(count, edges, edges[1:], strict=False)
    ]
    return charts.bar_chart(f"{title} (number of trials)", bars, percent=False)


def _drift(report: ValidationReport) -> str:
    drift, width = report.drift, report.manifest.n_features
    if not drift:
        return "<p>There is one session, so nothing to compare.</p>"
    place = list(range(2, len(drift) + 2))
    drawn = [
        charts.line_chart(
            "Shift against the session before",
            [
                Series("means, in standard deviations", place, [r.mean_shift for r in drift]),
                Series("standard deviations, in log2", place, [r.std_shift for r in drift]),
            ],
            x_label="session",
            from_zero=True,
        ),
        charts.line_chart(
            "Likeness of the correlations between channels",
            [Series("to the session before", place, [r.likeness for r in drift])],
            x_label="session",
            from_zero=all(r.likeness >= 0 for r in drift),
        ),
        charts.line_chart(
            "Channels that moved",
            [
                Series("another mean", place, [r.mean_moved / width for r in drift]),
                Series("another deviation", place, [r.std_moved / width for r in drift]),
            ],
            x_label="session",
            percent=True,
            from_zero=True,
        ),
    ]
    body = table(
        [
            "session",
            "means shift",
            "channels",
            "deviations shift",
            "channels",
            "correlations",
            "furthest channels",
        ],
        [
            (
                row.session,
                f"{row.mean_shift:.3f}",
                row.mean_moved,
                f"{row.std_shift:.3f}",
                row.std_moved,
                f"{row.likeness:.3f}",
                ", ".join(f"{channel}: {shift:+.2f}" for channel, shift in row.furthest),
            )
            for row in drift
        ],
    )
    return (
        '<p class="soft">Shifts are root mean squares over '
        f"{width} channels. A channel counts as moved when its mean moves by {MEAN_MOVED} standard "
        "deviations and by more than the spread of the trials' means explains, or when its "
        f"deviation changes {STD_MOVED}-fold. Z-scored data should not move in either; what still "
        "changes is how channels go together, which a decoder's day layers make up for.</p>"
        + figures(drawn)
        + details("Drift: numbers", body)
    )


def _first_and_last(sessions: Sequence[str]) -> str:
    return " … ".join(dict.fromkeys([*sessions[:1], *sessions[-1:]]))
