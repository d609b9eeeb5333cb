"""What people really bring: places spelt in many ways, files of many tools, labels of many kinds.

Each test builds the awkward input, runs the command, and holds the result against what a plain
input gives, or asks for one sentence and for nothing changed.
"""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import h5py
import numpy as np
import pytest
from brain_to_text.dataset.hdf5_reader import inspect_file
from brain_to_text.dataset.hdf5_writer import data_file_bytes
from brain_to_text.dataset.indexing import index_dataset
from brain_to_text.dataset.manifest import load_manifest
from brain_to_text.labels.diphones import LABEL_FORMS, encode_diphones
from brain_to_text.labels.phonemes import phoneme_ids
from brain_to_text.storage.locations import MANIFEST_NAME
from brain_to_text.storage.store import open_store
from support.commands import run, tree
from support.small_data import SESSIONS, small_trial, write_small_dataset

FILE = f"{SESSIONS[0]}/data_train.hdf5"
TEST_FILE = f"{SESSIONS[1]}/data_test.hdf5"


def in_every_trial(folder: Path, change: Callable[[h5py.Group], None], pattern="*.hdf5") -> None:
    for path in folder.rglob(pattern):
        with h5py.File(path, "r+") as file:
            for trial in file.values():
                change(trial)


def sentence(capsys: pytest.CaptureFixture) -> str:
    """The one line of a refusal."""
    error = capsys.readouterr().err.strip()
    assert error.startswith("ERROR: ") and "\n" not in error
    return error


@pytest.fixture
def source(tmp_path: Path, monkeypatch) -> Path:
    """A phoneme set in src/, and the folder around it as the working folder."""
    monkeypatch.chdir(tmp_path)
    write_small_dataset(tmp_path / "src", form=None)
    return tmp_path / "src"


# --- nothing is written where data is read --------------------------------------------------------


def test_encode_never_writes_into_its_source(source, capsys) -> None:
    (source.parent / "link").symlink_to("src")
    before = tree(source)
    for target in ("link", str(source), f"src/{SESSIONS[0]}", "."):
        assert run("encode", "src", target, "--overwrite", "--exclude-damaged") == 1
        assert "give a" in sentence(capsys)
    assert tree(source) == before


def test_what_others_wrote_is_replaced_only_with_overwrite(source, tmp_path, capsys) -> None:
    theirs = tmp_path / "theirs"
    write_small_dataset(theirs, form=None)
    before = tree(theirs)
    assert run("encode", "src", theirs) == 1
    assert f"already holds {FILE}, which 'prepare_dataset.py encode' did not" in sentence(capsys)
    assert run("synthesize", theirs, "--sessions", 2, "--trials", 2, "--electrodes", 2) == 1
    assert f"already holds {FILE}" in sentence(capsys)
    assert tree(theirs) == before
    assert run("encode", "src", theirs, "--overwrite") == 0
    assert load_manifest(open_store(theirs)).n_classes == 1681
    assert run("synthesize", theirs, "--sessions", 2, "--trials", 2, "--electrodes", 2) == 1
    assert "was written by 'prepare_dataset.py encode'" in sentence(capsys)


def test_synthesize_repeats_itself_and_nothing_else(tmp_path, capsys) -> None:
    small = ["--trials", 2, "--electrodes", 2]
    assert run("synthesize", tmp_path, "--sessions", 2, *small) == 0
    before = tree(tmp_path)
    assert run("synthesize", tmp_path, "--sessions", 2, *small) == 0
    after = tree(tmp_path)
    assert {**after, MANIFEST_NAME: b""} == {**before, MANIFEST_NAME: b""}  # it has file times
    assert run("synthesize", tmp_path, "--sessions", 2, *small, "--seed", 1) == 1
    assert "begun with other options (seed was 0)" in sentence(capsys)
    assert run("synthesize", tmp_path, "--sessions", 1, *small, "--overwrite") == 1
    assert "would not write now" in sentence(capsys), "a session of the set before would stay"
    assert run("synthesize", tmp_path, "--sessions", 2, *small, "--seed", 1, "--overwrite") == 0


def test_a_report_replaces_only_a_report_and_the_users_umask_holds(source, capsys) -> None:
    before = os.umask(0o077)
    try:
        assert run("encode", "src", "new") == 0
        for _ in range(2):
            assert run("validate", "new", "--html", "report") == 0
    finally:
        os.umask(before)
    made = [path for path in Path("new").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in (*made, Path("report"))} == {0o600}
    Path("thesis").write_text("years of work")
    for name in ("thesis", f"src/{FILE}", "src"):
        files = tree(source.parent)
        capsys.readouterr()
        assert run("validate", "src", "--html", name) == 1
        assert "give" in sentence(capsys) and tree(source.parent) == files


# --- what a source trial has, its target has ------------------------------------------------------


def test_labels_of_test_files_are_encoded_too_and_empty_ones_stay(source) -> None:
    with h5py.File(source / TEST_FILE, "r+") as file:
        for number, n_labels in ((0, 3), (1, 0)):
            trial = file[f"trial_{number:04d}"]
            phonemes = phoneme_ids(["B", "AA", "|"])[:n_labels]
            trial["seq_class_ids"] = np.pad(phonemes, (0, 500 - n_labels))
            trial.attrs.update(seq_len=n_labels, sentence_label="bah")
    assert run("encode", "src", "new") == 0
    with h5py.File(f"new/{TEST_FILE}") as file:
        trial, empty = file["trial_0000"], file["trial_0001"]
        labels = encode_diphones(phoneme_ids(["B", "AA", "|"]))
        assert trial["seq_class_ids"][: trial.attrs["seq_len"]].tolist() == labels.tolist()
        assert trial.attrs["seq_len_phoneme"] == 3
        assert not empty["seq_class_ids"][:].any() and empty.attrs["seq_len"] == 0
    records = [t for t in load_manifest(open_store("new")).trials if t.split == "test"]
    assert [record.class_ids is not None for record in records] == [True, False, False]


def test_attributes_and_datasets_of_every_kind_are_copied_or_named(source, capsys) -> None:
    extra = {
        "text": "naïve",
        "bytes": np.bytes_(b"abc"),
        "texts": np.array(["a", "b"], h5py.string_dtype()),
        "table": np.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]),
        "empty": h5py.Empty("f4"),
        "flag": np.bool_(True),
    }
    with h5py.File(source / FILE, "r+") as file:
        trial = file["trial_0000"]
        trial.attrs.update(extra)
        trial["input_features"].attrs["unit"] = "z"
        trial.create_dataset("video", data=np.arange(1000), chunks=(100,), compression="gzip")
        trial["also"] = h5py.SoftLink("/trial_0000/video")
        trial.create_group("nested").create_dataset("deep", data=[1, 2])
        trial["nowhere"] = h5py.SoftLink("/nothing")
        file["notes"] = "of the day"
        file["elsewhere"] = h5py.ExternalLink("other.hdf5", "/trial_0001")  # a name in src, too
    assert run("encode", "src", "new") == 0
    printed = capsys.readouterr().out
    assert f"Left out: {FILE}:trial_0000: nowhere cannot be copied" in printed
    assert f"Left out: {FILE}: elsewhere cannot be copied" in printed
    with h5py.File(source / FILE) as old, h5py.File(f"new/{FILE}") as new:
        before, after = old["trial_0000"], new["trial_0000"]
        for name in extra:
            assert repr(after.attrs[name]) == repr(before.attrs[name]), name
        assert after["input_features"].attrs["unit"] == "z"
        assert after["video"][:].tolist() == after["also"][:].tolist() == list(range(1000))
        assert after["nested/deep"][:].tolist() == [1, 2]
        assert new["notes"][()] == b"of the day"


def by_dataset(file: h5py.File, trial: str, other: str) -> None:
    del file[f"{trial}/seq_class_ids"]
    file[f"{trial}/seq_class_ids"] = h5py.ExternalLink(other, "/trial_0001/seq_class_ids")


def by_group(file: h5py.File, trial: str, other: str) -> None:
    del file[trial]
    file[trial] = h5py.ExternalLink(other, "/trial_0001")


def by_soft_links(file: h5py.File, trial: str, other: str) -> None:
    file["elsewhere"] = h5py.ExternalLink(other, "/")
    file["chain"] = h5py.SoftLink("elsewhere/trial_0001")
    del file[f"{trial}/input_features"]
    file[f"{trial}/input_features"] = h5py.SoftLink("/chain/input_features")


def test_links_into_another_file_are_refused_by_name(source, capsys) -> None:
    shutil.copy(source / FILE, "other.hdf5")
    linked = sorted(source.rglob("data_[tv][ra]*.hdf5"))
    for path, link in zip(linked, (by_dataset, by_group, by_soft_links, by_group), strict=True):
        with h5py.File(path, "r+") as file:
            link(file, "trial_0000", str(Path("other.hdf5").resolve()))
    for command in (["index", "src"], ["encode", "src", "new"]):
        assert run(*command) == 1
        refusal = sentence(capsys)
        assert f"{FILE}:trial_0000: " in refusal and "other.hdf5: copy the values" in refusal
        assert run(*command, "--exclude-damaged") == 0
        printed = capsys.readouterr().out
        assert len(re.findall("Left out.*trial_0000: .*other.hdf5: copy the", printed)) == 4


# --- attributes and labels as tools write them ----------------------------------------------------


TEXTS: list[Callable[[str], object]] = [
    lambda t: np.array([t], h5py.string_dtype()),  # one-element array
    lambda t: t.encode(),
    lambda t: np.array([t.encode()]),
    lambda t: np.array(t.encode(), "S64"),  # fixed length, zeros after it
    lambda t: np.array(t, h5py.string_dtype("ascii")),
    lambda t: f" {t}  ",
    lambda t: np.array(list(t), "S1"),
    lambda t: np.array([[ord(c) for c in t]], np.uint16),  # a row of codes, as MATLAB
]
NUMBERS: list[Callable[[int], object]] = [
    lambda n: np.array([n]),
    np.uint8,
    lambda n: np.array([[float(n)]]),  # a double in a table, as MATLAB
    lambda n: np.bytes_(str(n).encode()),
    lambda n: np.array([str(n)], h5py.string_dtype()),
    lambda n: np.array(n, ">i4"),
]


def test_attributes_are_read_however_they_are_stored(source) -> None:
    """Every trial has another way of writing them."""
    texts, numbers = cycle(TEXTS), cycle(NUMBERS)

    def rewrite(trial: h5py.Group) -> None:
        text, number = next(texts), next(numbers)
        for name, value in list(trial.attrs.items()):
            trial.attrs[name] = text(value) if isinstance(value, str) else number(value)

    plain = index_dataset(open_store(source))
    in_every_trial(source, rewrite)
    found = index_dataset(open_store(source))
    assert not found.damaged and found.fingerprint() == plain.fingerprint()
    assert [(t.sentence_label, t.block_num, t.trial_num) for t in found.trials] == [
        (t.sentence_label, t.block_num, t.trial_num) for t in plain.trials
    ]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("session", h5py.Empty("S1"), "attribute session is missing"),
        ("session", np.array(["ab", "c"], "S3"), "holds 2 texts, not one"),
        ("session", 5, r"attribute session is .*5.*, not a text"),
        ("session", float("nan"), "attribute session is missing"),
        ("sentence_label", np.bytes_(b"na\xefve"), "attribute sentence_label is not UTF-8 text"),
        ("block_num", np.array([], "i4"), "attribute block_num is missing"),
        ("block_num", "two", "attribute block_num is 'two', not a whole number"),
        ("block_num", float("inf"), "not a whole number"),
        ("block_num", float("nan"), "not a whole number"),
        ("block_num", np.bool_(True), "not a whole number"),
        ("n_time_steps", np.array([[1, 2], [3, 4]]), "not a whole number"),
    ],
)
def test_attributes_without_one_meaning_are_one_sentence(name, value, reason) -> None:
    buffer = io.BytesIO(data_file_bytes([small_trial(SESSIONS[0], 1, 1)]))
    with h5py.File(buffer, "r+") as file:
        file["trial_0001"].attrs[name] = value
    (finding,) = inspect_file(FILE, buffer.getvalue()).findings
    assert re.search(reason, finding.reason) and str(finding).startswith(f"{FILE}:trial_0001: ")


def test_the_sentence_comes_from_whichever_is_there(source, capsys) -> None:
    plain = [t.sentence_label for t in index_dataset(open_store(source)).trials]

    in_every_trial(source, lambda trial: trial.attrs.pop("sentence_label", None))
    assert [t.sentence_label for t in index_dataset(open_store(source)).trials] == plain
    assert run("encode", "src", "new", "--from-text") == 0


def test_diphones_give_the_phonemes_that_are_not_stored(tmp_path) -> None:
    for form in LABEL_FORMS:
        data = tmp_path / form
        write_small_dataset(data, form=form)
        plain = index_dataset(open_store(data))

        def without_phonemes(trial: h5py.Group) -> None:
            if "seq_class_ids" in trial:
                del trial["seq_class_ids_phoneme"], trial.attrs["seq_len_phoneme"]

        in_every_trial(data, without_phonemes)
        found = index_dataset(open_store(data))
        assert found.label_form == form and found.fingerprint() == plain.fingerprint()
        for a, b in zip(found.trials, plain.trials, strict=True):
            assert a.phoneme_ids is b.phoneme_ids is None or np.array_equal(
                a.phoneme_ids, b.phoneme_ids
            )
        assert run("encode", data, tmp_path / f"{form}-new") == 0
        with h5py.File(tmp_path / f"{form}-new" / FILE) as file:
            assert "seq_class_ids_phoneme" in file["trial_0000"]


def test_encode_converts_numbers_of_any_type(source, capsys) -> None:
    dtypes = cycle(["f8", ">f4", ">f8", "i2", "u1", "i8"])

    def convert(trial: h5py.Group) -> None:
        values = np.round(trial["input_features"][:] * 3 + 100).astype(next(dtypes))
        del trial["input_features"]
        trial["input_features"] = values

    in_every_trial(source, convert)
    assert run("index", "src") == 1
    assert "'python code/prepare_dataset.py encode' converts it" in sentence(capsys)
    assert run("encode", "src", "new") == 0
    for path in source.rglob("*.hdf5"):
        with h5py.File(path) as old, h5py.File("new" / path.relative_to(source)) as new:
            for trial in old:
                before, after = (file[f"{trial}/input_features"] for file in (old, new))
                assert after.dtype == np.float32 and np.array_equal(after[:], before[:])


# --- labels against sentences ---------------------------------------------------------------------


def relabelled(trial: h5py.Group, ids: np.ndarray) -> None:
    trial["seq_class_ids"][:] = np.pad(ids, (0, 500 - len(ids)))
    trial.attrs["seq_len"] = len(ids)


def test_labels_that_do_not_fit_their_sentences_are_found(source, capsys) -> None:
    """Silence as class 1; without silence; of the next trial; in one trial of three."""
    first, second = (source / session for session in SESSIONS)
    labels = {}
    for path in (first / "data_train.hdf5", first / "data_val.hdf5", second / "data_val.hdf5"):
        with h5py.File(path) as file:
            labels[path] = [t["seq_class_ids"][: t.attrs["seq_len"]] for t in file.values()]
    wrong = zip(
        labels,
        (
            lambda all_ids: [np.where(ids == 40, 1, ids + 1) for ids in all_ids],
            lambda all_ids: [ids[ids != 40] for ids in all_ids],
            lambda all_ids: all_ids[1:] + all_ids[:1],
        ),
        strict=True,
    )
    for path, change in wrong:
        with h5py.File(path, "r+") as file:
            for trial, ids in zip(file.values(), change(labels[path]), strict=True):
                relabelled(trial, ids)
    with h5py.File(second / "data_train.hdf5", "r+") as file:
        file["trial_0002"].attrs["sentence_label"] = "something quite different"
        del file["trial_0002/transcription"]
        words = file["trial_0001"].attrs["sentence_label"].split()
        file["trial_0001"].attrs["sentence_label"] = f"{words[0].title()}, dream!"
    assert run("validate", source) == 1
    printed = capsys.readouterr().out
    assert "3 errors" in printed
    for reason in (
        f"{FILE}: the labels of 3 of 3 trials (100%) do not fit their sentences",
        "0 silences for the 2 words of",
        "is not pronounced so",
        "1 of 3 trials (33%) do not fit their sentences, the first trial_0002",
        "trial_0001: transcription says ",
    ):
        assert reason in printed


def test_pronunciations_and_words_that_the_dictionary_lacks_are_no_finding(source, capsys) -> None:
    with h5py.File(source / FILE, "r+") as file:
        trial = file["trial_0000"]
        spoken = ["AY", "DH", "ER", "|", "Z", "ER", "K", "|", "S", "EY", "|"]
        relabelled(trial, phoneme_ids(spoken))
        trial.attrs["sentence_label"] = "either zzqrk-say"  # a compound with a silence inside
        del trial["transcription"]
    assert run("validate", source) == 0
    assert "do not fit" not in capsys.readouterr().out


# --- a repeated command ---------------------------------------------------------------------------


def test_what_is_done_is_known_by_content_not_by_clock_or_path(source, capsys) -> None:
    assert run("encode", "src", "new") == 0
    for path in source.rglob("*.hdf5"):
        os.utime(path, (1, 1))
    shutil.move("src", "moved")
    shutil.copytree("new", "copy", copy_function=shutil.copy)
    for place in ("new", "copy"):
        assert run("encode", "moved", place) == 0
        assert "5 of 5 files are encoded already" in capsys.readouterr().out


def test_a_lexicon_edited_between_two_runs_is_noticed(source, capsys) -> None:
    lexicon = Path("words.txt")
    lexicon.write_text("go G AA\n")
    command = ("encode", "src", "new", "--from-text", "--lexicon", lexicon)
    assert run(*command) == 0
    lexicon.rename("renamed.txt")
    Path("renamed.txt").touch()
    assert run(*command[:-1], "renamed.txt") == 0, "the same words under another name"
    capsys.readouterr()
    lexicon.write_text("go G OW\n")
    assert run(*command) == 1
    assert "begun with other options (lexicon was " in sentence(capsys)


def test_a_newline_in_a_folders_name_cannot_fake_a_line(source, tmp_path, capsys):
    folder = tmp_path / "data" / "t15.2023.08.11\n2026-01-01: Finished at step 9"
    shutil.copytree(source / SESSIONS[0], folder)
    shutil.copytree(source / SESSIONS[1], folder.parent / SESSIONS[1])
    for command in ("index", "validate"):
        run(command, folder.parent)
        said = capsys.readouterr()
        lines = (said.out + said.err).splitlines()
        assert not [line for line in lines if line.startswith("2026-01-01")], command
