"""The report is one page that needs nothing else, and shows what it was given."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

import numpy as np
from brain_to_text.scoring.report_pages import TEMPLATES, line_chart, model_report


class Nesting(HTMLParser):
    """Checks that every element is closed within the one around it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def text(page: str) -> str:
    return html.unescape(re.sub("<[^>]*>", " ", page))


def contents() -> dict:
    group = {"value": 0.1, "low": 0.05, "high": 0.2, "n_trials": 3, "tokens": 60}
    other = {"value": 0.4, "low": 0.3123, "high": 0.5, "n_trials": 3, "tokens": 121}
    confusion = np.eye(41, dtype=int) * 9
    confusion[3, 5] = 2
    return {
        "title": "job-1 <model>",
        "rates": {"PER": {"value": 0.1234, "low": 0.1, "high": 0.15}},
        "n_trials": 48,
        "counts": {
            "PER": {
                "substitutions": 3,
                "deletions": 2,
                "insertions": 1,
                "reference_labels": 60,
            }
        },
        "metrics": {
            "train": [{"step": s, "loss": 7.0 / (s + 1), "learning_rate": 0.1} for s in range(5)],
            "validation": [{"step": s, "per": 0.5, "der": 0.6, "per_path": 0.7} for s in (1, 4)],
        },
        "groups": {
            "DER": {"session": {"t15.2023.08.11": other, "t15.2023.08.13": other}},
            "PER": {"session": {"t15.2023.08.11": group, "t15.2023.08.13": group}},
        },
        "confusion": confusion.tolist(),
        "examples": [
            {
                "heading": "t15.2023.08.11/data_val.hdf5:trial_0001",
                "sentence": "fish & chips",
                "alignment": [("F", "F"), ("IH", None), (None, "S")],
                "posteriors": np.full((2, 6), 0.5),
                "labels": ["#→F", "F→IH"],
                "kind": "diphones",
                "seconds_per_frame": 0.08,
            }
        ],
        "config": "model:\n  n_units: 16\n",
        "data": {"Fingerprint": "abc"},
        "environment": {"torch": "2.13.0"},
        "remarks": ["Left out: a <trial>", "WARNING: two <forms>"],
        "worst_diphones": [{"diphone": "K→AE", "rate": 0.5, "errors": 4, "tokens": 8}],
    }


def test_report_shows_what_it_was_given_and_escapes_it():
    page = model_report(contents())
    Nesting(page)
    for shown in (
        *("12.34 %", "job-1 <model>", "fish & chips", "t15.2023.08.13", "n_units: 16"),
        *("abc", "2.13.0", "Left out: a <trial>", "K→AE"),
    ):
        assert shown in text(page)
    assert "<model>" not in page
    assert page.count("<svg") >= 6
    # per is charted; the table has every rate
    assert "PER by session</figcaption>" in page
    assert "DER by session</figcaption>" not in page
    table_of_sessions = page.split("Error rates by session: numbers")[1].split("</table>")[0]
    row = table_of_sessions.split("<td>t15.2023.08.13</td>")[1].split("</tr>")[0]
    cells = re.findall("<td>(.*?)</td>", row)
    assert cells == ["3", "40.00 %", "31.23 to 50.00 %", "121", "10.00 %", "5.00 to 20.00 %", "60"]
    # doubts stand before the numbers, and what was left out is folded
    assert '<p class="warning">WARNING: two &lt;forms&gt;</p>' in page.split("<nav")[0]
    folded = page.split("<summary>Remarks (1)</summary>")[1].split("</details>")[0]
    assert "Left out: a &lt;trial&gt;" in folded
    # nothing is loaded from anywhere, and every link has a target
    links = re.findall(r'(?:src|href)="(.*?)"', page)
    assert {f'id="{link[1:]}"' for link in links} <= set(re.findall(r'id=".*?"', page))
    assert not re.search(r"<script|<link|<img|<iframe|<object|url\(|@import|https?://", page)


def test_a_comparison_says_which_is_which_and_on_which_trials():
    comparison = {
        "other": "last <week>",
        "n_trials": 46,
        "left_out": {"decoded by this model only": ["t15.2023.08.11/data_val.hdf5:trial_0007"]},
        "metrics": {
            "PER": {
                "rate_a": 0.2,
                "rate_b": 0.15,
                "difference": {"value": -0.05, "low": -0.08, "high": -0.02},
                "p_value": 0.0123,
                "trials_better": 30,
                "trials_worse": 9,
            }
        },
    }
    page = model_report({**contents(), "comparison": comparison})
    section = page.split('<section id="comparison">')[1].split("</section>")[0]
    heads = re.findall('<th scope="col">(.*?)</th>', section)[:7]
    cells = re.findall("<td>(.*?)</td>", section)[:7]
    assert dict(zip(heads, cells, strict=True)) == {
        "": "PER",
        "other": "20.00 %",
        "this": "15.00 %",
        "difference": "-5.00 points",
        "95 % interval": "-8.00 to -2.00",
        "p": "0.012",
        "trials better / worse": "30 / 9",
    }
    for shown in ("last &lt;week&gt;", "46 trials that both decoded", "trial_0007"):
        assert shown in section
    assert "Left out, decoded by this model only (1)" in section


def test_no_waiting_is_drawn_on_an_axis_from_zero():
    rows = [{"step": step, "data_wait_share": 0.0} for step in range(5)]
    page = model_report({"metrics": {"train": rows}})
    chart = page.split("Waiting for data</figcaption>")[1].split("</figure>")[0]
    ticks = re.findall(r">(-?[\d.]+) %</text>", chart)
    assert ticks[0] == "0" and ticks[-1] == "100"
    assert not any(tick.startswith("-") for tick in ticks)


def test_an_empty_report_is_still_a_page():
    page = model_report({})
    Nesting(page)
    assert "Model report" in text(page) and "<section" not in page


def drawn(lines: dict, **options) -> str:
    chart = line_chart("t", lines, **options)
    return TEMPLATES.get_template("charts.html").module.line_chart(chart)


def test_charts_leave_out_what_cannot_be_drawn():
    assert drawn({"a": ([], [])}) == ""
    assert drawn({"a": ([1], [float("nan")])}) == ""
    one_point = drawn({"a": ([3], [0.5])}, percent=True)
    assert "<circle" in one_point
    assert "NaN" not in one_point


def test_long_runs_are_drawn_with_bounded_size_and_series_in_dashes():
    x = np.arange(100_000)
    lines = drawn(dict.fromkeys("abcd", (x, 1.0 + x)))
    assert len(lines) < 60_000
    dashes = re.findall(r'<polyline class="line s\d" stroke-dasharray="(.*?)"', lines)
    assert len(set(dashes)) == 4
