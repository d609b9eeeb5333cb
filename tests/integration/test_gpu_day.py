"""The script for a day with a GPU still runs, in small, on a CPU, with what it lists alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "benchmarks" / "gpu_day.sh"
PARTS = {"versions", "check", "train", "full", "profile", "gru", "tests"}
ONLY_LISTED = """
from importlib.machinery import PathFinder
real = PathFinder.find_spec
class FindSpec:
    def __call__(self, name, *rest):
        return None if name in NAMES else real(name, *rest)
PathFinder.find_spec = FindSpec()
"""


def unlisted_packages() -> set[str]:
    """Top-level modules of distributions that neither the script lists nor these need."""
    (line,) = re.findall(r"(?m)^#   (torch numpy .*)$", SCRIPT.read_text())
    by_module = packages_distributions()
    to_do = [name for module in line.split() for name in by_module[module]]
    needed: set[str] = set()
    while to_do:
        name = to_do.pop().lower().replace("_", "-")
        if name in needed:
            continue
        needed.add(name)
        try:
            wanted = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:
            continue
        to_do += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return {
        module
        for module, names in by_module.items()
        if not {name.lower().replace("_", "-") for name in names} & needed
    }


def run(out: Path, *command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    hiding = out / "hiding"
    hiding.mkdir()
    hidden = unlisted_packages()
    assert {"s3fs", "obstore", "botocore", "tensorboardX"} <= hidden
    (hiding / "sitecustomize.py").write_text(f"NAMES = {hidden!r}\n{ONLY_LISTED}")
    environment = os.environ | {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(hiding),
        "OUT": str(out / "results"),
        "WORK": str(out / "work"),
        "WHEELS": str(out / "no wheels"),
    }
    return subprocess.run(
        [str(word) for word in command],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=2000,
        check=False,
    )


def test_every_part_runs_in_small_with_the_listed_packages_alone(tmp_path: Path) -> None:
    done = run(tmp_path, SCRIPT, "--tiny")
    said = {path.stem: path.read_text() for path in (tmp_path / "results").iterdir()}
    assert done.returncode == 0, "\n".join([done.stdout, done.stderr, *said.values()])
    assert said.keys() == PARTS | {"summary"}
    titles = re.findall(r"(?m)^(\S.*?) +rc +0 ", said["summary"])
    assert {"train: stopped by SIGTERM", "train: the same, resumed to its end"} <= set(titles)
    assert "Resuming after step" in said["summary"]
    assert re.search(r"waits of the host +0\n", said["summary"])
    assert "No TensorBoard events are written: no module tensorboardX" in said["train"]


def test_a_part_that_fails_costs_no_other_and_is_told(tmp_path: Path) -> None:
    done = run(tmp_path, SCRIPT, "check", "versions", DEVICE="no-such-device")
    assert done.returncode == 1
    summary = (tmp_path / "results" / "summary.txt").read_text()
    assert re.search(r"before it trains +rc +1 ", summary)
    assert re.search(r"versions +rc +0 ", summary)


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, SCRIPT, "micor")
    assert done.returncode == 2 and "unknown part 'micor'" in done.stderr


def test_without_an_s3_client_a_bucket_is_refused_in_one_sentence(tmp_path: Path) -> None:
    prepare = ROOT / "code" / "prepare_dataset.py"
    done = run(tmp_path, sys.executable, prepare, "index", "s3://bucket/data")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "type `pip install 's3fs>=2026' boto3`, or give a folder" in done.stderr
