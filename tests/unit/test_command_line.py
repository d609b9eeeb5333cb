"""The first and the last thing every command does: the Python it needs, and its output."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import set_up
from brain_to_text.errors import ConfigError
from brain_to_text.scoring import word_decoder

TOP = Path(__file__).parents[2]
COMMANDS = [
    *("train_model_sagemaker.py", "launch_sagemaker_job.py"),
    *("prepare_dataset.py", "evaluate_model.py"),
]
FRONT_DOORS = [*(f"code/{name}" for name in COMMANDS), "tests/local_run.py", "tests/set_up.py"]
# those of this machine that start (pyenv has names for more)
OLD = [
    name
    for n in range(6, 11)
    if (name := shutil.which(f"python3.{n}"))
    and not subprocess.run([name, "-c", ""], capture_output=True).returncode
]
AS_PYTHON_3_10 = """
import runpy, sys
sys.version_info = (3, 10, 0)
sys.argv = [sys.argv[1]]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def sentence(*command, **settings):
    """What a command that fails says: one line, no traceback."""
    done = subprocess.run(command, cwd=TOP, text=True, stderr=subprocess.PIPE, **settings)
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.strip().splitlines()
    return line


@pytest.mark.parametrize("path", FRONT_DOORS)
def test_an_old_python_says_one_sentence(path):
    for file in (path, "code/brain_to_text/command_line.py", "code/brain_to_text/__init__.py"):
        text = (TOP / file).read_text()
        ast.parse(text, feature_version=(3, 6))
        assert "\nfrom __future__ import annotations\n" not in text  # 3.6 does not know it
    for python in ((sys.executable, "-c", AS_PYTHON_3_10), *((old,) for old in OLD)):
        said = sentence(*python, path)
        assert said.startswith("Python 3.11 or newer is needed") and f"python3.12 {path}" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_without_its_packages_a_command_says_one_sentence(name):
    said = sentence(sys.executable, "-S", "-E", f"code/{name}")
    assert "yaml" in said and ("pip install" in said or "local_run.sh" in said)


@pytest.mark.parametrize("arguments", [f"code/{name} --help" for name in COMMANDS])
def test_output_that_cannot_be_written_is_one_sentence(arguments):
    command = [sys.executable, *arguments.split()]
    with open("/dev/full", "w") as full:  # noqa: PTH123
        assert "Standard output cannot be written" in sentence(*command, stdout=full)
    closed = sentence("sh", "-c", 'exec "$0" "$@" >&-', *command)
    assert "Standard output is closed" in closed


def test_a_reader_that_left_is_no_error_to_speak_of():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "code/launch_sagemaker_job.py", "--help"]
    done = subprocess.run(command, cwd=TOP, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode in (0, 1) and done.stderr == b""


def test_words_on_a_new_python_name_those_that_have_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "kenlm", None)
    monkeypatch.setattr(word_decoder.sys, "version_info", (3, 13, 0))
    with pytest.raises(ConfigError, match=r"3\.11 and 3\.12 alone.*PYTHON=python3\.12"):
        word_decoder.flashlight()


# --- the set-up


def test_options_are_understood_before_anything_is_set_up(tmp_path):
    """On a Python without any package, which would have to set up first."""
    command = [sys.executable, "-S", "-E", "tests/local_run.py", "--stepz", "3"]
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 2 and "unrecognized arguments: --stepz" in done.stderr
    assert "Setting up" not in done.stderr


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """The set-up of another repository."""
    monkeypatch.setattr(set_up, "REPOSITORY", tmp_path)
    monkeypatch.setattr(set_up, "ENVIRONMENT", tmp_path / ".venv")
    monkeypatch.setattr(set_up, "STAMP", tmp_path / ".venv" / "set-up-stamp")
    return monkeypatch


def test_a_missing_compiler_or_header_is_said_before_anything_is_made(fresh, capsys, tmp_path):
    fresh.setenv("PATH", "")
    assert set_up.main() == 1
    assert "A C compiler is needed: install one" in capsys.readouterr().err
    fresh.undo()
    fresh.setattr(set_up.sysconfig, "get_path", lambda _: str(tmp_path))
    assert "Python's headers are needed" in set_up.lacking()
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(
    ("problem", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "Stopped: .venv is not finished; run this again"),
        (subprocess.CalledProcessError(1, "ensurepip"), 1, "install Python's venv"),
    ],
)
def test_a_set_up_that_ends_early_is_one_sentence(fresh, capsys, problem, code, said):
    def fail(*_, **__):
        raise problem

    fresh.setattr(set_up, "lacking", str)
    fresh.setattr(set_up.venv, "create", fail)
    assert set_up.main() == code
    assert said in capsys.readouterr().err
