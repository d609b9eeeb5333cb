"""One self-contained HTML page about a model: curves, error analysis, examples, provenance.

No script, no font, no image and no style sheet is loaded: the page opens from a USB stick. `page`,
`table`, `tiles` and `key_values` serve other reports in the same style.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import StorageError
from ..labels.phonemes import BLANK, PHONEMES
from . import charts
from .charts import Bar, Series

# Okabe & Ito's palette ("Color Universal Design", 2008), a little lighter on dark ground.
STYLE = """
:root{color-scheme:light dark;--bg:#fff;--card:#f6f7f9;--ink:#1b1f24;--soft:#5a6472;--line:#d8dde3;
--c0:#0072b2;--c1:#d55e00;--c2:#00795a;--c3:#a8487f;--bad:#b34700;--good:#0072b2}
@media (prefers-color-scheme:dark){:root{--bg:#14171b;--card:#1d2127;--ink:#e7eaee;--soft:#a3adb9;
--line:#353c45;--c0:#56b4e9;--c1:#f0a14a;--c2:#3fc79a;--c3:#dd9ac1;--bad:#f0a14a;--good:#56b4e9}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:1.2rem 1rem 4rem}
h1,h3{overflow-wrap:anywhere;line-height:1.25}h1{font-size:1.6rem;margin:.4rem 0}
h2{font-size:1.2rem;margin:2.2rem 0 .6rem;padding-top:.6rem;border-top:1px solid var(--line)}
p,li{max-width:75ch;overflow-wrap:anywhere}.soft{color:var(--soft)}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:1rem 0;font-size:.95rem}a{color:var(--c0)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:.7rem}
.tile{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.6rem .8rem}
.tile b{display:block;font-size:1.45rem;line-height:1.3}
.tile span{font-size:.85rem;color:var(--soft)}
.grid2{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:.9rem}
.grid2{align-items:start}.grid2>*{min-width:0}.wide{max-width:760px;margin-top:.9rem}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.7rem}
figcaption{font-weight:600;font-size:.95rem;margin-bottom:.3rem}
.scroll{overflow-x:auto;max-width:100%}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:12px;font-family:inherit}svg text.tiny{font-size:9.5px}
.grid{stroke:var(--line);stroke-width:1;fill:none}.axis{stroke:var(--soft);fill:none}
.line{fill:none;stroke-width:2;stroke-linejoin:round}.reference{stroke:var(--soft);fill:none;
stroke-dasharray:3 4}.whisker{stroke:var(--ink);stroke-width:1.4;fill:none}
.s0{stroke:var(--c0);--fill:var(--c0)}.s1{stroke:var(--c1);--fill:var(--c1)}
.s2{stroke:var(--c2);--fill:var(--c2)}.s3{stroke:var(--c3);--fill:var(--c3)}
.dot{fill:var(--fill);stroke:none}.fill{fill:var(--fill);stroke:none}
.heat{fill:var(--c0)}.heat.off{fill:var(--c1)}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;margin:.1rem 0 .3rem;font-size:.85rem}
.legend .key{display:inline-block;width:26px;height:8px;margin-right:.35rem}
table{border-collapse:collapse;font-size:.9rem;width:100%}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:600}
th.text,td.text{text-align:left}td.text{white-space:normal;overflow-wrap:anywhere;min-width:14rem}
.warning{border-left:4px solid var(--bad);padding-left:.6rem}
table.keys td{text-align:left;white-space:normal;overflow-wrap:anywhere;vertical-align:top}
table.keys td:first-child{color:var(--soft);width:13rem}
details{margin:.7rem 0}summary{cursor:pointer;font-weight:600}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.8rem;
overflow-x:auto;font-size:.85rem;line-height:1.4}
.alignment{display:flex;flex-wrap:wrap;gap:3px;margin:.4rem 0 .8rem;
font:13px/1.3 ui-monospace,monospace}
.pair{display:grid;text-align:center;min-width:1.9rem;border:1px solid var(--line);
border-radius:4px;background:var(--card)}.pair i{font-style:normal;padding:0 .25rem}
.pair.wrong{border-color:var(--bad);border-width:2px}.pair.wrong i:last-child{color:var(--bad);
font-weight:700}
@media (max-width:520px){svg text{font-size:14px}
table:has(td.text) td{white-space:normal;overflow-wrap:anywhere;vertical-align:top}
td.text{min-width:9rem}}
"""


def page(title: str, sections: Iterable[tuple[str, str]], subtitle: str = "") -> str:
    """A whole HTML document.

    Args:
        title: plain text.
        sections: (heading as plain text, body as HTML); empty bodies are left out. A section
            without a heading comes before the table of contents.
        subtitle: plain text under the title.
    """
    kept = [(heading, body) for heading, body in sections if body]
    named = [heading for heading, _ in kept if heading]
    links = "".join(f'<a href="#{_anchor(h)}">{escape(h)}</a>' for h in named)
    parts = [f"<h1>{escape(title)}</h1>"]
    if subtitle:
        parts.append(f'<p class="soft">{escape(subtitle)}</p>')
    parts += [body for heading, body in kept if not heading]
    if len(named) > 1:
        parts.append(f'<nav aria-label="Sections">{links}</nav>')
    parts += [
        f'<section id="{_anchor(h)}"><h2>{escape(h)}</h2>{body}</section>' for h, body in kept if h
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]], text: Collection[int] = ()) -> str:
    """An HTML table in a container that scrolls by itself; empty without rows.

    Args:
        text: columns of prose, which wrap, instead of numbers and names.
    """
    prose = [' class="text"' if column in text else "" for column in range(len(headers))]
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{style}>{escape(str(cell))}</td>" for cell, style in zip(row, prose, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    if not body:
        return ""
    head = "".join(
        f'<th scope="col"{style}>{escape(name)}</th>'
        for name, style in zip(headers, prose, strict=True)
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def key_values(values: Mapping[str, Any]) -> str:
    """A two-column table of facts; None is left out."""
    rows = "".join(
        f"<tr><td>{escape(str(name))}</td><td>{escape(str(value))}</td></tr>"
        for name, value in values.items()
        if value is not None
    )
    return f'<table class="keys"><tbody>{rows}</tbody></table>' if rows else ""


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """Headline numbers: (name, value, small print)."""
    body = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b>'
        f"<span>{escape(note)}</span></div>"
        for name, value, note in entries
    )
    return f'<div class="tiles">{body}</div>' if body else ""


def figures(charts_: Iterable[str]) -> str:
    """Charts side by side where there is room; empty ones are left out."""
    body = "".join(chart for chart in charts_ if chart)
    return f'<div class="grid2">{body}</div>' if body else ""


def details(summary: str, body: str) -> str:
    """Something to fold out; empty without a body."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>" if body else ""


def write_report(path: Path, contents: Mapping[str, Any]) -> None:
    """Write `model_report(contents)`.

    Raises:
        StorageError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(model_report(contents), encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"The report cannot be written to {path} ({error.strerror}): give a writable folder "
            "with --output-dir."
        ) from error


def read_metrics(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of a run's metrics.jsonl by kind ("train", "validation"); {} without a file."""
    rows: dict[str, list[dict[str, Any]]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.setdefault(row.pop("kind"), []).append(row)
    return rows


def model_report(contents: Mapping[str, Any]) -> str:
    """The page about one model, from plain dicts; whatever is absent is left out.

    Args:
        contents:
            title, subtitle: text.
            rates: name → {value, low, high} of DER, PER, PER (diphone path), WER.
            n_trials: scored trials.
            metrics: what `read_metrics` returns.
            counts: name → {substitutions, deletions, insertions, reference_labels}.
            groups: name of a rate → "session" | "corpus" | "block" | "length" → name → {value, low,
                high, n_trials, tokens}; the charts show PER, the tables all.
            confusion: [41, 41] counts, row 0 insertions, column 0 deletions.
            worst_diphones: rows {diphone, rate, errors, tokens}.
            calibration: {confidence, accuracy, count, expected_error}.
            examples: rows {name, sentence, decoded, alignment, posteriors, labels,
                seconds_per_frame}.
            comparison: {other, n_trials, left_out, metrics: name → fields of `PairedComparison`}.
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
    sections = [
        ("", tiles(headline) + _interval_note(rates) + _remarks(contents.get("remarks", ()))),
        ("Comparison", _comparison(contents.get("comparison"))),
        ("Training", _curves(contents.get("metrics", {}))),
        ("Where the errors are", _groups(contents)),
        ("Which errors", _errors(contents)),
        ("Examples", _examples(contents.get("examples", ()))),
        ("Words", _words(contents.get("words"))),
        ("Data", key_values(contents.get("data", {}))),
        ("Environment", key_values(contents.get("environment", {}))),
        ("Configuration", _config(contents.get("config"))),
    ]
    return page(contents.get("title", "Model report"), sections, contents.get("subtitle", ""))


# --- sections -------------------------------------------------------------------------------------


def _curves(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    train, validation = metrics.get("train", ()), metrics.get("validation", ())

    def of(rows: Sequence[Mapping[str, Any]], name: str, key: str) -> Series:
        kept = [row for row in rows if isinstance(row.get(key), (int, float))]
        return Series(name, [row["step"] for row in kept], [row[key] for row in kept])

    der = (
        [] if all(r.get("per_path") is None for r in validation) else [of(validation, "DER", "der")]
    )
    drawn = [
        charts.line_chart(
            "Loss",
            [of(train, "training", "loss"), of(validation, "validation CTC", "ctc_loss")],
            y_label="nats per frame",
            log_y=True,
        ),
        charts.line_chart(
            "Error rates on validation",
            [*der, of(validation, "PER", "per"), of(validation, "PER, diphone path", "per_path")],
            percent=True,
            from_zero=True,
        ),
        charts.line_chart(
            "Learning rate", [of(train, "learning rate", "learning_rate")], from_zero=True
        ),
        charts.line_chart("Gradient norm", [of(train, "before clipping", "grad_norm")], log_y=True),
        charts.line_chart(
            "Throughput", [of(train, "trials per second", "trials_per_second")], from_zero=True
        ),
        charts.line_chart(
            "Waiting for data",
            [of(train, "share of the time", "data_wait_share")],
            percent=True,
            from_zero=True,
        ),
    ]
    if any("phoneme_weight" in row for row in train):
        drawn.append(
            charts.line_chart(
                "Loss terms",
                [of(train, "diphone", "diphone_loss"), of(train, "phoneme", "phoneme_loss")],
                y_label="nats per frame",
                log_y=True,
            )
        )
    return figures(drawn)


def _groups(contents: Mapping[str, Any]) -> str:
    rates: Mapping[str, Any] = contents.get("groups", {})
    headings = {
        "session": "by session",
        "corpus": "by corpus",
        "length": "by phonemes in the sentence",
        "block": "by block, worst first",
    }
    drawn, tables = [], []
    for kind, heading in headings.items():
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
        body = table(
            [kind, "trials", *columns],
            [
                (
                    name,
                    row["n_trials"],
                    *(
                        cell
                        for own in (rows_of.get(name) for rows_of in groups.values())
                        for cell in (
                            (_percent(own["value"]), _between(own), f"{own['tokens']:,}")
                            if own
                            else ("", "", "")
                        )
                    ),
                )
                for name, row in groups[metric].items()
            ],
        )
        tables.append(details(f"Error rates {heading.split(',')[0]}: numbers", body))
    return figures(drawn) + "".join(tables)


def _errors(contents: Mapping[str, Any]) -> str:
    counts = contents.get("counts", {})
    body = table(
        ["", "substitutions", "deletions", "insertions", "reference labels", "rate"],
        [
            (
                name,
                *(f"{c[k]:,}" for k in ("substitutions", "deletions", "insertions")),
                f"{c['reference_labels']:,}",
                _percent(
                    (c["substitutions"] + c["deletions"] + c["insertions"])
                    / max(c["reference_labels"], 1)
                ),
            )
            for name, c in counts.items()
        ],
    )
    drawn = []
    confusion = contents.get("confusion")
    if confusion is not None and np.any(confusion):
        matrix = np.asarray(confusion)
        labels = [symbol.strip() for symbol in PHONEMES]
        labels[BLANK] = "none"
        chart = charts.matrix_chart(
            "Phoneme confusions (row “none”: insertions; column: deletions)", matrix, labels
        )
        body += f'<div class="wide">{chart}</div>'
        body += details("Most frequent confusions", _top_confusions(matrix, labels))
    known = contents.get("calibration")
    if known:
        title = f"Calibration (expected error {100 * known['expected_error']:.1f} points)"
        drawn.append(
            charts.reliability_chart(title, known["confidence"], known["accuracy"], known["count"])
        )
    worst = contents.get("worst_diphones", ())
    body += details(
        "Worst diphones",
        table(
            ["diphone", "error rate", "errors", "occurrences"],
            [(r["diphone"], _percent(r["rate"]), r["errors"], r["tokens"]) for r in worst],
        ),
    )
    return figures(drawn) + body


def _top_confusions(matrix: np.ndarray, labels: Sequence[str], most: int = 25) -> str:
    off = matrix.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:most]
    cells = [np.unravel_index(flat, off.shape) for flat in order]
    return table(
        ["reference", "decoded as", "times", "share of the reference"],
        [
            (labels[r], labels[c], int(off[r, c]), _percent(off[r, c] / max(matrix[r].sum(), 1)))
            for r, c in cells
            if off[r, c]
        ],
    )


def _examples(examples: Iterable[Mapping[str, Any]]) -> str:
    parts = []
    for example in examples:
        pairs = "".join(
            f'<span class="pair{"" if r == h else " wrong"}"><i>{escape(r or "·")}</i>'
            f"<i>{escape(h or '·')}</i></span>"
            for r, h in example["alignment"]
        )
        heading = f"<h3>{escape(example['name'])}</h3>"
        lines = [f"<p>{escape(example['sentence'])}</p>"] if example.get("sentence") else []
        if example.get("decoded"):
            lines.append(f"<p>decoded: {escape(example['decoded'])}</p>")
        chart = charts.posterior_chart(
            f"Posteriors of the most probable {example.get('kind', 'classes')}",
            np.asarray(example["posteriors"]),
            example["labels"],
            example["seconds_per_frame"],
        )
        parts.append(f'{heading}{"".join(lines)}<div class="alignment">{pairs}</div>{chart}')
    if not parts:
        return ""
    note = (
        '<p class="soft">Reference above, decoded below; framed pairs are errors, a dot is a '
        "missing phoneme.</p>"
    )
    return note + "".join(parts)


def _comparison(comparison: Mapping[str, Any] | None) -> str:
    if not comparison:
        return ""
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
    headers = ["", "other", "this", "difference", "95 % interval", "p", "trials better / worse"]
    left_out = "".join(
        details(
            f"Left out, {reason} ({len(names):,})", table(["trial"], [(n,) for n in names], (0,))
        )
        for reason, names in comparison.get("left_out", {}).items()
    )
    return (
        f"<p>This model against <b>{escape(str(comparison['other']))}</b> on the "
        f"{comparison['n_trials']:,} trials that both decoded. Negative differences are "
        "improvements; p is of the two-sided permutation test that swaps the models trial by "
        "trial.</p>" + table(headers, rows) + left_out
    )


def _words(words: Mapping[str, Any] | None) -> str:
    if not words:
        return ""
    rows = [(r["reference"], r["decoded"], r["errors"]) for r in words.get("examples", ())]
    return key_values(words.get("settings", {})) + table(
        ["sentence", "decoded", "errors"], rows, text=(0, 1)
    )


def _config(config: str | None) -> str:
    return details("args.yaml", f"<pre>{escape(config)}</pre>") if config else ""


def _remarks(remarks: Sequence[str], most: int = 200) -> str:
    """What is in doubt, worth reading before the numbers, and what was left out, folded."""
    doubts = [line for line in remarks if line.startswith("WARNING")]
    others = [line for line in remarks if line not in doubts]
    rows = [(line,) for line in others[:most]]
    if len(others) > most:
        rows.append((f"And {len(others) - most:,} more: see summary.json.",))
    return "".join(f'<p class="warning">{escape(line)}</p>' for line in doubts) + details(
        f"Remarks ({len(others):,})", table(["remark"], rows, text=(0,))
    )


def _interval_note(rates: Mapping[str, Any]) -> str:
    if not rates:
        return ""
    return (
        '<p class="soft">Error rates are all edits over all reference labels; ranges are 95 % '
        "intervals from resampling trials.</p>"
    )


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %" if math.isfinite(value) else "–"


def _between(rate: Mapping[str, Any]) -> str:
    low, high = rate.get("low"), rate.get("high")
    if low is None or high is None or not math.isfinite(low + high):
        return ""
    return f"{100 * low:.2f} to {100 * high:.2f} %"


def _anchor(heading: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in heading.lower())
