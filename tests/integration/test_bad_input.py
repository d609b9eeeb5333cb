"""Every kind of damaged data ends in one sentence: which file, which trial, why, what to type.

Each case damages one thing in a sound dataset. `index` (what a job does at start) must stop with
one line and write nothing; `validate` must list the damage; `index --exclude-damaged` must go on
without the trial where only a trial is damaged.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import prepare_dataset
import pytest
from brain_to_text.dataset import encoding
from brain_to_text.dataset.hdf5_writer import MAX_SEQ_ELEMENTS
from brain_to_text.dataset.making import Origin
from brain_to_text.dataset.manifest import Unfinished
from brain_to_text.errors import DataError
from brain_to_text.storage.locations import MANIFEST_NAME
from support.commands import run, tree
from support.small_data import SESSIONS, write_small_dataset

FILE = f"{SESSIONS[0]}/data_train.hdf5"
TRIAL = "trial_0001"


@dataclass(frozen=True)
class Case:
    """One kind of damage. `reason` must be in the sentence, and `trial` unless None."""

    name: str
    damage: Callable[[Path], None]
    reason: str
    trial: str | None = TRIAL


def in_trial(change: Callable[[h5py.Group], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with h5py.File(folder / FILE, "r+") as file:
            change(file[TRIAL])

    return damage


def to_file(change: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: change(folder / FILE)


def without(name: str) -> Callable[[Path], None]:
    def change(trial: h5py.Group) -> None:
        if name in trial:
            del trial[name]
        else:
            del trial.attrs[name]

    return in_trial(change)


def features(values: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def change(trial: h5py.Group) -> None:
        old = trial["input_features"][:]
        del trial["input_features"]
        trial["input_features"] = values(old)

    return in_trial(change)


def value(row: int, column: int, new: float) -> Callable[[Path], None]:
    def change(trial: h5py.Group) -> None:
        trial["input_features"][row, column] = new

    return in_trial(change)


def label(name: str, position: int, new: int) -> Callable[[Path], None]:
    def change(trial: h5py.Group) -> None:
        trial[name][position] = new

    return in_trial(change)


def attribute(name: str, new: object) -> Callable[[Path], None]:
    return in_trial(lambda trial: trial.attrs.__setitem__(name, new))


def replaced(name: str, new: object) -> Callable[[Path], None]:
    def change(trial: h5py.Group) -> None:
        del trial[name]
        trial[name] = new

    return in_trial(change)


def other_form(trial: h5py.Group) -> None:
    """This trial's labels in the transition form, in a self-loop dataset."""
    from brain_to_text.labels.diphones import encode_diphones

    phonemes = trial["seq_class_ids_phoneme"][: trial.attrs["seq_len_phoneme"]]
    labels = encode_diphones(phonemes, "transition")
    trial["seq_class_ids"][:] = np.pad(labels, (0, MAX_SEQ_ELEMENTS - len(labels)))
    trial.attrs["seq_len"] = len(labels)


def no_diphones(trial: h5py.Group) -> None:
    """Labels in an alphabet of 60."""
    del trial["seq_class_ids_phoneme"]
    trial["seq_class_ids"][:3] = [7, 58, 12]
    trial["seq_class_ids"][3:] = 0
    trial.attrs["seq_len"] = 3


def exchanged_labels(folder: Path) -> None:
    """The phoneme labels of another trial."""
    with h5py.File(folder / FILE, "r+") as file:
        trial, other = file[TRIAL], file["trial_0000"]
        trial["seq_class_ids_phoneme"][:] = other["seq_class_ids_phoneme"][:]
        trial.attrs["seq_len_phoneme"] = other.attrs["seq_len_phoneme"]


def compact(trial: h5py.Group) -> None:
    old = trial["input_features"][:]
    del trial["input_features"]
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple(old.shape)
    dataset = h5py.h5d.create(trial.id, b"input_features", h5py.h5t.IEEE_F32LE, space, plist)
    dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, old)


def scale_offset(trial: h5py.Group) -> None:
    old = trial["input_features"][:]
    del trial["input_features"]
    trial.create_dataset("input_features", data=old, chunks=True, scaleoffset=4)


def missing_chunk(trial: h5py.Group) -> None:
    old = trial["input_features"][:]
    del trial["input_features"]
    dataset = trial.create_dataset("input_features", old.shape, old.dtype, chunks=(10, 6))
    dataset[:10] = old[:10]


def never_written(trial: h5py.Group) -> None:
    shape = trial["input_features"].shape
    del trial["input_features"]
    trial.create_dataset("input_features", shape, np.float32)


def flipped_in_chunk(folder: Path) -> None:
    """One byte of a compressed chunk is wrong."""
    path = folder / FILE
    with h5py.File(path, "r+") as file:
        old = file[TRIAL]["input_features"][:]
        del file[TRIAL]["input_features"]
        dataset = file[TRIAL].create_dataset("input_features", data=old, compression="gzip")
        offset = dataset.id.get_chunk_info(0).byte_offset
    data = bytearray(path.read_bytes())
    data[offset + 40] ^= 255
    path.write_bytes(data)


def trial_is_a_dataset(folder: Path) -> None:
    with h5py.File(folder / FILE, "r+") as file:
        del file[TRIAL]
        file[TRIAL] = np.zeros(3)


def moved_session(folder: Path) -> None:
    """The second session's folder holds a copy of the first."""
    shutil.copy(folder / FILE, folder / SESSIONS[1] / "data_train.hdf5")


def narrower(folder: Path) -> None:
    features(lambda old: old[:, :5])(folder)


def no_trials(path: Path) -> None:
    with h5py.File(path, "w"):
        pass


def overwritten(path: Path) -> None:
    """The middle of the file is zeroed: object headers are gone."""
    data = bytearray(path.read_bytes())
    data[600 : len(data) // 2] = bytes(len(data) // 2 - 600)
    path.write_bytes(data)


CASES = [
    # the file
    Case("not HDF5", to_file(lambda p: p.write_bytes(b"PK\3\4 zip")), "not an HDF5 file", None),
    Case("empty file", to_file(lambda p: p.write_bytes(b"")), "not an HDF5 file (0 bytes", None),
    Case(
        "truncated file",
        to_file(lambda p: p.write_bytes(p.read_bytes()[:-3000])),
        "cannot be read as HDF5",
        None,
    ),
    Case("overwritten middle", to_file(overwritten), "cannot be read", None),
    Case("no trials", to_file(no_trials), "holds no trials", None),
    # datasets
    Case("no features", without("input_features"), "dataset input_features is missing"),
    Case(
        "neither phoneme labels nor diphones",
        in_trial(no_diphones),
        "label 58 is no phoneme (1 … 40), and the labels are no diphones of them in either form: "
        "only the alphabet of 41 phoneme classes is read here",
    ),
    Case("trial is no group", trial_is_a_dataset, "is not a group"),
    # attributes
    Case("no n_time_steps", without("n_time_steps"), "attribute n_time_steps is missing"),
    Case("seq_len is a fraction", attribute("seq_len", 2.5), "not a whole number"),
    Case("n_time_steps is wrong", attribute("n_time_steps", 50), "n_time_steps is 50 but"),
    # features
    Case("one NaN", value(7, 3, np.nan), "1 NaN or infinite values, the first at bin 7, feature 3"),
    Case("empty trial", features(lambda old: old[:0]), "input_features is empty"),
    Case("three dimensions", features(lambda old: old[None]), "not [T, C]"),
    Case("narrower than the rest", narrower, "has 5 features where most trials have 6"),
    Case(
        "double precision",
        features(lambda old: old.astype(np.float64)),
        "is float64, not float32 or float16: 'python code/prepare_dataset.py encode' converts it",
    ),
    Case("big endian", features(lambda old: old.astype(">f4")), "not float32 or float16"),
    # labels
    Case("label too large", label("seq_class_ids", 1, 1681), "is 1681, outside 1 … 1680"),
    Case("blank as phoneme", label("seq_class_ids_phoneme", 0, 0), "is 0, outside 1 … 40"),
    Case("length beyond the array", attribute("seq_len", 501), "seq_len is 501 but"),
    Case("labels after the end", label("seq_class_ids", 400, 5), "goes on after"),
    Case("another trial's phonemes", exchanged_labels, "do not match"),
    Case("another label form", in_trial(other_form), "in the transition form where most"),
    Case("labels are a table", replaced("seq_class_ids", np.ones((5, 5), int)), "not a list of"),
    # layout
    Case("compact layout", in_trial(compact), "not stored as one run of bytes"),
    Case("never written", in_trial(never_written), "input_features was never written"),
    Case(
        "missing chunks", in_trial(missing_chunk), "has 1 of its 10 chunks: the others were never"
    ),
    Case("unknown filter", in_trial(scale_offset), "HDF5 filter 6"),
    Case("damaged chunk", flipped_in_chunk, "cannot be decompressed"),
    # sessions
    Case("session copied under another name", moved_session, "attribute session says", None),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_small_dataset(folder)
    return folder


@pytest.fixture
def dataset(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "data"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damage_is_one_sentence(case: Case, dataset: Path, capsys: pytest.CaptureFixture) -> None:
    case.damage(dataset)
    before = tree(dataset)

    assert run("index", dataset) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("ERROR: ")
    assert "\n" not in error, "one sentence, no traceback"
    damaged = f"{SESSIONS[1]}/data_train.hdf5" if case.damage is moved_session else FILE
    assert damaged in error
    assert case.reason in error
    assert case.trial is None or f"{damaged}:{case.trial}" in error
    assert f"prepare_dataset.py validate {dataset}" in error
    assert tree(dataset) == before, "nothing is written"

    assert run("validate", dataset) == 1
    report = capsys.readouterr().out
    assert case.reason in report

    assert run("index", dataset, "--exclude-damaged") == 0
    printed = capsys.readouterr().out
    assert f"Left out as damaged: {damaged}" in printed
    assert (dataset / MANIFEST_NAME).exists()


def test_the_sound_dataset_passes(dataset: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("index", dataset) == 0
    assert run("validate", dataset) == 0
    assert "0 errors, 0 warnings" in capsys.readouterr().out


# --- damage that does not stop the index but that validate must name ------------------------------


def infeasible(folder: Path) -> None:
    """Sixteen bins are one frame; the labels need more."""

    def change(trial: h5py.Group) -> None:
        short = trial["input_features"][:16]
        del trial["input_features"]
        trial["input_features"] = short
        trial.attrs["n_time_steps"] = 16

    in_trial(change)(folder)


def copied_trial(folder: Path) -> None:
    """A training trial occurs again in validation."""
    with (
        h5py.File(folder / FILE, "r") as source,
        h5py.File(folder / SESSIONS[0] / "data_val.hdf5", "r+") as target,
    ):
        source.copy(TRIAL, target, "trial_0099")


def copied_otherwise(
    name: str, change: Callable[[np.ndarray], np.ndarray], **layout: object
) -> Callable[[Path], None]:
    """`copied_trial`, with features that are stored in another way or rounded."""

    def damage(folder: Path) -> None:
        copied_trial(folder)
        with h5py.File(folder / SESSIONS[0] / "data_val.hdf5", "r+") as file:
            trial = file["trial_0099"]
            features = change(trial["input_features"][:])
            del trial["input_features"]
            trial.create_dataset("input_features", data=features, **layout)

    damage.__name__ = name
    return damage


def repeated_trial(folder: Path) -> None:
    with h5py.File(folder / FILE, "r+") as file:
        file.copy(TRIAL, file, "trial_0099")


def no_training_file(folder: Path) -> None:
    (folder / FILE).unlink()


def no_validation_files(folder: Path) -> None:
    for path in folder.glob("*/data_val.hdf5"):
        path.unlink()


def stale_manifest(folder: Path) -> None:
    run("index", folder)
    repeated_trial(folder)


def damaged_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).write_bytes(b"not gzip")


def unscaled(folder: Path) -> None:
    with h5py.File(folder / FILE, "r+") as file:
        for trial in file.values():
            trial["input_features"][:] *= 30


def odd_group(folder: Path) -> None:
    with h5py.File(folder / FILE, "r+") as file:
        file.create_group("notes")


def odd_file(folder: Path) -> None:
    shutil.copy(folder / FILE, folder / SESSIONS[0] / "data_train (1).hdf5")


@pytest.mark.parametrize(
    ("damage", "code", "reason"),
    [
        (infeasible, 1, "16 bins give 1 frames|16 bins give 0 frames"),
        (copied_trial, 1, r"data_val.hdf5:trial_0099: has the same features as .*data_train.hdf5"),
        *(
            (
                copied_otherwise(name, change, **layout),
                1,
                r"data_val.hdf5:trial_0099: has the same features as .*data_train.hdf5:trial_0001: "
                "val is not independent of train",
            )
            for name, change, layout in (
                ("gzip", np.asarray, {"compression": "gzip", "chunks": (20, 6)}),
                ("float16", np.float16, {}),
            )
        ),
        (repeated_trial, 0, r"trial_0099: has the same features as .*trial_0001"),
        (
            repeated_trial,
            0,
            r"trial_0099: is block 2 trial 1 of its session, like .*, with the same labels",
        ),
        (no_training_file, 1, rf"{FILE}: is missing"),
        (no_validation_files, 1, "data_val.hdf5: no session has it"),
        (stale_manifest, 1, r"no longer fits the data files: 1 changed"),
        (damaged_manifest, 1, rf"{MANIFEST_NAME} is damaged"),
        (unscaled, 0, "standard deviation of .*z-scored"),
        (odd_group, 0, "notes: is not named trial_NNNN"),
        (odd_file, 0, r"data_train \(1\).hdf5: is not SESSION"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_validate_names_it(damage, code, reason, dataset, capsys) -> None:
    import re

    damage(dataset)
    capsys.readouterr()
    assert run("validate", dataset) == code
    assert re.search(reason, capsys.readouterr().out)


def test_trials_that_are_no_copies_are_not_taken_for_copies(tmp_path, capsys) -> None:
    """As many bins each, and features of one distribution."""
    with_equal_lengths = ["--sessions", 1, "--trials", 40, "--electrodes", 4]
    assert run("synthesize", tmp_path, *with_equal_lengths) == 0
    for path in tmp_path.rglob("*.hdf5"):
        with h5py.File(path, "r+") as file:
            for trial in file.values():
                features = trial["input_features"][:20]
                del trial["input_features"]
                trial["input_features"] = features
                trial.attrs["n_time_steps"] = 20
    run("validate", tmp_path)
    assert "same features" not in capsys.readouterr().out


# --- places without data --------------------------------------------------------------------------


def test_an_absent_folder(tmp_path, capsys) -> None:
    for command in ("index", "validate"):
        assert run(command, tmp_path / "absent") == 1
        assert "there is nothing at all; check the folder's name" in capsys.readouterr().err


def test_one_level_too_high(dataset, capsys) -> None:
    assert run("index", dataset.parent) == 1
    assert f"give {dataset.parent}/data instead" in capsys.readouterr().err


def test_other_things(tmp_path, capsys) -> None:
    (tmp_path / "movie.mp4").write_bytes(b"x")
    assert run("index", tmp_path) == 1
    assert "it holds other things (movie.mp4)" in capsys.readouterr().err


# --- encode ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (without("input_features"), "input_features is missing"),
        (value(3, 3, np.inf), "1 NaN or infinite"),
    ],
)
def test_encode_refuses_damage_and_leaves_no_file(damage, reason, tmp_path, capsys) -> None:
    write_small_dataset(tmp_path / "old", form=None)
    damage(tmp_path / "old")
    assert run("encode", tmp_path / "old", tmp_path / "new") == 1
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and f"{FILE}:{TRIAL}" in error and reason in error
    assert not (tmp_path / "new" / FILE).exists()
    assert FILE in Unfinished.of((tmp_path / "new" / MANIFEST_NAME).read_bytes()).files


def other_features(trial: h5py.Group) -> None:
    trial["input_features"][2, 1] += 0.01


def other_phonemes(trial: h5py.Group) -> None:
    """Sound labels, but of something else."""
    from brain_to_text.labels.diphones import encode_diphones

    phonemes = trial["seq_class_ids_phoneme"]
    phonemes[0] = phonemes[0] % 40 + 1
    labels = encode_diphones(phonemes[: trial.attrs["seq_len_phoneme"]])
    trial["seq_class_ids"][: len(labels)] = labels


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_features, "the encoded features differ from the source's"),
        (other_phonemes, "the encoded labels do not decode to the source's"),
    ],
)
def test_encode_proves_every_trial_before_it_writes_a_file(
    change, reason, tmp_path, monkeypatch
) -> None:
    write_small_dataset(tmp_path / "old", form=None)
    real = encoding.encode_file

    def mistaken(*arguments, **more):
        encoded, *left_out = real(*arguments, **more)
        buffer = io.BytesIO(encoded)
        with h5py.File(buffer, "r+") as file:
            change(file[TRIAL])
        return buffer.getvalue(), *left_out

    monkeypatch.setattr(encoding, "encode_file", mistaken)
    read, target = (tmp_path / "old" / FILE).read_bytes, str(tmp_path / "new")
    options = encoding.EncodingOptions()
    origin = Origin("encode", options.purpose())
    with pytest.raises(DataError) as stopped:
        encoding._encode_job(FILE, FILE, read, target, options, origin, None, False)
    assert str(stopped.value) == f"{FILE}:{TRIAL}: {reason}."
    assert not (tmp_path / "new" / FILE).exists()


def test_labels_that_do_not_fit_are_named(tmp_path, capsys) -> None:
    write_small_dataset(tmp_path / "old", form=None)
    with h5py.File(tmp_path / "old" / FILE, "r+") as file:
        file[TRIAL]["seq_class_ids"][:300] = 7
        file[TRIAL].attrs["seq_len"] = 300
    assert run("encode", tmp_path / "old", tmp_path / "new") == 1
    assert "601 labels do not fit into the schema's 500" in capsys.readouterr().err


def test_float16_overflow_is_named(tmp_path, capsys) -> None:
    write_small_dataset(tmp_path / "old", form=None)
    value(0, 0, 1e6)(tmp_path / "old")
    assert run("encode", tmp_path / "old", tmp_path / "new", "--dtype", "float16") == 1
    assert "exceeds what float16 can hold" in capsys.readouterr().err


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


def test_a_lexicon_that_would_not_be_used_is_refused(dataset, tmp_path, capsys) -> None:
    assert run("encode", dataset, tmp_path / "new", "--lexicon", "words.txt") == 1
    assert capsys.readouterr().err.startswith("ERROR: --lexicon is for labels from text")


def test_usage_errors_exit_with_2(capsys) -> None:
    for wrong in (["encode", "a"], ["index"], ["paint"], ["synthesize", "x", "--trials", "zip"]):
        with pytest.raises(SystemExit) as stopped:
            prepare_dataset.main(wrong)
        assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err
