"""A manifest is whole and makes sense, or it is refused by name with the command that mends it."""

from __future__ import annotations

import copy
import gzip
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from brain_to_text.dataset.hdf5_writer import data_file_bytes
from brain_to_text.dataset.indexing import index_dataset, load_or_build_manifest
from brain_to_text.dataset.manifest import TrialManifest, load_manifest, write_manifest
from brain_to_text.errors import DataError
from brain_to_text.storage.locations import MANIFEST_NAME
from brain_to_text.storage.store import LocalStore, open_store
from brain_to_text.streaming.trial_stream import TrialStream
from support.fuzzing import rounds
from support.small_data import SESSIONS, small_trial, write_small_dataset

KEY = f"{SESSIONS[0]}/data_train.hdf5"
URL = "s3://bucket/data"
REFUSED = rf"{URL}/{MANIFEST_NAME} (is damaged \(|has version).*prepare_dataset\.py index {URL}'"


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


def document_of(data: bytes) -> dict[str, Any]:
    return json.loads(gzip.decompress(data))


def refused_or_the_same(data: bytes, whole: bytes) -> None:
    """gzip's header and padding hold some bits that nobody asks for."""
    try:
        found = TrialManifest.from_bytes(data, URL)
    except DataError as error:
        assert re.match(REFUSED, str(error))
    else:
        assert found.to_bytes() == whole


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
        refused_or_the_same(bytes(damaged), whole)
    for damage in (*(whole[:length] for length in range(len(whole))), whole + b"\0", 2 * whole):
        with pytest.raises(DataError, match=REFUSED):
            TrialManifest.from_bytes(damage, URL)


def test_a_flipped_bit_on_the_way_is_read_again(tmp_path: Path, whole: bytes) -> None:
    class Unlucky(LocalStore):
        reads = 0

        def read(self, key: str, size: int | None = None) -> bytes:
            self.reads += 1
            data = bytearray(super().read(key, size))
            data[len(data) // 2] ^= self.reads < 3
            return bytes(data)

    (tmp_path / MANIFEST_NAME).write_bytes(whole)
    store = Unlucky(tmp_path)
    found = load_manifest(store)
    assert found is not None and found.to_bytes() == whole and store.reads == 3


def test_the_manifest_stays_a_gzip_file_like_any_other(whole: bytes) -> None:
    assert document_of(whole)["version"] == 1


def trial(document: dict[str, Any], name: str, value: Any, file: int = 0, row: int = 1) -> None:
    """Sets one trial's value of a column."""
    document["files"][file][name][row] = value


def chunks(document: dict[str, Any]) -> list[Any]:
    """The layout of a chunked trial: shape, filters, sizes, gaps, masks."""
    return next(found for entry in document["files"] for found in entry["chunks"] if found)


def offsets(document: dict[str, Any]) -> list[int]:
    return document["files"][0]["offset"]


LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "overlapping ranges": lambda d: trial(d, "offset", offsets(d)[0] + 8),
    "the same range twice": lambda d: trial(d, "offset", offsets(d)[0]),
    "beyond the file": lambda d: trial(d, "offset", 10**9),
    "a shorter file": lambda d: d["files"][0].update(size=100),
    "before the file": lambda d: trial(d, "offset", -8),
    "another length": lambda d: trial(d, "length", 8),
    "more time steps": lambda d: trial(d, "n_time_steps", 10**10),
    "another type": lambda d: trial(d, "dtype", "<f2"),
    "a type that is none": lambda d: trial(d, "dtype", "O"),
    "no checksum": lambda d: trial(d, "crc32", None),
    "a checksum that is none": lambda d: trial(d, "crc32", 2**32),
    "other features": lambda d: d.update(n_features=5),
    "other classes": lambda d: d.update(n_classes=41),
    "another label form": lambda d: d.update(label_form="phoneme"),
    "labels that are no phonemes": lambda d: trial(d, "phonemes", "0~"),
    "labels of nothing": lambda d: trial(d, "phonemes", ""),
    "two trials of one name": lambda d: trial(d, "trials", d["files"][0]["trials"][0]),
    "a trial that is none": lambda d: trial(d, "trials", "../x"),
    "a block that is text": lambda d: trial(d, "block_num", "7"),
    "true for a number": lambda d: trial(d, "trial_num", True),
    "a number for a sentence": lambda d: trial(d, "sentence_label", 7),
    "a file listed twice": lambda d: d["files"].append(copy.deepcopy(d["files"][0])),
    "a key that leads elsewhere": lambda d: d["files"][0].update(key="../data_train.hdf5"),
    "a column cut short": lambda d: d["files"][0]["crc32"].pop(),
    "huge numbers": lambda d: d["files"][0].update(size=10**400),
    "chunks beyond the trial's bytes": lambda d: chunks(d).__setitem__(2, 10**6),
    "chunks of nothing": lambda d: chunks(d).__setitem__(2, 0),
    "chunks of chunks": lambda d: chunks(d).__setitem__(0, [1, 1]),
    "chunks of no rows": lambda d: chunks(d).__setitem__(0, [0, 6]),
    "chunks larger than memory": lambda d: chunks(d).__setitem__(0, [10**9, 10**9]),
    "a filter that is none": lambda d: chunks(d).__setitem__(1, ["rot13"]),
    "a finding that is none": lambda d: d.update(damaged=[[1, 2, 3, 4]]),
    "no files at all": lambda d: d.pop("files"),
    "files that are nothing": lambda d: d.update(files=None, version=1),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_says_what_cannot_be_is_refused(lie: str, whole: bytes) -> None:
    document = document_of(whole)
    LIES[lie](document)
    with pytest.raises(DataError, match=REFUSED):
        TrialManifest.from_bytes(gzip.compress(json.dumps(document).encode()), URL)


def test_a_maze_and_endless_digits_are_refused() -> None:
    for text in (b"[" * 10**6, b'{"version": 1' + b"0" * 5000 + b"}"):
        with pytest.raises(DataError, match=rf"{URL}/{MANIFEST_NAME}.*index {URL}"):
            TrialManifest.from_bytes(gzip.compress(text), URL)


def test_checksums_of_another_file_are_found_by_the_first_read(tmp_path: Path) -> None:
    """What no manifest can show of itself: nobody trains on bytes other than those recorded."""
    write_small_dataset(tmp_path)
    store = open_store(tmp_path)
    document = document_of(index_dataset(store).to_bytes())
    one, other = document["files"][0], document["files"][2]
    one["crc32"], other["crc32"] = other["crc32"], one["crc32"]
    manifest = TrialManifest.from_bytes(gzip.compress(json.dumps(document).encode()))
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
    kept = index_dataset(open_store(tmp_path))
    assert TrialManifest.from_bytes(kept.to_bytes()).to_bytes() == kept.to_bytes()
    assert [t.trial for t in kept.trials] == ["trial_0000", "trial_0001"]


def test_fuzz_of_a_manifests_document_ends_in_trials_or_a_sentence(whole: bytes) -> None:
    original = document_of(whole)
    for number in rounds(400):
        chance = random.Random(number)
        document = copy.deepcopy(original)
        for _ in range(chance.randint(1, 3)):
            _mutate(document, chance)
        try:
            found = TrialManifest.from_bytes(gzip.compress(json.dumps(document).encode()), URL)
        except DataError as error:
            assert URL in str(error), number
            continue
        for record in found.trials:  # whatever is believed fits the file and memory
            size = found.files[record.key].size
            assert 0 <= record.offset < record.offset + record.length <= size, number
            assert record.feature_bytes <= 1100 * record.length, number
        assert TrialManifest.from_bytes(found.to_bytes()).to_bytes() == found.to_bytes(), number


def test_fuzz_of_a_manifests_bytes_is_refused(whole: bytes) -> None:
    for number in rounds(300):
        chance = random.Random(number)
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(damaged))
            kind = chance.randrange(4)
            if kind == 0:
                damaged[at] ^= chance.randint(1, 255)
            elif kind == 1:
                del damaged[at : at + chance.randint(1, 50)]
            elif kind == 2:
                damaged[at:at] = chance.randbytes(chance.randint(1, 50))
            else:
                damaged[at : at + 20] = damaged[:20]
        refused_or_the_same(bytes(damaged), whole)


def _mutate(node: Any, chance: random.Random) -> None:
    """One value somewhere below becomes another one, goes, or comes twice."""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = chance.choice(keys)
        if not isinstance(node[key], (dict, list)) or chance.random() < 0.1:
            break
        node = node[key]
    odd = [None, True, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, "", "x", "<f2", [], {}, [0], "é"]
    kind = chance.randrange(4)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, list):
        node.insert(key, node[key])
    elif kind == 2 and type(node[key]) is int:
        node[key] += chance.choice([-1000, -8, -1, 1, 8, 1000])
    else:
        node[key] = chance.choice(odd)


def test_a_new_manifest_takes_the_place_of_a_damaged_one(tmp_path: Path) -> None:
    write_small_dataset(tmp_path)
    (tmp_path / MANIFEST_NAME).write_bytes(b"nonsense")
    store = open_store(tmp_path)
    with pytest.raises(DataError, match=rf"{MANIFEST_NAME} is damaged.*index {tmp_path}"):
        load_or_build_manifest(store, print)
    write_manifest(store, index_dataset(store))
    assert np.array_equal(load_or_build_manifest(store, print).trials[0].n_features, 6)
