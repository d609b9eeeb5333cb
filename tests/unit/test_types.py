"""The types hold where Triton is installed and where it is not: run.sh checks one of the two."""

import importlib.util
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_types_hold_with_and_without_triton(tmp_path):
    """In an environment like this one, but with Triton hidden, or there in name where it is not."""
    venv.create(tmp_path / "env", symlinks=True)
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith("triton"):
            (packages / path.name).symlink_to(path)
    if importlib.util.find_spec("triton") is None:
        for name in ("__init__", "language", "errors"):
            (packages / "triton").mkdir(exist_ok=True)
            (packages / "triton" / f"{name}.py").touch()
    rooms = [p for p in TOP.glob("code/**/*.py") if re.search(r"import triton\b", p.read_text())]
    assert rooms
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", str(tmp_path / "env/bin/python")]
        + ["--cache-dir", str(tmp_path / "cache"), *map(str, rooms)],
        cwd=TOP,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
