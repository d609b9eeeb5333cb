"""A job may crash, hang or be killed: the others go on, and nothing outlives the parent."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from brain_to_text.dataset.isolation import in_workers
from brain_to_text.errors import DataError, StorageError

CODE = Path(__file__).parents[2] / "code"


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGXCPU])
def test_a_crash_is_known_by_its_job_and_the_others_go_on(number):
    jobs = {"bad": (number,), "good": (signal.SIGCHLD,)}
    answers = dict(in_workers(signal.raise_signal, jobs))
    assert answers["bad"].exit_code == -number and "copy it again" in answers["bad"].damage
    assert answers["good"] is None


def test_a_worker_that_ends_by_itself_says_nothing_about_the_file():
    ((_, lost),) = in_workers(os._exit, {"file": (3,)})
    with pytest.raises(StorageError, match="exit code 3"):
        _ = lost.damage


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
    """Each is at work, and has its end of a pipe open, which ends when both have ended."""
    read, write = os.pipe()
    script = (
        f"import os, sys; sys.path[:0] = [{str(CODE)!r}, {str(CODE.parent / 'tests')!r}]\n"
        "from support.processes import hold\n"
        "from brain_to_text.dataset.isolation import in_workers\n"
        f"jobs = {{name: ('/proc/%d/fd/{write}' % os.getpid(),) for name in 'ab'}}\n"
        "list(in_workers(hold, jobs, 2))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], pass_fds=[write])
    os.close(write)
    with os.fdopen(read, "rb", buffering=0) as pipe:
        assert pipe.read(1) == pipe.read(1) == b"."
        parent.kill()
        parent.wait()
        assert pipe.read() == b""
