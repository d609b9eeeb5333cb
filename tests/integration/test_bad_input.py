"""Every kind of damaged data ends in one sentence: which file, which trial, why, what to type.

Each case of the tables damages one thing in a session of its own. `index` (what a job does at
start) stops with one line and writes nothing, `validate` lists all damage, and `--exclude-damaged`
names what it leaves out and goes on with the rest.
"""

from __future__ import annotations

import io
import json
import shutil
import zlib
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import prepare_dataset
import pytest
from brain_to_text.dataset import encoding
from brain_to_text.dataset.hdf5_writer import data_file_bytes, padded
from brain_to_text.dataset.making import Origin
from brain_to_text.errors import DataError
from brain_to_text.labels.diphones import encode_diphones
from brain_to_text.storage.locations import MANIFEST_NAME
from support.commands import run, tree
from support.small_data import SESSIONS, small_trial, write_small_dataset

FILE = f"{SESSIONS[0]}/data_train.hdf5"
TRIAL = "trial_0001"
Change = Callable[[h5py.Group], object]


def without(name: str) -> Change:
    return lambda trial: trial.pop(name) if name in trial else trial.attrs.pop(name)


def attribute(name: str, new: object) -> Change:
    return lambda trial: trial.attrs.__setitem__(name, new)


def element(name: str, place: Any, new: float) -> Change:
    return lambda trial: trial[name].__setitem__(place, new)


def instead(name: str, make: Callable[[Any], object] = np.asarray, **layout: Any) -> Change:
    """Something else under a dataset's name, or the same values in another layout."""

    def change(trial: h5py.Group) -> None:
        made = make(trial.pop(name)[()])
        if layout:
            trial.create_dataset(name, data=made, **layout)
        else:
            trial[name] = made

    return change


def features(make: Callable[[Any], object] = np.asarray, **layout: Any) -> Change:
    return instead("input_features", make, **layout)


def many_labels(trial: h5py.Group) -> None:
    """Ten thousand million that were never written."""
    del trial["seq_class_ids"]
    trial.create_dataset("seq_class_ids", (10**10,), "i4", chunks=(10**6,), compression="gzip")


def one_giant_chunk(trial: h5py.Group) -> None:
    """4 GiB, as large as HDF5 lets a chunk be, that claim to come from a few bytes."""
    del trial["input_features"]
    shape = (2**20, 1000)
    made = trial.create_dataset("input_features", shape, "f4", chunks=shape, compression="gzip")
    made.id.write_direct_chunk((0, 0), b"x\x9c\x03\x00\x00\x00\x00\x01")
    trial.attrs["n_time_steps"] = shape[0]


def ragged(trial: h5py.Group) -> None:
    del trial["input_features"]
    trial.create_dataset("input_features", (90, 6), h5py.vlen_dtype("f4"))


def never_written(trial: h5py.Group) -> None:
    old = trial.pop("input_features")
    trial.create_dataset("input_features", old.shape, old.dtype)


def missing_chunks(trial: h5py.Group) -> None:
    old = trial.pop("input_features")
    trial.create_dataset("input_features", old.shape, old.dtype, chunks=(10, 6))[:10] = old[:10]


def virtual(trial: h5py.Group) -> None:
    """Of values in the same file, but not of all."""
    old = trial["input_features"]
    layout = h5py.VirtualLayout(old.shape, "f4")
    layout[:10] = h5py.VirtualSource(old)[:10]
    trial.move("input_features", "values")
    trial.create_virtual_dataset("input_features", layout)


def external(trial: h5py.Group) -> None:
    old = trial.pop("input_features")
    stored = [("raw.bin", 0, old.nbytes)]
    trial.create_dataset("input_features", old.shape, old.dtype, external=stored)


def packed_by_sperr(trial: h5py.Group) -> None:
    """As the package hdf5plugin would do it."""
    old = trial.pop("input_features")
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk(old.shape)
    plist.set_filter(32028, h5py.h5z.FLAG_OPTIONAL, (3,))
    space = h5py.h5s.create_simple(old.shape)
    made = h5py.h5d.create(trial.id, b"input_features", h5py.h5t.IEEE_F32LE, space, plist)
    made.write_direct_chunk((0, 0), bytes(200))


def compact(trial: h5py.Group) -> None:
    old = trial.pop("input_features")[()]
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple(old.shape)
    made = h5py.h5d.create(trial.id, b"input_features", h5py.h5t.IEEE_F32LE, space, plist)
    made.write(h5py.h5s.ALL, h5py.h5s.ALL, old)


def damaged_chunk(trial: h5py.Group) -> None:
    features(compression="gzip")(trial)
    stored = trial["input_features"].id
    place = stored.get_chunk_info(0).chunk_offset
    mask, packed = stored.read_direct_chunk(place)
    wrong = bytearray(packed)
    wrong[40] ^= 255
    stored.write_direct_chunk(place, bytes(wrong), mask)


def labels(ids: list[int] | np.ndarray, phonemes: bool = True) -> Change:
    """Other diphone labels; their phonemes stay or go."""

    def change(trial: h5py.Group) -> None:
        trial["seq_class_ids"][:] = padded(np.asarray(ids))
        trial.attrs["seq_len"] = len(ids)
        if not phonemes:
            del trial["seq_class_ids_phoneme"]

    return change


def in_transition_form(trial: h5py.Group) -> None:
    spoken = trial["seq_class_ids_phoneme"][: trial.attrs["seq_len_phoneme"]]
    labels(encode_diphones(spoken, "transition"))(trial)


def a_trial_that_is_no_group(trial: h5py.Group) -> None:
    file, name = trial.parent, trial.name
    del file[name]
    file[name] = np.zeros(3)


def labels_elsewhere(trial: h5py.Group) -> None:
    del trial["seq_class_ids"]
    trial["seq_class_ids"] = h5py.ExternalLink("labels.hdf5", "/not/here")


# What is wrong with a trial, and why it is refused. Of a trial in BY_INDEX alone, `encode` makes a
# sound one.
IN_A_TRIAL: dict[str, tuple[Change, str]] = {
    # datasets
    "no features": (without("input_features"), "dataset input_features is missing"),
    "no group": (a_trial_that_is_no_group, "is not a group"),
    "no value": (features(lambda _: h5py.Empty("f4")), "input_features is missing: it holds no"),
    # attributes
    "no n_time_steps": (without("n_time_steps"), "attribute n_time_steps is missing"),
    "wrong n_time_steps": (attribute("n_time_steps", 50), "n_time_steps is 50 but"),
    "a fraction": (attribute("seq_len", 2.5), "not a whole number"),
    # features
    "one NaN": (
        element("input_features", (7, 3), np.nan),
        "1 NaN or infinite values, the first at bin 7, feature 3",
    ),
    "no bins": (features(lambda old: old[:0]), "input_features is empty"),
    "three dimensions": (features(lambda old: old[None]), "not [T, C]"),
    "ragged": (ragged, "object, not float32 or"),
    # how features are stored
    "never written": (never_written, "input_features was never written"),
    "missing chunks": (missing_chunks, "has 1 of its 10 chunks: the others were never"),
    "virtual": (virtual, "input_features lies in other files (virtual): copy the values"),
    "external": (external, "input_features lies in other files (external): copy the values"),
    "packed by sperr": (
        packed_by_sperr,
        "is compressed by HDF5 filter 32028 (without a name), which is not installed: type 'pip "
        "install hdf5plugin', or set HDF5_PLUGIN_PATH",
    ),
    "a damaged chunk": (damaged_chunk, "cannot be read ("),
    "a giant chunk": (one_giant_chunk, "cannot be read ("),
    # labels
    "labels elsewhere": (
        labels_elsewhere,
        "seq_class_ids is a link into another file, labels.hdf5: copy the values into this file",
    ),
    "another alphabet": (
        labels([7, 58, 12], phonemes=False),
        "label 58 is no phoneme (1 … 40), and the labels are no diphones of them in either form: "
        "only the alphabet of 41 phoneme classes is read here",
    ),
    "a label too large": (element("seq_class_ids", 1, 1681), "is 1681, outside 1 … 1680"),
    "a blank as phoneme": (element("seq_class_ids_phoneme", 0, 0), "is 0, outside 1 … 40"),
    "a length beyond": (attribute("seq_len", 501), "seq_len is 501 but"),
    "labels after the end": (element("seq_class_ids", 400, 5), "goes on after"),
    "other phonemes": (element("seq_class_ids_phoneme", 0, 9), "do not match"),
    "labels in a table": (
        instead("seq_class_ids", lambda _: np.ones((5, 5), int)),
        "not a list of",
    ),
    "many labels": (many_labels, "cannot be read ("),
}
BY_INDEX: dict[str, tuple[Change, str]] = {
    "double precision": (
        features(lambda old: old.astype(">f8")),
        "is >f8, not float32 or float16: 'python code/prepare_dataset.py encode' converts it",
    ),
    "compact": (compact, "not stored as one run of bytes"),
    "scale and offset": (features(chunks=True, scaleoffset=4), "HDF5 filter 6"),
    "the transition form": (in_transition_form, "in the transition form where most"),
}
BY_ENCODE: dict[str, tuple[Change, str]] = {
    "many labels": (labels(np.full(300, 7)), "601 labels do not fit into the schema's 500"),
    "large values": (element("input_features", (0, 0), 1e6), "exceeds what float16 can hold"),
}


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3000])


def zeroed(path: Path) -> None:
    """The middle of the file is zero: object headers are gone."""
    data = bytearray(path.read_bytes())
    data[600 : len(data) // 2] = bytes(len(data) // 2 - 600)
    path.write_bytes(data)


def of_another_session(path: Path) -> None:
    path.write_bytes(data_file_bytes([small_trial("t15.2023.08.11", 0, 0)]))


def narrow(path: Path) -> None:
    trial = small_trial(path.parent.name, 0, 0)
    path.write_bytes(data_file_bytes([replace(trial, features=trial.features[:, :5])]))


IN_A_FILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a zip file": (lambda path: path.write_bytes(b"PK\3\4 zip"), "not an HDF5 file: 8 bytes"),
    "empty": (lambda path: path.write_bytes(b""), "not an HDF5 file: 0 bytes"),
    "truncated": (truncated, "cannot be read as HDF5"),
    "overwritten": (zeroed, "cannot be read"),
    "no trials": (lambda path: h5py.File(path, "w").close(), "holds no trials"),
    "a session's copy": (of_another_session, "attribute session says"),
    "narrow": (narrow, "has 5 features where most trials have 6"),
}


def session_of(case: str) -> str:
    return "t15." + case.replace(" ", ".").replace("'", "")


def write_session(folder: Path, case: str, form: Any = "self_loop") -> Path:
    """Three trials in a session named by its case."""
    path = folder / session_of(case) / "data_train.hdf5"
    path.parent.mkdir(parents=True)
    seed = 3 * zlib.crc32(case.encode())
    trials = [small_trial(path.parent.name, n, seed + n, form=form) for n in range(3)]
    path.write_bytes(data_file_bytes(trials))
    return path


def in_trial(path: Path, change: Change) -> None:
    with h5py.File(path, "r+") as file:
        change(file[TRIAL])


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A session for each case of IN_A_TRIAL, BY_INDEX and IN_A_FILE, and a sound one."""
    folder = tmp_path_factory.mktemp("broken")
    write_session(folder, "sound")
    for case, (change, _) in (IN_A_TRIAL | BY_INDEX).items():
        in_trial(write_session(folder, case), change)
    for case, (damage, _) in IN_A_FILE.items():
        damage(write_session(folder, case))
    return folder


@pytest.fixture(scope="module")
def found(broken: Path) -> dict[str, list[str]]:
    """What is wrong with each session, as `validate` says."""
    with redirect_stdout(io.StringIO()) as printed:
        assert run("validate", broken, "--json") == 1
    errors: dict[str, list[str]] = {}
    for error in json.loads(printed.getvalue())["errors"]:
        if error["key"].endswith("data_train.hdf5"):
            session = error["key"].partition("/")[0]
            errors.setdefault(session, []).append(f"{error['trial']}: {error['reason']}")
    return errors


@pytest.mark.parametrize("case", IN_A_TRIAL | BY_INDEX)
def test_one_damaged_trial_is_one_finding_with_its_reason(case, found) -> None:
    (finding,) = found[session_of(case)]
    assert finding.startswith(f"{TRIAL}: ") and (IN_A_TRIAL | BY_INDEX)[case][1] in finding


@pytest.mark.parametrize("case", IN_A_FILE)
def test_a_damaged_file_is_named_with_the_reason(case, found) -> None:
    assert IN_A_FILE[case][1] in found[session_of(case)][0]


def test_nothing_else_is_found(found) -> None:
    assert found.keys() == {session_of(case) for case in IN_A_TRIAL | BY_INDEX | IN_A_FILE}


def test_index_stops_with_one_sentence_and_leaves_out_on_demand(broken, found, capsys) -> None:
    before = tree(broken)
    assert run("index", broken) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("ERROR: ") and error.isprintable()
    more = sum(map(len, found.values())) - 1
    assert f"(and {more} more findings); see all with 'python code/prepare_dataset.py val" in error
    assert tree(broken) == before, "nothing is written"
    assert run("index", broken, "--exclude-damaged") == 0
    printed = capsys.readouterr().out
    for session in found:
        assert f"Left out as damaged: {session}/data_train.hdf5" in printed
    (broken / MANIFEST_NAME).unlink()


def test_encode_leaves_out_what_it_cannot_mend_on_demand(broken, tmp_path, capsys) -> None:
    for case in IN_A_TRIAL | BY_INDEX:
        shutil.copytree(broken / session_of(case), tmp_path / "old" / session_of(case))
    for case, (change, _) in BY_ENCODE.items():
        in_trial(write_session(tmp_path / "old", f"encode {case}", None), change)
    options = ["--dtype", "float16", "--exclude-damaged"]
    assert run("encode", tmp_path / "old", tmp_path / "new", *options) == 0
    left_out = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Left")]
    expected = IN_A_TRIAL | {f"encode {case}": value for case, value in BY_ENCODE.items()}
    assert len(left_out) == len(expected)
    for case, (_, reason) in expected.items():
        (line,) = [line for line in left_out if f" {session_of(case)}/" in line]
        assert f"/data_train.hdf5:{TRIAL}: " in line and reason in line and line.isprintable()


def test_encode_refuses_damage_and_leaves_no_file(tmp_path, capsys) -> None:
    write_small_dataset(tmp_path / "old", form=None)
    in_trial(tmp_path / "old" / FILE, element("input_features", (3, 3), np.inf))
    assert run("encode", tmp_path / "old", tmp_path / "new") == 1
    error = capsys.readouterr().err.strip()
    assert error.isprintable() and f"{FILE}:{TRIAL}: input_features holds 1 NaN" in error
    assert not (tmp_path / "new" / FILE).exists()
    assert run("index", tmp_path / "new") == 1
    assert f"was to write 5 files ({FILE}" in capsys.readouterr().err


def other_phonemes(trial: h5py.Group) -> None:
    """Sound labels, but of something else."""
    phonemes = trial["seq_class_ids_phoneme"]
    phonemes[0] = phonemes[0] % 40 + 1
    labels(encode_diphones(phonemes[: trial.attrs["seq_len_phoneme"]]))(trial)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (element("input_features", (2, 1), 7), "the encoded features differ from the source's"),
        (other_phonemes, "the encoded labels do not decode to the source's"),
    ],
)
def test_encode_proves_every_trial_before_it_writes_a_file(
    change, reason, tmp_path, monkeypatch
) -> None:
    write_small_dataset(tmp_path / "old", form=None)
    real = encoding.encode_file

    def mistaken(*arguments):
        encoded, *more = real(*arguments)
        buffer = io.BytesIO(encoded)
        with h5py.File(buffer, "r+") as file:
            change(file[TRIAL])
        return buffer.getvalue(), *more

    monkeypatch.setattr(encoding, "encode_file", mistaken)
    read, target = (tmp_path / "old" / FILE).read_bytes, str(tmp_path / "new")
    options = encoding.EncodingOptions()
    origin = Origin("encode", options.purpose())
    with pytest.raises(DataError) as stopped:
        encoding._encode_job(FILE, FILE, read, target, options, origin, None, False)
    assert str(stopped.value) == f"{FILE}:{TRIAL}: {reason}."
    assert not (tmp_path / "new" / FILE).exists()


# --- what only a look at the whole dataset shows --------------------------------------------------


def infeasible(path: Path) -> None:
    """Sixteen bins are one frame; the labels need more."""
    in_trial(path, features(lambda old: old[:16]))
    in_trial(path, attribute("n_time_steps", 16))


def copied_to_val(**how: Any) -> Callable[[Path], None]:
    """A training trial occurs again in validation, stored in another way or rounded."""

    def damage(path: Path) -> None:
        with h5py.File(path) as old, h5py.File(path.with_name("data_val.hdf5"), "w") as new:
            old.copy(TRIAL, new)
            features(**how)(new[TRIAL])

    return damage


def repeated(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.copy(TRIAL, file, "trial_0099")


def not_scaled(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        for trial in file.values():
            trial["input_features"][:] *= 30


def odd_group(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.create_group("notes")


COPY = (
    "data_val.hdf5:trial_0001: has the same features as t15.{}/data_train.hdf5:trial_0001: val is"
)
# (damage, severity, file and reason)
AMONG_FILES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "infeasible": (infeasible, "errors", "data_train.hdf5:trial_0001: 16 bins give"),
    "copy": (copied_to_val(), "errors", COPY.format("copy")),
    "packed copy": (
        copied_to_val(compression="gzip", chunks=(20, 6)),
        "errors",
        COPY.format("packed.copy"),
    ),
    "rounded copy": (copied_to_val(make=np.float16), "errors", COPY.format("rounded.copy")),
    "repeated": (
        repeated,
        "warnings",
        "data_train.hdf5:trial_0099: has the same features as",
    ),
    "repeated number": (
        repeated,
        "warnings",
        "data_train.hdf5:trial_0099: is block 2 trial 1 of its session, like",
    ),
    "no train": (
        lambda path: path.rename(path.with_name("data_test.hdf5")),
        "errors",
        "data_train.hdf5: is missing",
    ),
    "not scaled": (not_scaled, "warnings", "are they z-scored?"),
    "odd group": (odd_group, "warnings", "data_train.hdf5:notes: is not named trial_NNNN"),
    "odd file": (
        lambda path: shutil.copy(path, path.with_name("data_train (1).hdf5")),
        "warnings",
        "data_train (1).hdf5: is not SESSION",
    ),
}


def test_validate_names_what_is_odd_among_files(tmp_path, capsys) -> None:
    for case, (damage, _, _) in AMONG_FILES.items():
        damage(write_session(tmp_path, case))
    assert run("validate", tmp_path, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    for case, (_, severity, expected) in AMONG_FILES.items():
        told = [
            ":".join(filter(None, (finding["key"], finding["trial"]))) + f": {finding['reason']}"
            for finding in report[severity]
            if finding["key"].startswith(f"{session_of(case)}/")
        ]
        assert [line for line in told if expected in line], (case, told)


def test_validate_names_a_manifest_that_does_not_fit(tmp_path, capsys) -> None:
    write_small_dataset(tmp_path)
    assert run("index", tmp_path) == 0
    capsys.readouterr()
    assert run("validate", tmp_path) == 0
    assert "0 errors, 0 warnings" in capsys.readouterr().out
    repeated(tmp_path / FILE)
    for path in tmp_path.glob("*/data_val.hdf5"):
        path.unlink()
    assert run("validate", tmp_path) == 1
    printed = capsys.readouterr().out
    assert "no longer fits the data files: 1 changed" in printed
    assert "data_val.hdf5: no session has it" in printed
    (tmp_path / MANIFEST_NAME).write_bytes(b"not gzip")
    assert run("validate", tmp_path) == 1
    assert f"{MANIFEST_NAME} is damaged" in capsys.readouterr().out


# --- folders without data, and the command line ---------------------------------------------------


def test_a_folder_without_data_says_what_to_give(tmp_path, capsys) -> None:
    write_small_dataset(tmp_path / "above" / "data")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "movie.mp4").write_bytes(b"x")
    for name, reason in (
        ("absent", "there is nothing at all; check the folder's name"),
        ("above", f"give {tmp_path}/above/data instead"),
        ("other", "it holds other things (movie.mp4)"),
    ):
        assert run("index", tmp_path / name) == 1
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--seed", "-1"], "--seed must not be negative"),
        (["--electrodes", "9999999"], "--electrodes must be from 1"),
        (["--sessions", "46"], "--sessions must be from 1 to 45"),
    ],
)
def test_what_cannot_be_synthesized_is_one_sentence(arguments, reason, tmp_path, capsys) -> None:
    assert run("synthesize", tmp_path / "new", *arguments) == 1
    error = capsys.readouterr().err.strip()
    assert reason in error and "\n" not in error
    assert not (tmp_path / "new").exists()


def test_options_that_do_not_go_together_are_refused(tmp_path, capsys) -> None:
    assert run("encode", tmp_path, tmp_path / "new", "--lexicon", "words.txt") == 1
    assert capsys.readouterr().err.startswith("ERROR: --lexicon is for labels from text")
    for wrong in (["encode", "a"], ["paint"], ["synthesize", "x", "--trials", "zip"]):
        with pytest.raises(SystemExit) as stopped:
            prepare_dataset.main(wrong)
        assert stopped.value.code == 2
