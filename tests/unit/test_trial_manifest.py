"""The manifest finds every trial's bytes and labels, survives storage, and notices changes."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from brain_to_text.dataset import hdf5_reader, indexing
from brain_to_text.dataset.file_content import FileContent
from brain_to_text.dataset.hdf5_reader import inspect_file
from brain_to_text.dataset.hdf5_writer import data_file_bytes
from brain_to_text.dataset.indexing import (
    index_dataset,
    load_or_build_manifest,
    manifest_from_inspections,
)
from brain_to_text.dataset.manifest import TrialManifest, load_manifest, write_manifest
from brain_to_text.errors import DataError
from brain_to_text.storage.locations import MANIFEST_NAME
from brain_to_text.storage.store import LocalStore, ObjectInfo, open_store
from brain_to_text.streaming.trial_stream import TrialStream
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_data import LAYOUTS, SESSIONS, small_trial, span_of, write_small_dataset

KEY = f"{SESSIONS[0]}/data_train.hdf5"
URL = "s3://bucket/data"
REFUSED = rf"{URL}/{MANIFEST_NAME} is .*prepare_dataset\.py index {URL}'"


# --- what it holds --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "form"),
    [("contiguous", "self_loop"), ("chunked", "self_loop"), ("gzip", "transition"), ("lzf", None)],
)
def test_everything_is_recorded_and_stored_and_each_trial_is_one_range(tmp_path, layout, form):
    features = write_small_dataset(tmp_path, form=form, layout=layout)
    store = open_store(tmp_path)
    made = index_dataset(store)
    write_manifest(store, made)
    manifest = load_manifest(store)
    assert manifest is not None
    assert manifest.to_bytes() == made.to_bytes() and manifest.fingerprint() == made.fingerprint()
    assert manifest.label_form == (form or "phoneme") and manifest.n_features == 6
    assert manifest.n_classes == (41 if form is None else 1681)
    assert manifest.sessions == list(SESSIONS)
    for trial in manifest.trials:
        found = trial.decode(span_of(store, trial))
        assert np.array_equal(found, features.pop(trial.name)) and not found.flags.writeable
    assert not features
    expected = small_trial(SESSIONS[1], 2, 112, form=form, split="val")
    trial = manifest.trials[manifest.select("val", [SESSIONS[1]])[2]]
    assert trial.name == f"{SESSIONS[1]}/data_val.hdf5:trial_0002"
    assert np.array_equal(trial.class_ids, expected.class_ids)
    phonemes = expected.class_ids if form is None else expected.phoneme_ids
    assert np.array_equal(trial.phoneme_ids, phonemes)
    assert (trial.block_num, trial.trial_num, trial.corpus) == (8, 2, "Switchboard")
    assert trial.sentence_label == expected.sentence
    tests = [manifest.trials[i] for i in manifest.select("test")]
    assert len(tests) == 3
    assert all(t.class_ids is None and t.phoneme_ids is None for t in tests)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 60),
    columns=st.integers(1, 9),
    chunk=st.tuples(st.integers(1, 70), st.integers(1, 10)),
    filters=st.sampled_from([{}, {"compression": "gzip"}, {"compression": "lzf"}]),
    shuffle=st.booleans(),
    fletcher=st.booleans(),
    dtype=st.sampled_from(["<f4", "<f2"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_chunking_and_filters_decode(
    rows, columns, chunk, filters, shuffle, fletcher, dtype, seed
):
    features = np.random.default_rng(seed).standard_normal((rows, columns)).astype(dtype)
    features[::3] = 0  # so that some chunks compress and some do not
    trial = small_trial(SESSIONS[0], 0, 1)
    buffer = io.BytesIO(data_file_bytes([trial]))
    with h5py.File(buffer, "r+") as file:
        group = file["trial_0000"]
        del group["input_features"]
        group.create_dataset(
            "input_features",
            data=features,
            chunks=(min(chunk[0], rows), min(chunk[1], columns)),
            shuffle=shuffle,
            fletcher32=fletcher,
            **filters,
        )
        group.attrs["n_time_steps"] = rows
    data = buffer.getvalue()
    inspection = inspect_file(KEY, data)
    assert not [finding for finding in inspection.findings if finding.severity == "error"]
    manifest = manifest_from_inspections({KEY: ObjectInfo(KEY, len(data), "x")}, [inspection])
    record = TrialManifest.from_bytes(manifest.to_bytes(), URL).trials[0]
    span = data[record.offset : record.offset + record.length]
    assert zlib.crc32(span) == record.crc32
    assert np.array_equal(record.decode(span), features)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_record_is_proven_against_what_hdf5_reads(tmp_path, layout, monkeypatch):
    """HDF5 1.14.2 gave the addresses of chunks without the user block before them."""
    with h5py.File(tmp_path / "x", "w", userblock_size=1024) as file:
        source = h5py.File(io.BytesIO(data_file_bytes([small_trial(SESSIONS[0], 0, 1)])))
        source.copy("trial_0000", file)
        features = file["trial_0000/input_features"][()]
        del file["trial_0000/input_features"]
        options = LAYOUTS[layout] | ({} if layout == "contiguous" else {"chunks": (32, 6)})
        file["trial_0000"].create_dataset("input_features", data=features, **options)
    data = (tmp_path / "x").read_bytes()
    (record,) = inspect_file(KEY, data).records
    assert np.array_equal(record.decode(data[record.offset :][: record.length]), features)
    place = hdf5_reader._layout
    monkeypatch.setattr(
        hdf5_reader, "_layout", lambda *given: (place(*given)[0] - 1024, *place(*given)[1:])
    )
    (finding,) = inspect_file(KEY, data).findings
    assert finding.trial == "trial_0000"
    if layout in ("contiguous", "chunked"):
        assert re.search("not where h5py .* says: install the version", finding.reason)


def test_gaps_in_the_numbering_and_order_by_number(tmp_path):
    numbers = [12, 3, 100, 7]
    trials = [small_trial(SESSIONS[0], n, n) for n in numbers]
    (tmp_path / SESSIONS[0]).mkdir()
    (tmp_path / KEY).write_bytes(data_file_bytes(trials))
    manifest = index_dataset(open_store(tmp_path))
    assert [t.trial for t in manifest.trials] == [f"trial_{n:04d}" for n in sorted(numbers)]


def test_the_fingerprint_depends_on_content_and_not_on_place_or_time(tmp_path):
    write_small_dataset(tmp_path / "a")
    write_small_dataset(tmp_path / "b")
    os.utime(tmp_path / "b" / KEY, ns=(5, 5))
    first, second = (index_dataset(open_store(tmp_path / x)) for x in "ab")
    assert first.fingerprint() == second.fingerprint()
    write_small_dataset(tmp_path / "c", form="transition")
    assert index_dataset(open_store(tmp_path / "c")).fingerprint() != first.fingerprint()


def test_processes_give_the_same_manifest(tmp_path):
    write_small_dataset(tmp_path)
    store = open_store(tmp_path)
    assert index_dataset(store, processes=2).to_bytes() == index_dataset(store).to_bytes()


def test_trials_that_are_links_to_others_are_left_out_by_name(tmp_path):
    (tmp_path / SESSIONS[0]).mkdir()
    path = tmp_path / KEY
    path.write_bytes(data_file_bytes([small_trial(SESSIONS[0], n, n) for n in range(3)]))
    with h5py.File(path, "r+") as file:
        del file["trial_0002/input_features"]
        file["trial_0002/input_features"] = file["trial_0000/input_features"]
        file["trial_0002"].attrs["n_time_steps"] = len(file["trial_0000/input_features"])
    with pytest.raises(DataError, match=r"trial_0002: its features are the bytes of trial_0000"):
        load_or_build_manifest(open_store(tmp_path), print)
    found = index_dataset(open_store(tmp_path))
    assert [t.trial for t in found.trials] == ["trial_0000", "trial_0001"]


# --- damage to itself -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small manifest."""
    folder = tmp_path_factory.mktemp("small")
    write_small_dataset(folder, layout="gzip")
    shutil.rmtree(folder / SESSIONS[1])
    return index_dataset(open_store(folder)).to_bytes()


def packed(document: Any, lines: bytes = b"") -> bytes:
    return gzip.compress(json.dumps(document).encode() + b"\n" + lines)


def test_every_flipped_bit_and_every_cut_is_refused_before_anything_is_parsed(whole, monkeypatch):
    first, *trials = gzip.decompress(whole).splitlines(keepends=True)
    known = {first.strip(), *(b"[%b]" % b",".join(part) for part in (trials[:3], trials[3:]))}
    real = json.loads
    monkeypatch.setattr(
        json, "loads", lambda text: real(text) if text in known else pytest.fail("parsed")
    )
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        try:  # gzip's header and padding hold some bits that nobody asks for
            assert TrialManifest.from_bytes(bytes(damaged), URL).to_bytes() == whole
        except DataError as error:
            assert re.match(REFUSED, str(error))
    for damage in (*(whole[:length] for length in range(len(whole))), whole + b"\0", 2 * whole):
        with pytest.raises(DataError, match=REFUSED):
            TrialManifest.from_bytes(damage, URL)


def test_a_flipped_bit_on_the_way_is_read_again(tmp_path, whole):
    class Unlucky(LocalStore):
        reads = 0

        def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
            self.reads += 1
            data = bytearray(super().read(key, offset, length))
            data[len(data) // 2] ^= self.reads < 3
            return bytes(data)

    (tmp_path / MANIFEST_NAME).write_bytes(whole)
    store = Unlucky(tmp_path)
    found = load_manifest(store)
    assert found is not None and found.to_bytes() == whole and store.reads == 3


STRUCTURES: dict[str, Callable[[dict[str, Any], list[bytes]], Any]] = {
    "another version": lambda document, lines: document.update(version=1),
    "no version": lambda document, lines: document.pop("version"),
    "no files": lambda document, lines: document.pop("files"),
    "a file that is none": lambda document, lines: document["files"][0].update(key="notes.txt"),
    "a label form that is none": lambda document, lines: document.update(label_form="letters"),
    "a trial that is missing": lambda document, lines: lines.pop(),
    "a trial too many": lambda document, lines: lines.append(lines[0]),
    "a trial of another form": lambda document, lines: lines.__setitem__(0, b"[1, 2]\n"),
}


@pytest.mark.parametrize("change", STRUCTURES)
def test_another_version_or_structure_is_refused_with_the_command(change, whole):
    first, *lines = gzip.decompress(whole).splitlines(keepends=True)
    document = json.loads(first)
    STRUCTURES[change](document, lines)
    with pytest.raises(DataError, match=REFUSED):
        TrialManifest.from_bytes(packed(document, b"".join(lines)), URL)


@pytest.mark.parametrize("data", [b"", b"nonsense", packed([]), packed({})])
def test_what_is_no_manifest_is_refused_with_the_command(data):
    with pytest.raises(DataError, match=REFUSED):
        TrialManifest.from_bytes(data, URL)


def test_a_new_manifest_takes_the_place_of_a_damaged_one(tmp_path):
    write_small_dataset(tmp_path)
    (tmp_path / MANIFEST_NAME).write_bytes(b"nonsense")
    store = open_store(tmp_path)
    with pytest.raises(DataError, match=rf"{MANIFEST_NAME} is damaged.*index {tmp_path}"):
        load_or_build_manifest(store, print)
    write_manifest(store, index_dataset(store))
    assert len(load_or_build_manifest(store, print).trials) == 15


# --- files that changed ---------------------------------------------------------------------------


def test_untouched_changed_added_and_removed_files_are_told_apart(tmp_path):
    write_small_dataset(tmp_path)
    manifest = index_dataset(open_store(tmp_path))
    note = {"note": ObjectInfo("README.md", 3, "x")}
    assert manifest.check_fresh(manifest.files | note, URL) == []
    first, second, new = *sorted(manifest.files)[:2], "t15.2023.08.18/data_train.hdf5"
    listing = manifest.files | {key: ObjectInfo(key, 5, "x") for key in (first, new)}
    del listing[second]
    expected = rf"1 changed \({first}\), 1 removed \({second}\), 1 added \({new}\); "
    with pytest.raises(DataError, match=rf"{expected}.*re-index with .*index {URL}'"):
        manifest.check_fresh(listing, URL)


@pytest.mark.parametrize("padding", [0, 9 << 20])
def test_s3_needs_no_look_after_an_upload_of_the_usual_kind(tmp_path, padding):
    """One part, or parts of 8 MiB, as the AWS command line and boto3 make them."""
    (tmp_path / SESSIONS[0]).mkdir()
    data = data_file_bytes([small_trial(SESSIONS[0], 0, 0)]) + bytes(padding)
    (tmp_path / KEY).write_bytes(data)
    manifest = index_dataset(open_store(tmp_path))
    parts = [hashlib.md5(data[at : at + (8 << 20)]) for at in range(0, len(data), 8 << 20)]
    together = hashlib.md5(b"".join(part.digest() for part in parts)).hexdigest()
    uploaded = f"{together}-2" if padding else parts[0].hexdigest()
    for etag, doubtful in ((uploaded, []), ("0" * 32, [KEY]), ("", [KEY])):
        assert manifest.check_fresh({KEY: ObjectInfo(KEY, len(data), etag)}, URL) == doubtful


def corrected(path: Path, dataset: str, place: Any) -> None:
    """One label becomes another, by HDF5 itself; nothing else in the file changes."""
    with h5py.File(path, "r+") as file:
        file[dataset][place] = file[dataset][place] % 39 + 1


class TestCorrectedLabels:
    """Whatever HDF5 holds beside features: old labels are never used in silence."""

    @pytest.fixture(params=["contiguous", "gzip"])
    def folder(self, request, tmp_path):
        write_small_dataset(tmp_path / "data", layout=request.param)
        write_manifest(open_store(tmp_path / "data"), index_dataset(open_store(tmp_path / "data")))
        return tmp_path / "data"

    def test_each_of_them_is_seen_in_the_folder_and_in_a_copy(self, folder, tmp_path):
        for number, name in enumerate(("seq_class_ids", "seq_class_ids_phoneme", "transcription")):
            copy = shutil.copytree(folder, tmp_path / name)
            load_or_build_manifest(open_store(copy), print)
            for place in (folder, copy):
                before = (place / KEY).read_bytes()
                corrected(place / KEY, f"trial_{number:04d}/{name}", 1)
                with pytest.raises(DataError, match=rf"1 changed \({KEY}\); re-index with"):
                    load_or_build_manifest(open_store(place), print)
                (place / KEY).write_bytes(before)

    def test_changed_features_are_seen_when_they_are_read(self, folder):
        corrected(folder / KEY, "trial_0001/input_features", (20, 3))
        try:
            manifest = load_or_build_manifest(open_store(folder), print)
        except DataError as error:  # a compressed chunk has moved
            assert "1 changed" in str(error)
            return
        with TrialStream(open_store(folder), manifest) as stream:
            with pytest.raises(
                DataError, match=r"are not those in the manifest.*dataset\.py index"
            ):
                stream.fetch([1])

    def test_a_copy_is_compared_once(self, folder, tmp_path, monkeypatch):
        copy = shutil.copytree(folder, tmp_path / "copy")
        lines: list[str] = []
        load_or_build_manifest(open_store(copy), lines.append)
        assert len(lines) == 1 and "labels of 5 files that were copied" in lines[0]
        read = LocalStore.read
        monkeypatch.setattr(
            LocalStore,
            "read",
            lambda *how: read(*how) if how[1] == MANIFEST_NAME else pytest.fail("read again"),
        )
        load_or_build_manifest(open_store(copy), lines.append)
        assert len(lines) == 1

    def test_after_an_upload_s3_tells_or_the_labels_are_read(
        self, tmp_path, s3_prefix, s3_environment
    ):
        there = s3_environment.root / s3_prefix.removeprefix("s3://")
        write_small_dataset(there)
        manifest = index_dataset(open_store(there))
        store, lines = open_store(s3_prefix), []
        write_manifest(store, manifest)
        assert store.list()[KEY].etag == manifest.files[KEY].content.s3_etag
        load_or_build_manifest(store, lines.append)
        assert lines == []
        unknown = {
            key: replace(file, content=replace(file.content, s3_etag=None))
            for key, file in manifest.files.items()
        }
        write_manifest(store, replace(manifest, files=unknown))
        load_or_build_manifest(store, lines.append)
        assert "labels of 5 files" in lines[0]
        corrected(there / KEY, "trial_0001/seq_class_ids", 0)
        with pytest.raises(DataError, match=rf"1 changed \({KEY}\).*index {s3_prefix}'"):
            load_or_build_manifest(open_store(s3_prefix), lines.append)

    def test_where_trials_were_left_out_a_copy_cannot_be_proven(self, tmp_path):
        write_small_dataset(tmp_path / "data")
        store = open_store(tmp_path / "data")
        manifest = index_dataset(store)
        files = manifest.files | {KEY: replace(manifest.files[KEY], content=FileContent())}
        write_manifest(store, replace(manifest, files=files))
        shutil.copytree(tmp_path / "data", tmp_path / "copy")
        with pytest.raises(DataError, match=rf"1 changed \({KEY}\)"):
            load_or_build_manifest(open_store(tmp_path / "copy"), print)


# --- the start of a job ---------------------------------------------------------------------------


class TestLoadOrBuild:
    def test_builds_once_and_keeps_and_says_how_far_it_is(self, tmp_path, monkeypatch):
        write_small_dataset(tmp_path)
        monkeypatch.setattr(indexing, "_PROGRESS_SECONDS", 0.0)
        store = open_store(tmp_path)
        lines: list[str] = []
        built = load_or_build_manifest(store, lines.append)
        assert "indexing 5 files" in lines[0] and "Indexed 15 trials in" in lines[6]
        assert lines[1:6] == [f"Indexed {done} of 5 files" for done in range(1, 6)]
        assert (tmp_path / MANIFEST_NAME).exists()
        lines.clear()
        assert load_or_build_manifest(store, lines.append).to_bytes() == built.to_bytes()
        assert lines == []

    def test_where_it_may_not_write_it_goes_on(self, tmp_path, monkeypatch):
        write_small_dataset(tmp_path)
        store = open_store(tmp_path)
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(30, "read-only")))
        lines: list[str] = []
        assert len(load_or_build_manifest(store, lines.append).trials) == 15
        assert "serves this run only" in lines[-1]

    def test_files_that_are_nearly_data_files_are_named(self, tmp_path):
        write_small_dataset(tmp_path)
        session = tmp_path / SESSIONS[0]
        (session / "data_test.h5").write_bytes(b"x")
        (session / "Data_Train.hdf5").write_bytes(b"x")
        (tmp_path / "deeper" / SESSIONS[1]).mkdir(parents=True)
        (tmp_path / "deeper" / SESSIONS[1] / "data_val.hdf5").write_bytes(b"x")
        (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
        (tmp_path / os.fsdecode(b"caf\xe9") / "data_train.hdf5").write_bytes(b"x")
        (tmp_path / "notes.txt").write_bytes(b"x")
        lines: list[str] = []
        manifest = load_or_build_manifest(open_store(tmp_path), lines.append)
        assert manifest.sessions == sorted(SESSIONS)
        (line,) = [line for line in lines if line.startswith("Not taken")]
        for name in ("data_test.h5", "Data_Train.hdf5", "deeper/", "caf\ufffd/data_train.hdf5"):
            assert name in line
        assert "notes.txt" not in line
        load_or_build_manifest(open_store(tmp_path), lines.append)
        assert lines[-1] == line, "with a manifest too"
        with pytest.raises(DataError, match=r"rename what has nearly that name \(Data_Train"):
            load_or_build_manifest(open_store(session), lines.append)

    def test_a_linked_session_is_a_session(self, tmp_path):
        write_small_dataset(tmp_path / "all")
        (tmp_path / "data").mkdir()
        for session in SESSIONS:
            (tmp_path / "data" / session).symlink_to(tmp_path / "all" / session)
        linked = load_or_build_manifest(open_store(tmp_path / "data"), lambda _: None)
        assert linked.sessions == sorted(SESSIONS)

    def test_damage_stops_or_is_excluded_by_name_from_a_kept_manifest_too(self, tmp_path):
        write_small_dataset(tmp_path)
        with h5py.File(tmp_path / KEY, "r+") as file:
            file["trial_0001/input_features"][4, 2] = np.nan
        store = open_store(tmp_path)
        for _ in range(2):
            with pytest.raises(DataError, match=rf"{KEY}:trial_0001: .* NaN"):
                load_or_build_manifest(store, lambda _: None)
            lines: list[str] = []
            manifest = load_or_build_manifest(store, lines.append, on_damage="exclude")
            assert len(manifest.trials) == 14
            assert any(f"Excluded as damaged: {KEY}:trial_0001" in line for line in lines)
            assert "Excluded 1 damaged" in lines[-1]
