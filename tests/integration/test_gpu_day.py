"""The script for the first day with a GPU still runs, in small, on a CPU."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import bench_step

SCRIPT = Path(bench_step.__file__).with_name("gpu_day.sh")
FILES = {"summary.txt", "env.txt", "tests.txt", "bench.txt", "profile.txt", "train.txt"}


def run(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHON": sys.executable,
        "OUT": str(out / "results"),
        "WORK": str(out / "work"),
    }
    return subprocess.run(
        [str(SCRIPT), *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def test_every_part_runs_in_small_and_leaves_at_most_six_files(tmp_path: Path) -> None:
    done = run(tmp_path, "--tiny")
    said = {path.name: path.read_text() for path in (tmp_path / "results").iterdir()}
    assert done.returncode == 0, "\n".join([done.stdout, done.stderr, *said.values()])
    assert said.keys() == FILES
    titles = re.findall(r"(?m)^(\S.*?) +rc +0 ", said["summary.txt"])
    assert {"train: stopped by SIGTERM", "train: the same, resumed to its end"} <= set(titles)
    assert "Resuming after step" in said["summary.txt"]
    assert re.search(r"waits of the host +0\n", said["profile.txt"])
    assert "one call (as in a step)" in said["bench.txt"]


def test_a_part_that_fails_costs_no_other_and_is_told(tmp_path: Path) -> None:
    (tmp_path / "work" / "smoke").mkdir(parents=True)
    (tmp_path / "work" / "smoke" / "trial_manifest.json.gz").write_bytes(b"no manifest")
    done = run(tmp_path, "--tiny", "fp16", "versions")
    assert done.returncode == 1
    summary = (tmp_path / "results" / "summary.txt").read_text()
    assert re.search(r"train: fp16 +rc +1 ", summary) and re.search(r"versions +rc +0 ", summary)


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "--tiny", "micor")
    assert done.returncode == 2 and "unknown part 'micor'" in done.stderr


def benchmarks_asked_for() -> list[list[str]]:
    text = SCRIPT.read_text().replace("\\\n", " ").replace('"$validation"', "480")
    return [shlex.split(words) for words in re.findall(r'(?m)^ +bench \d+ "[^"]+"(.*)$', text)]


@pytest.mark.parametrize("words", benchmarks_asked_for(), ids=" ".join)
def test_the_step_benchmarks_options_exist(words: list[str]) -> None:
    bench_step.configured(*bench_step.build_parser().parse_known_args([*words, "--rounds", "20"]))
