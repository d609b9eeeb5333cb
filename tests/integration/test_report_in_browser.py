"""The reports in a real browser: they render, and fit the screen of a laptop and of a phone."""

from __future__ import annotations

import json
import shutil
import subprocess
from html import escape
from pathlib import Path

import numpy as np
import pytest
from brain_to_text.dataset.manifest import TrialManifest
from brain_to_text.dataset.trial_record import TrialRecord
from brain_to_text.dataset.validation import SplitSummary, ValidationReport
from brain_to_text.errors import Finding
from brain_to_text.labels.phonemes import PHONEMES
from brain_to_text.scoring.report_pages import dataset_page, model_report
from brain_to_text.storage.locations import ObjectInfo

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

# Runs in a page that shows the report in frames of both widths (a window cannot be that narrow).
PROBE = """
<script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map((frame) => {
    const page = frame.contentDocument, root = page.documentElement;
    page.querySelectorAll("details").forEach((fold) => { fold.open = true; });
    const wide = [...page.querySelectorAll("main *:not(svg *)")].filter((element) =>
      !element.closest(".scroll") && !element.closest("pre") &&
      element.getBoundingClientRect().right > root.clientWidth + 1);
    const charts = [...page.querySelectorAll("figure svg:not(.key)")];
    const drawn = charts.map((chart) => chart.getBoundingClientRect());
    return {
      width: frame.clientWidth, scrollWidth: root.scrollWidth,
      wide: wide.map((element) => element.tagName + "." + element.className),
      charts: drawn.length, flat: drawn.filter((box) => box.height < 10).length,
      ink: frame.contentWindow.getComputedStyle(page.body).color,
      ground: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
    };
  });
  document.getElementById("probe").textContent = JSON.stringify(found);
});
</script>
"""


def long_contents() -> dict:
    """As large and as awkward as a real evaluation: 45 sessions, long names, wide tables."""
    random = np.random.default_rng(0)
    sessions = [f"t15.2024.{1 + i // 28:02d}.{1 + i % 28:02d}" for i in range(45)]

    def rate() -> dict:
        value = float(random.uniform(0.05, 0.3))
        return {
            "value": value,
            "low": 0.8 * value,
            "high": 1.3 * value,
            "n_trials": 32,
            "tokens": 900,
        }

    confusion = random.poisson(1.0, (41, 41)) + 200 * np.eye(41, dtype=int)
    url = "s3://a-bucket-with-a-long-name/sagemaker-outputs/" + "brain-to-text-" * 8
    return {
        "title": f"{url}/output/model.tar.gz on val",
        "subtitle": f"{url}, evaluated 2025-01-15 10:30",
        "rates": {name: rate() for name in ("DER", "PER", "PER (diphone path)", "WER")},
        "n_trials": 1426,
        "metrics": {
            "train": [
                {
                    "step": s,
                    "loss": 7 / (1 + s),
                    "learning_rate": 1e-3,
                    "grad_norm": 3.0,
                    "trials_per_second": 90.0,
                    "data_wait_share": 0.01,
                }
                for s in range(300)
            ],
            "validation": [
                {"step": s, "der": 0.5, "per": 0.3, "per_path": 0.4, "ctc_loss": 1.0}
                for s in range(50)
            ],
        },
        "counts": {
            name: {
                "substitutions": 12000,
                "deletions": 3000,
                "insertions": 4000,
                "reference_labels": 82000,
            }
            for name in ("DER", "PER", "PER (diphone path)")
        },
        "groups": {
            name: {
                "session": {session: rate() for session in sessions},
                "block": {f"{session} block 4": rate() for session in sessions},
                "length": {f"{n:02d}–{n + 9:02d}": rate() for n in range(1, 90, 10)},
            }
            for name in ("DER", "PER", "PER (diphone path)")
        },
        "remarks": [
            *(f"Left out: {session}/data_val.hdf5:trial_0001" for session in sessions),
            f"WARNING: {url} was trained on other labels",
        ],
        "confusion": confusion.tolist(),
        "worst_diphones": [{"diphone": "DH→AH", "rate": 0.5, "errors": 9, "tokens": 18}] * 20,
        "examples": [
            {
                "name": f"{sessions[0]}/data_val.hdf5:trial_0012",
                "sentence": "not too controversial " * 6,
                "alignment": [("N", "N"), ("AA", None), (None, "T"), ("T", "D")] * 20,
                "posteriors": random.dirichlet(np.full(16, 0.1), 300).T,
                "labels": [f"{p.strip()}→NG" for p in PHONEMES[1:17]],
                "seconds_per_frame": 0.08,
            }
        ],
        "comparison": {
            "other": url,
            "n_trials": 1426,
            "left_out": {"decoded by this model only": [f"{url}:trial_0001"]},
            "metrics": {
                "PER": {
                    "rate_a": 0.2,
                    "rate_b": 0.1,
                    "difference": {"value": -0.1, "low": -0.12, "high": -0.08},
                    "p_value": 0.0001,
                    "trials_better": 900,
                    "trials_worse": 200,
                }
            },
        },
        "members": [
            {
                "model": url,
                "rates": {name: rate() for name in ("DER", "PER", "WER")},
                "comparison": {
                    "difference": {"value": -0.1, "low": -0.12, "high": -0.08},
                    "p_value": 0.0001,
                },
            }
        ]
        * 5,
        "words": {
            "settings": {"Language model": url},
            "examples": [{"reference": "a " * 60, "decoded": "b " * 60, "errors": 60}] * 3,
        },
        "config": "very_long_key: " + "x" * 300 + "\n",
        "data": {"Location": url, "Fingerprint": "0123456789abcdef" * 2},
        "environment": {"torch": "2.13.0+cu130"},
    }


def long_dataset() -> ValidationReport:
    """45 sessions, hundreds of findings, long names."""
    random = np.random.default_rng(0)
    sessions = [f"t15.2024.{1 + i // 28:02d}.{1 + i % 28:02d}" for i in range(45)]
    url = "s3://a-bucket-with-a-long-name/" + "hdf5_data_diphone_encoded-" * 8
    trials, rows = [], []
    for session in sessions:
        for split, count in (("train", 40), ("val", 10), ("test", 10)):
            bins = random.integers(200, 2000, count)
            shape = (int(bins.min()), float(bins.mean()), int(bins.max()))
            rows.append(
                SplitSummary(session, split, count, 1, shape, (58.0, 130), 0.0, 1.0, -9.0, 55.0)
            )
            for number, length in enumerate(bins.tolist()):
                phonemes = np.ones(int(random.integers(5, 60)), np.int32)
                trials.append(
                    TrialRecord(
                        session=session,
                        split=split,
                        key=f"{session}/data_{split}.hdf5",
                        trial=f"trial_{number:04d}",
                        n_time_steps=length,
                        n_features=512,
                        dtype="<f4",
                        offset=0,
                        length=4 * 512 * length,
                        class_ids=None if split == "test" else np.repeat(phonemes, 2),
                        phoneme_ids=None if split == "test" else phonemes,
                    )
                )
    findings = [
        Finding(
            f"{sessions[0]}/data_train.hdf5", f"trial_{n:04d}", "some reason " * 20, kind, level
        )
        for kind, level in (("infeasible for CTC", "error"), ("duplicate trial", "error"))
        for n in range(300)
    ] + [Finding("a" * 200, None, "is not used", "unknown file", "warning")]
    files = {trial.key: ObjectInfo(trial.key, 123_456_789, "etag") for trial in trials}
    manifest = TrialManifest(tuple(trials), files, 512, 1681, "self_loop")
    return ValidationReport(url, manifest, rows, findings, 17)


PAGES = {
    "model": (lambda: model_report(long_contents()), 11),
    "dataset": (lambda: dataset_page(long_dataset()), 5),
}


def probe(page_of: str, folder: Path, *options: str) -> list[dict]:
    """What the browser measured at 1366 and 390 pixels."""
    report = escape(PAGES[page_of][0](), quote=True)
    frames = "".join(
        f'<iframe srcdoc="{report}" style="border:0;width:{width}px;height:900px"></iframe>'
        for width in (1366, 390)
    )
    page = folder / "probe.html"
    page.write_text(f'<meta charset="utf-8">{PROBE}{frames}<pre id="probe"></pre>', "utf-8")
    run = subprocess.run(
        [
            str(CHROMIUM),
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={folder / 'profile'}", "--window-size=2000,1200", *options),
            *("--virtual-time-budget=5000", "--dump-dom", f"file://{page}"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(run.stdout.rpartition('<pre id="probe">')[2].partition("</pre>")[0])


@pytest.mark.parametrize("page_of", PAGES)
def test_nothing_overflows_on_a_laptop_or_a_phone(page_of, tmp_path):
    for measured, width in zip(probe(page_of, tmp_path), (1366, 390), strict=True):
        assert measured["width"] == width
        assert measured["wide"] == []
        assert measured["scrollWidth"] <= width
        assert measured["charts"] >= PAGES[page_of][1]
        assert measured["flat"] == 0


def test_light_and_dark_mode_turn_ink_and_ground_around(tmp_path):
    def brightness(colour: str) -> float:
        return sum(map(float, colour[colour.index("(") + 1 : -1].split(",")[:3])) / 3

    light = probe("model", tmp_path)[0]
    (tmp_path / "dark").mkdir()
    dark = probe("model", tmp_path / "dark", "--blink-settings=preferredColorScheme=0")[0]
    assert brightness(light["ground"]) - brightness(light["ink"]) > 150
    assert brightness(dark["ink"]) - brightness(dark["ground"]) > 150
