"""Hostile and unlucky data files, and processes that are ended: sentences, nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import prepare_dataset
import pytest
from brain_to_text.dataset.isolation import Lost, in_workers
from support.commands import run
from support.fuzzing import rounds
from support.hdf5_fuzz import FILE, crashing_file, hanging_file, look_at, mutations
from support.processes import heed_signals
from support.small_data import SESSIONS, write_small_dataset

FRONT_DOOR = Path(prepare_dataset.__file__)
IN_A_ROUND = 80  # mutations


# --- damaged bytes --------------------------------------------------------------------------------


def test_fuzzed_files_end_in_sentences() -> None:
    for seed in rounds(1):
        jobs = {f"{seed}/{n}": (data,) for n, data in enumerate(mutations(seed, IN_A_ROUND))}
        answers = dict(in_workers(look_at, jobs, 2))
        lost = [answer.damage for answer in answers.values() if isinstance(answer, Lost)]
        sound = sum(answer == "sound" for answer in answers.values())
        assert len(answers) == IN_A_ROUND
        assert sound < IN_A_ROUND / 2 and len(lost) < 10, "the fuzzer must not miss its aim"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (hanging_file, "does not come to an end"),
        (crashing_file, r"crashes the process \(SIG"),
    ],
)
def test_a_file_that_hangs_or_crashes_the_library_is_named(make, reason, tmp_path, capsys) -> None:
    source, target = tmp_path / "src", tmp_path / "new"
    write_small_dataset(source, form=None)
    (source / FILE).write_bytes(make())
    assert run("encode", source, target) == 1
    error = capsys.readouterr().err.strip()
    assert re.search(f"{FILE}: reading it {reason}", error) and "\n" not in error
    assert not (target / FILE).exists()
    if make is crashing_file:
        assert run("index", source) == 1
        assert FILE in capsys.readouterr().err
        assert run("index", source, "--exclude-damaged") == 0, "the other files"


def test_odd_names_cannot_break_a_line(tmp_path, capsys) -> None:
    write_small_dataset(tmp_path, form=None)
    with h5py.File(tmp_path / FILE, "r+") as file:
        for name in ("a\nb", "trial_\u0661", f"trial_{'9' * 5000}", "trial_1\x1b[2J"):
            group = file.create_group(name)
        file.id.links.create_hard(b"\xff\xfe", file.id, group.name.encode())
    assert run("validate", tmp_path) == 0
    printed = capsys.readouterr().out
    assert printed.count("is not named trial_NNNN") == 5
    assert all(line.isprintable() for line in printed.splitlines())


# --- processes ------------------------------------------------------------------------------------


@pytest.fixture
def encoding(tmp_path: Path):
    """An encode that reads its second file without an end, and its workers' process numbers."""
    source, target = tmp_path / "src", tmp_path / "new"
    write_small_dataset(source, form=None)
    (source / SESSIONS[0] / "data_val.hdf5").write_bytes(hanging_file())
    process = subprocess.Popen(
        [sys.executable, str(FRONT_DOOR), "encode", str(source), str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_signals,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (target / FILE).exists() and process.poll() is None:
        time.sleep(0.01)
    yield process, [int(number) for number in children.read_text().split()]
    process.kill()
    process.wait()


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_encode_that_is_stopped_says_so_and_leaves_nothing(encoding, number, tmp_path):
    process, workers = encoding
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as the terminal does
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err.strip() == (
        f"Stopped by {number.name}: every file is whole or not there; repeat the command to go on."
    )
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]


def test_a_killed_worker_is_a_sentence(encoding) -> None:
    process, workers = encoding
    assert len(workers) == 1
    os.kill(workers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("ERROR: A worker process was killed (SIGKILL), probably for lack of")
    assert "\n" not in err.strip()
