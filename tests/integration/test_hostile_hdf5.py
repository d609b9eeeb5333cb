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
from support.hdf5_fuzz import FILE, look_at, mutations, small_file
from support.processes import heed_signals
from support.small_data import write_small_dataset

FRONT_DOOR = Path(prepare_dataset.__file__)
IN_A_ROUND = 120  # mutations


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
    ("layout", "libver", "source", "length", "place", "reason"),
    [
        (1, "latest", 438, 130, 3060, "does not come to an end"),
        (2, "earliest", 177, 42, 13016, r"crashes the process \(SIG"),
    ],
)
def test_a_file_that_hangs_or_crashes_the_library_is_named(
    layout, libver, source, length, place, reason, tmp_path, capsys
) -> None:
    """Bytes that were copied to another place of a sound file."""
    write_small_dataset(tmp_path / "src", form=None)
    data = bytearray(small_file(layout, libver))
    data[place : place + length] = data[source : source + length]
    (tmp_path / "src" / FILE).write_bytes(data)
    assert run("encode", tmp_path / "src", tmp_path / "new") == 1
    error = capsys.readouterr().err.strip()
    assert re.search(f"{FILE}: reading it {reason}", error) and "\n" not in error
    assert not (tmp_path / "new" / FILE).exists()
    if "crashes" in reason:
        assert run("index", tmp_path / "src") == 1
        assert FILE in capsys.readouterr().err
        assert run("index", tmp_path / "src", "--exclude-damaged") == 0, "the other files"


@pytest.mark.parametrize("name", ["a\nb", "trial_\u0661", f"trial_{'9' * 5000}", "trial_1\x1b[2J"])
def test_odd_names_cannot_break_a_line(name, tmp_path, capsys) -> None:
    write_small_dataset(tmp_path, form=None)
    with h5py.File(tmp_path / FILE, "r+") as file:
        file.create_group(name)
        file.id.links.create_hard(b"\xff\xfe", file.id, name.encode())
    assert run("validate", tmp_path) == 0
    printed = capsys.readouterr().out
    assert printed.count("is not named trial_NNNN") == 2
    assert all(line.isprintable() for line in printed.splitlines())


# --- processes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    assert run("synthesize", folder, "--phonemes", "--sessions", 18, "--trials", 20) == 0
    return folder


@pytest.fixture
def encoding(source: Path, tmp_path: Path):
    """An encode that takes a while, and its workers' process numbers."""
    process = subprocess.Popen(
        [sys.executable, str(FRONT_DOOR), "encode", str(source), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_signals,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("*.hdf5")) and time.monotonic() < deadline:
        time.sleep(0.01)
    yield process, [int(number) for number in children.read_text().split()]
    process.kill()
    process.wait()


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_encode_that_is_stopped_says_so_and_leaves_nothing(encoding, number, source, tmp_path):
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
    if number == signal.SIGTERM:
        assert run("encode", source, tmp_path) == 0


def test_a_killed_worker_is_a_sentence(encoding) -> None:
    process, workers = encoding
    assert len(workers) == 1
    os.kill(workers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("ERROR: A worker process was killed (SIGKILL), probably for lack of")
    assert "\n" not in err.strip()
