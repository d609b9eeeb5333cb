"""A manifest is whole and of this version, or refused by name with the command that mends it."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
from brain_to_text.dataset.hdf5_writer import data_file_bytes
from brain_to_text.dataset.indexing import index_dataset, load_or_build_manifest
from brain_to_text.dataset.manifest import TrialManifest, load_manifest, write_manifest
from brain_to_text.errors import DataError
from brain_to_text.storage.locations import MANIFEST_NAME
from brain_to_text.storage.store import LocalStore, open_store
from brain_to_text.streaming.trial_stream import TrialStream
from support.small_data import SESSIONS, small_trial, write_small_dataset

KEY = f"{SESSIONS[0]}/data_train.hdf5"
URL = "s3://bucket/data"
REFUSED = rf"{URL}/{MANIFEST_NAME} (is|has version).*prepare_dataset\.py index {URL}'"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small manifest with contiguous and chunked trials."""
    folder = tmp_path_factory.mktemp("small")
    write_small_dataset(folder)
    write_small_dataset(folder / "other", layout="gzip")
    shutil.rmtree(folder / SESSIONS[1])
    shutil.move(folder / "other" / SESSIONS[1], folder / SESSIONS[1])
    shutil.rmtree(folder / "other")
    return index_dataset(open_store(folder)).to_bytes()


def packed(document: Any) -> bytes:
    return gzip.compress(json.dumps(document).encode())


def test_every_flipped_bit_and_every_cut_is_refused_before_anything_is_parsed(
    whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, real = gzip.decompress(whole), json.loads
    monkeypatch.setattr(
        json, "loads", lambda text: real(text) if text == original else pytest.fail("parsed")
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


def test_a_flipped_bit_on_the_way_is_read_again(tmp_path: Path, whole: bytes) -> None:
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


STRUCTURES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another version": lambda d: d.update(version=1),
    "no version": lambda d: d.pop("version"),
    "no files": lambda d: d.pop("files"),
    "files that are nothing": lambda d: d.update(files=None),
    "a file that is none": lambda d: d["files"][0].update(key="notes.txt"),
    "a label form that is none": lambda d: d.update(label_form="letters"),
    "a column that is missing": lambda d: d["trials"]["numbers"].pop("crc32"),
    "a column that is none": lambda d: d["trials"]["numbers"].update(crc32="?"),
    "a column cut short": lambda d: d["trials"]["numbers"].update(crc32=""),
    "labels cut short": lambda d: d["trials"].update(phonemes="1"),
    "trials that are missing": lambda d: d["files"][0].update(trials=0),
}


@pytest.mark.parametrize("change", STRUCTURES)
def test_another_version_or_structure_is_refused_with_the_command(
    change: str, whole: bytes
) -> None:
    document = json.loads(gzip.decompress(whole))
    STRUCTURES[change](document)
    with pytest.raises(DataError, match=REFUSED):
        TrialManifest.from_bytes(packed(document), URL)


@pytest.mark.parametrize(
    "data",
    [b"", b"nonsense", packed([]), packed({}), packed({"version": 2})],
    ids=["empty", "text", "list", "nothing", "version"],
)
def test_what_is_no_manifest_is_refused_with_the_command(data: bytes) -> None:
    with pytest.raises(DataError, match=REFUSED):
        TrialManifest.from_bytes(data, URL)


def test_checksums_of_another_file_are_found_by_the_first_read(tmp_path: Path) -> None:
    """What no manifest can show of itself: nobody trains on bytes other than those recorded."""
    write_small_dataset(tmp_path)
    store = open_store(tmp_path)
    manifest = index_dataset(store)
    manifest.trials.crc32[0] ^= 1
    with TrialStream(store, manifest) as stream:
        with pytest.raises(DataError, match=r"are not those in the manifest.*dataset\.py index"):
            stream.fetch([0])


def test_trials_that_are_links_to_others_are_left_out_by_name(tmp_path: Path) -> None:
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


def test_a_new_manifest_takes_the_place_of_a_damaged_one(tmp_path: Path) -> None:
    write_small_dataset(tmp_path)
    (tmp_path / MANIFEST_NAME).write_bytes(b"nonsense")
    store = open_store(tmp_path)
    with pytest.raises(DataError, match=rf"{MANIFEST_NAME} is damaged.*index {tmp_path}"):
        load_or_build_manifest(store, print)
    write_manifest(store, index_dataset(store))
    assert len(load_or_build_manifest(store, print).trials) == 15
