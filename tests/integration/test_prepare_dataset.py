"""prepare_dataset.py end to end, in folders and on a real S3 server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import prepare_dataset
import pytest
from brain_to_text.dataset.indexing import index_dataset, load_or_build_manifest
from brain_to_text.dataset.manifest import load_manifest
from brain_to_text.errors import DataError
from brain_to_text.labels.diphones import decode_diphones
from brain_to_text.storage.locations import MANIFEST_NAME
from brain_to_text.storage.store import open_store
from support.commands import run, tree
from support.fault_proxy import FaultProxy
from support.small_data import SESSIONS, span_of, write_small_dataset
from support.tiny_data import append_in_turns

FRONT_DOOR = Path(prepare_dataset.__file__)


def read_all(url: object) -> dict[str, np.ndarray]:
    """Features of every trial, by the manifest's byte ranges."""
    store = open_store(str(url))
    manifest = load_manifest(store)
    assert manifest is not None
    found = {}
    for trial in manifest.trials:
        span = span_of(store, trial)
        assert zlib.crc32(span) == trial.crc32
        found[trial.name] = trial.decode(span)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phoneme set, and what `encode` makes of it."""
    folder = tmp_path_factory.mktemp("made")
    write_small_dataset(folder / "phonemes", form=None)
    assert run("encode", folder / "phonemes", folder / "diphones") == 0
    return folder


@pytest.fixture
def phoneme_set(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "phonemes", tmp_path / "phonemes"))


@pytest.fixture
def encoded(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "diphones", tmp_path / "diphones"))


# --- synthesize and index on S3 -------------------------------------------------------------------


def test_synthesize_straight_into_s3(s3_prefix: str, capsys) -> None:
    arguments = ["--sessions", 1, "--trials", 6, "--electrodes", 4]
    assert run("synthesize", s3_prefix, *arguments) == 0
    assert "1 sessions, 9 trials (6 train, 2 val, 1 test), 8 features" in capsys.readouterr().out
    assert len(read_all(s3_prefix)) == 9


def test_validate_and_index_on_s3_agree_with_the_folder(
    s3_prefix: str, upload, fault_proxy: FaultProxy, tmp_path: Path, capsys
) -> None:
    expected = write_small_dataset(tmp_path / "data", layout="gzip")
    upload(tmp_path / "data", s3_prefix)
    assert run("validate", s3_prefix, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["trials"] == 15 and report["label_form"] == "self_loop"
    assert "manifest" in {warning["kind"] for warning in report["warnings"]}, "there is none yet"
    fault_proxy.reset_counts()
    assert run("index", s3_prefix) == 0
    assert f"Wrote {s3_prefix}/{MANIFEST_NAME}" in capsys.readouterr().out
    every_byte = sum(path.stat().st_size for path in (tmp_path / "data").rglob("*.hdf5"))
    counts = fault_proxy.counts
    assert counts.ranged_gets == 5 and counts.lists == 1, "each file once"
    assert every_byte <= counts.body_bytes < every_byte + 10_000
    there = load_manifest(open_store(s3_prefix))
    assert there is not None and there.fingerprint() == report["fingerprint"]
    assert there.fingerprint() == index_dataset(open_store(tmp_path / "data")).fingerprint()
    found = read_all(s3_prefix)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_indexing_a_part_says_what_is_gone(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "a part"
    assert (
        prepare_dataset.main(["synthesize", str(folder), "--sessions", "2", "--trials", "9"]) == 0
    )
    gone = sorted(folder.glob("*/data_train.hdf5"))[0]
    gone.unlink()
    with pytest.raises(DataError, match=r"copy the removed files again, or re-index with .*'\"?'"):
        load_or_build_manifest(open_store(folder), print)
    capsys.readouterr()
    assert prepare_dataset.main(["index", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"1 files that were indexed before are gone ({gone.relative_to(folder)})" in said
    assert f"Warning: {gone.relative_to(folder)}: is missing, though the session has" in said


def test_trials_that_lie_apart_are_a_warning_until_they_are_encoded(tmp_path: Path, capsys) -> None:
    scattered, encoded = tmp_path / "scattered", tmp_path / "encoded"
    write_small_dataset(scattered)
    append_in_turns(scattered / SESSIONS[0] / "data_train.hdf5")
    warning = (
        r"Warning.*: t15\.2023\.08\.11/data_train\.hdf5: the chunks of 3 trials lie apart, so that "
        r"reading them takes \d+\.\d times their bytes: .*prepare_dataset\.py encode"
    )
    for command in ("index", "validate"):
        assert run(command, scattered) == 0
        assert len(re.findall(warning, capsys.readouterr().out)) == 1
    assert run("encode", scattered, encoded) == 0
    for command in ("index", "validate"):
        assert run(command, encoded) == 0
        assert "lie apart" not in capsys.readouterr().out


def test_places_that_cannot_be_read_are_one_sentence(s3_environment, capsys) -> None:
    s3_environment.make_bucket("empty-bucket")
    for command, url, reason in (
        ("index", "s3://no-such-bucket/data", "there is no bucket 'no-such-bucket'"),
        ("validate", "s3://empty-bucket/no/such/prefix", "there is nothing at all; check bucket"),
        ("index", "gs://bucket/data", "use s3://BUCKET/PREFIX"),
    ):
        assert run(command, url) == 1
        error = capsys.readouterr().err.strip()
        assert reason in error and "\n" not in error


# --- encode ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "dtype"), [("self_loop", "float16"), ("transition", "float32")])
def test_encoded_trials_decode_to_their_phonemes(
    form, dtype, phoneme_set: Path, tmp_path: Path
) -> None:
    target = tmp_path / "diphones"
    options = ["--form", form, "--dtype", dtype]
    assert run("encode", phoneme_set, target, *options) == 0
    before = index_dataset(open_store(phoneme_set))
    after = load_manifest(open_store(target))
    assert after is not None and (after.n_classes, after.label_form) == (1681, form)
    features = read_all(target)
    for old, new in zip(before.trials, after.trials, strict=True):
        assert old.name == new.name
        source = span_of(open_store(phoneme_set), old)
        assert np.array_equal(features[new.name], old.decode(source).astype(dtype))
        if old.class_ids is None:
            assert new.class_ids is None
        else:
            assert np.array_equal(decode_diphones(new.class_ids, form), old.class_ids)
            assert np.array_equal(new.phoneme_ids, old.class_ids)
    assert run("validate", target) == 0


def test_a_diphone_set_can_change_its_form(tmp_path: Path) -> None:
    write_small_dataset(tmp_path / "old", form="transition")
    assert run("encode", tmp_path / "old", tmp_path / "new", "--form", "self_loop") == 0
    old, new = (index_dataset(open_store(tmp_path / x)) for x in ("old", "new"))
    assert (old.label_form, new.label_form) == ("transition", "self_loop")
    for before, after in zip(old.trials, new.trials, strict=True):
        assert np.array_equal(before.phoneme_ids, after.phoneme_ids)


@pytest.mark.parametrize("where", ["folder", "S3"])
def test_a_target_killed_again_and_again_is_refused_until_it_is_whole(
    where, made: Path, s3_prefix: str, upload, tmp_path: Path, capsys
) -> None:
    """SIGKILL after some files; every repeat goes on; the end equals an uninterrupted one."""
    source, target = str(made / "phonemes"), str(tmp_path / "new")
    if where == "S3":
        upload(made / "phonemes", s3_prefix)
        source, target = s3_prefix, f"{s3_prefix}-encoded"
    store = open_store(target)

    def written() -> int:
        return sum(key.endswith(".hdf5") for key in store.list())

    for files in (1, 3) if where == "folder" else (2,):
        typed = [sys.executable, str(FRONT_DOOR), "encode", source, target]
        process = subprocess.Popen(typed, stdout=subprocess.DEVNULL)
        while written() < files and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        process.wait()
        with suppress(DataError):
            if load_manifest(store) is not None:
                break  # it was killed after its last file, or not at all
        capsys.readouterr()
        for command in ("index", "validate"):
            assert run(command, target) == 1
            refusal = capsys.readouterr().err
            assert "is unfinished" in refusal and f"encode {source} {target}'" in refusal
        with pytest.raises(DataError, match="is unfinished"):
            load_or_build_manifest(store, print)
        if where == "folder":
            copy = shutil.copytree(target, tmp_path / f"copy {files}")
            assert run("index", copy) == 1
            assert "if this is a copy, copy it again" in capsys.readouterr().err
    assert run("encode", source, target, "--processes", 2) == 0
    said = capsys.readouterr().out
    assert re.search(r"[1-5] of 5 files are encoded already", said)
    assert "the features of 15 trials value by value, the labels of 12 by decoding" in said
    whole = open_store(made / "diphones")
    for key in whole.list():
        if key != MANIFEST_NAME:  # which has the times of files, or their ETags
            assert store.read(key) == whole.read(key)
    first, second = load_manifest(whole), load_manifest(store)
    assert first is not None and second is not None
    assert first.fingerprint() == second.fingerprint()


def test_a_file_that_somebody_changed_is_replaced_only_on_demand(
    made: Path, encoded: Path, capsys
) -> None:
    source = made / "phonemes"
    with h5py.File(encoded / SESSIONS[0] / "data_train.hdf5", "r+") as file:
        file["trial_0000"].attrs["sentence_label"] = "as corrected by hand"
    before = tree(encoded)
    assert run("encode", source, encoded) == 1
    assert "data_train.hdf5, which 'prepare_dataset.py encode' did not write, or which was" in (
        capsys.readouterr().err
    )
    assert tree(encoded) == before
    assert run("encode", source, encoded, "--overwrite") == 0
    assert "4 of 5 files are encoded already" in capsys.readouterr().out
    assert run("validate", encoded) == 0


def test_other_options_or_another_source_are_refused(
    made: Path, phoneme_set: Path, encoded: Path, capsys
) -> None:
    before = tree(encoded)
    with h5py.File(phoneme_set / SESSIONS[0] / "data_train.hdf5", "r+") as file:
        file["trial_0000/input_features"][0, 0] += 1
    for source, options, reason in (
        (made / "phonemes", ["--form", "transition"], "other options (form was self_loop)"),
        (phoneme_set, [], "was encoded from another content of"),
        (encoded, [], "Source and target are both"),
    ):
        assert run("encode", source, encoded, *options) == 1
        assert reason in capsys.readouterr().err
        assert tree(encoded) == before, "a refused command leaves a whole dataset whole"
    assert run("encode", phoneme_set, encoded, "--overwrite") == 0
    shutil.rmtree(phoneme_set / SESSIONS[1])
    assert run("encode", phoneme_set, encoded) == 1
    assert f"already holds {SESSIONS[1]}/data_test.hdf5" in capsys.readouterr().err


def test_exclude_damaged_names_what_it_leaves_out(phoneme_set: Path, tmp_path, capsys) -> None:
    key = f"{SESSIONS[0]}/data_train.hdf5"
    with h5py.File(phoneme_set / key, "r+") as file:
        del file["trial_0001/seq_class_ids"]
    new = tmp_path / "new"
    assert run("encode", phoneme_set, new) == 1
    assert "leave such trials out with --exclude-damaged" in capsys.readouterr().err
    for already in ("", "5 of 5 files are encoded already"):
        assert run("encode", phoneme_set, new, "--exclude-damaged") == 0
        printed = capsys.readouterr().out
        assert already in printed and "14 trials" in printed
        assert f"Left out: {key}:trial_0001: dataset seq_class_ids is missing" in printed
    assert run("encode", phoneme_set, new) == 1  # what was left out is not passed over


def test_sentences_become_labels(tmp_path: Path) -> None:
    source, target = tmp_path / "old", tmp_path / "new"
    sizes = ["--sessions", 1, "--trials", 4, "--electrodes", 4]
    assert run("synthesize", source, "--phonemes", *sizes) == 0
    with h5py.File(source / SESSIONS[0] / "data_train.hdf5", "r+") as file:
        for trial in file.values():
            del trial["seq_class_ids"], trial.attrs["seq_len"]
    assert run("encode", source, target, "--from-text") == 0
    plain = tmp_path / "plain"
    assert run("synthesize", plain, *sizes) == 0
    first, second = (index_dataset(open_store(x)) for x in (target, plain))
    for a, b in zip(first.trials, second.trials, strict=True):
        assert np.array_equal(a.class_ids, b.class_ids)


def test_unknown_words_are_named_all_at_once_and_test_trials_stay(phoneme_set, tmp_path, capsys):
    unknown = {"train": "zorbify", "val": "quaxtle", "test": "flimbert"}
    for split, word in unknown.items():
        for path in phoneme_set.rglob(f"data_{split}.hdf5"):
            with h5py.File(path, "r+") as file:
                for trial in file.values():
                    trial.attrs["sentence_label"] = f"the {word}"
                    if "transcription" in trial:
                        del trial["transcription"]
    target = tmp_path / "new"
    assert run("encode", phoneme_set, target, "--from-text") == 1
    refusal = capsys.readouterr().err
    assert re.search(r"2 words .*: zorbify \(\d\), quaxtle \(\d\); spell out .* add lines", refusal)
    assert not target.exists()
    lexicon = tmp_path / "words.txt"
    lexicon.write_text("zorbify Z ER\nquaxtle K W AA\n")
    assert run("encode", phoneme_set, target, "--from-text", "--lexicon", lexicon) == 0
    trials = index_dataset(open_store(target)).trials
    assert len(trials) == 15 and sum(trial.class_ids is None for trial in trials) == 3


# --- the command line -----------------------------------------------------------------------------


def test_the_key_of_the_command_line_encrypts_what_is_written(monkeypatch, capsys) -> None:
    def opened(url: str) -> None:
        raise DataError(f"{url} with {os.environ.get('S3_KMS_KEY_ID')}")

    monkeypatch.setattr(prepare_dataset, "open_store", opened)
    for command in (["synthesize"], ["import-mat", "src"], ["encode", "src"], ["index"]):
        assert run(*command, "s3://bucket/new", "--kms-key", "some-key") == 1
        assert "s3://bucket/new with some-key" in capsys.readouterr().err
        assert "S3_KMS_KEY_ID" not in os.environ
        assert run(*command, "folder", "--kms-key", "some-key") == 1
        assert "for what is written to S3, and folder is a folder" in capsys.readouterr().err


def test_every_command_has_help(capsys) -> None:
    for command in ([], ["synthesize"], ["import-mat"], ["encode"], ["index"], ["validate"]):
        with pytest.raises(SystemExit) as ended:
            run(*command, "--help")
        assert ended.value.code == 0 and capsys.readouterr().out.startswith("usage:")
