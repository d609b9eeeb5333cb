"""Hostile and unlucky data files, and processes that are ended: sentences, nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import prepare_dataset
import pytest
from brain_to_text.dataset.isolation import Lost, in_workers
from support.commands import run
from support.fuzzing import rounds
from support.hdf5_fuzz import KEY, look_at, mutations
from support.processes import heed_signals
from support.small_data import SESSIONS, write_small_dataset

FRONT_DOOR = Path(prepare_dataset.__file__)
FILE = f"{SESSIONS[0]}/data_train.hdf5"
IN_A_ROUND = 200  # mutations


# --- damaged bytes --------------------------------------------------------------------------------


def test_fuzzed_files_end_in_sentences() -> None:
    for seed in rounds(1):
        jobs = {name: (data,) for name, data in mutations(2026 + seed, IN_A_ROUND)}
        kinds: Counter[str] = Counter()
        for _, answer in in_workers(look_at, jobs, 2):
            sentence = answer.damage if isinstance(answer, Lost) else answer
            kinds["lost" if isinstance(answer, Lost) else sentence[:5]] += 1
        assert sum(kinds.values()) == IN_A_ROUND
        aim = "the fuzzer must not miss its aim"
        assert kinds["sound"] < IN_A_ROUND / 2 and kinds["lost"] < 10, aim


def mutation(name: str) -> bytes:
    seed, number = (int(part) for part in name.split()[0].split("/"))
    return dict(mutations(seed, number + 1))[name]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("0/438 copy at 3055 of file 3", "does not come to an end"),
        ("1/182 copy at 12994 of file 4", r"crashes the process \(SIG"),
    ],
)
def test_a_file_that_hangs_or_crashes_the_library_is_named(name, reason, tmp_path, capsys) -> None:
    write_small_dataset(tmp_path / "src", form=None)
    (tmp_path / "src" / KEY).write_bytes(mutation(name))
    assert run("encode", tmp_path / "src", tmp_path / "new") == 1
    error = capsys.readouterr().err.strip()
    assert re.search(f"{KEY}: reading it {reason}", error) and "\n" not in error
    assert not (tmp_path / "new" / KEY).exists()
    if "crashes" in reason:
        assert run("index", tmp_path / "src") == 1
        assert KEY in capsys.readouterr().err
        assert run("index", tmp_path / "src", "--exclude-damaged") == 0, "the other files"


def gigantic(name: str, shape: tuple[int, ...], dtype: str, chunks: tuple[int, ...], **more):
    """A dataset that claims to be large and holds nothing."""

    def change(trial: h5py.Group) -> None:
        trial.pop(name, None)
        trial.create_dataset(name, shape, dtype, chunks=chunks, **more)
        if name == "input_features":
            trial.attrs["n_time_steps"] = shape[0]
        if name == "seq_class_ids":
            trial.attrs["seq_len"] = shape[0] // 2

    return change


def one_giant_chunk(trial: h5py.Group) -> None:
    """A terabyte that claims to come from a few bytes."""
    del trial["input_features"]
    shape = (2**20, 2**10)  # 4 GiB, as large as HDF5 lets a chunk be
    made = trial.create_dataset("input_features", shape, "f4", chunks=(2**20, 1000), compression=9)
    for start in range(0, shape[1], 1000):
        made.id.write_direct_chunk((0, start), b"x\x9c\x03\x00\x00\x00\x00\x01")
    trial.attrs["n_time_steps"] = shape[0]


def huge_attribute(trial: h5py.Group) -> None:
    trial.attrs["session"] = np.zeros(8000, "S8")


def ragged(trial: h5py.Group) -> None:
    del trial["input_features"]
    made = trial.create_dataset("input_features", (3, 6), h5py.vlen_dtype("f4"))
    made[0, 0] = [1, 2]


def instead(make: Callable[[h5py.Group], object], name: str = "input_features"):
    """Something else under a dataset's name."""

    def change(trial: h5py.Group) -> None:
        value = make(trial)
        del trial[name]
        trial[name] = value

    return change


HOSTILE = {
    "many labels": gigantic("seq_class_ids", (10**10,), "i4", (10**6,), compression="gzip"),
    "many characters": gigantic("transcription", (10**10,), "i4", (10**6,), compression="gzip"),
    "many bins": gigantic("input_features", (10**9, 512), "f4", (10**5, 512), shuffle=True),
    "one giant chunk": one_giant_chunk,
    "a huge attribute": huge_attribute,
    "a link to itself": instead(lambda trial: h5py.SoftLink(f"{trial.name}/input_features")),
    "a group in itself": instead(lambda trial: trial),
    "a named type": instead(lambda trial: np.dtype("f4")),
    "no value": instead(lambda trial: h5py.Empty("f4")),
    "complex numbers": instead(lambda trial: trial["input_features"][:].astype("c8")),
    "ragged": ragged,
    "no labels' value": instead(lambda trial: h5py.Empty("i4"), "seq_class_ids"),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_hand_made_lies_are_one_sentence(make, tmp_path, capsys) -> None:
    write_small_dataset(tmp_path / "src", form=None)
    with h5py.File(tmp_path / "src" / FILE, "r+") as file:
        make(file["trial_0001"])
    for command in (["index"], ["encode", tmp_path / "new"]):
        assert run(command[0], tmp_path / "src", *command[1:]) == 1
        error = capsys.readouterr().err.strip()
        assert "\n" not in error and f"{FILE}:trial_0001" in error
    assert run("index", tmp_path / "src", "--exclude-damaged") == 0
    assert run("encode", tmp_path / "src", tmp_path / "new", "--exclude-damaged") in (0, 1)
    assert "Traceback" not in capsys.readouterr().err


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
