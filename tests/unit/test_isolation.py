"""A job may crash, hang or be killed: the others go on, and nothing outlives the parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from brain_to_text.dataset.isolation import in_workers
from brain_to_text.errors import DataError

CODE = Path(__file__).parents[2] / "code"


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGXCPU])
def test_a_crash_is_known_by_its_job_and_the_others_go_on(number):
    jobs = {"bad": (number,), "good": (signal.SIGCHLD,)}
    answers = dict(in_workers(signal.raise_signal, jobs))
    assert answers["bad"].signal == number and "copy it again" in answers["bad"].damage
    assert answers["good"] is None


def test_a_worker_that_ends_is_not_explained_by_what_an_earlier_job_printed():
    list(in_workers(os.write, {"earlier": (2, b"a warning\n")}))
    ((_, lost),) = in_workers(os._exit, {"file": (3,)})
    assert not lost.detail


def test_what_needs_more_memory_than_there_is_is_a_sentence():
    ((_, lost),) = in_workers(bytearray, {"file": (1 << 60,)})
    assert "takes more memory than a sound file" in lost.damage


def test_an_error_of_ours_comes_back_as_itself():
    with pytest.raises(DataError, match=r"Phoneme label 0 is 99"):
        from brain_to_text.labels.diphones import encode_diphones

        list(in_workers(encode_diphones, {"x": ([99],)}))


def test_workers_see_the_environment_of_the_call(monkeypatch):
    seen = []
    for value in ("one", "two"):
        monkeypatch.setenv("OF_THE_CALL", value)
        seen += [answer for _, answer in in_workers(os.getenv, {"x": ("OF_THE_CALL",)})]
    assert seen == ["one", "two"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
def test_no_worker_outlives_its_parent():
    script = (
        f"import sys, time; sys.path.insert(0, {str(CODE)!r})\n"
        "from brain_to_text.dataset.isolation import in_workers\n"
        "list(in_workers(time.sleep, {'a': (600,), 'b': (600,)}, 2))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    children: list[str] = []
    tasks = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    deadline = time.monotonic() + 60
    while len(children) < 2 and time.monotonic() < deadline:
        children = tasks.read_text().split()
        time.sleep(0.05)
    assert len(children) == 2
    while not all(b"_serve" in _command(child) for child in children):
        time.sleep(0.05)
    time.sleep(2)  # both have asked the kernel by now; if not, they see another parent
    parent.kill()
    parent.wait()
    while any(_command(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_command(child) for child in children)


def _command(process: str) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""
