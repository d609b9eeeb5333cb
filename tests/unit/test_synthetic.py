"""Synthetic recordings have the schema, come back from their seed, and can be learnt from."""

import dataclasses
from pathlib import Path

import h5py
import numpy as np
import pytest
from brain_to_text.dataset.encoding import EncodingOptions, dataset_sources, encode_files
from brain_to_text.dataset.manifest import TrialManifest, load_manifest
from brain_to_text.dataset.synthetic import SyntheticDataset, session_mixing, synthesize
from brain_to_text.labels.recording_blocks import corpus_of
from brain_to_text.storage.locations import MANIFEST_NAME
from brain_to_text.storage.store import open_store
from support.small_data import span_of

SMALL = SyntheticDataset(sessions=2, train_trials=20, val_trials=5, test_trials=2, electrodes=8)


def made(folder: Path, **changes: object) -> TrialManifest:
    return synthesize(open_store(folder), dataclasses.replace(SMALL, **changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small")
    made(path)
    return path


@pytest.fixture(scope="module")
def manifest(folder: Path) -> TrialManifest:
    found = load_manifest(open_store(folder))
    assert found is not None
    return found


def test_files_have_the_public_schema(folder, manifest):
    splits = ("train", "val", "test")
    sessions = ("t15.2023.08.11", "t15.2023.08.13")
    assert set(manifest.files) == {f"{s}/data_{p}.hdf5" for s in sessions for p in splits}
    assert [len(manifest.select(split)) for split in splits] == [40, 10, 4]
    with h5py.File(folder / "t15.2023.08.13/data_val.hdf5") as file:
        assert list(file) == [f"trial_{number:04d}" for number in range(5)]
        trial = file["trial_0000"]
        n_labels, n_phonemes = trial.attrs["seq_len"], trial.attrs["seq_len_phoneme"]
        assert n_labels == 2 * n_phonemes + 1
        assert trial["input_features"].shape == (trial.attrs["n_time_steps"], 16)
        assert trial["input_features"].dtype == np.float32
        for name in ("seq_class_ids", "seq_class_ids_phoneme", "transcription"):
            assert trial[name].shape == (500,) and trial[name].dtype == np.int32
        codes = trial["transcription"][:]
        assert "".join(map(chr, codes[codes > 0])) == trial.attrs["sentence_label"]
        assert trial.attrs["session"] == "t15.2023.08.13"
        assert trial.attrs["block_num"] == 8  # the session's held-out block
    with h5py.File(folder / "t15.2023.08.11/data_test.hdf5") as file:
        assert set(file["trial_0001"]) == {"input_features"}
        facts = {"n_time_steps", "session", "block_num", "trial_num"}
        assert set(file["trial_0001"].attrs) == facts


def test_labels_lie_together_before_the_features_as_encode_leaves_them(folder, tmp_path):
    encoded = open_store(tmp_path)
    encode_files(dataset_sources(str(folder)), str(folder), encoded, EncodingOptions())
    for path in (*folder.rglob("*.hdf5"), *tmp_path.rglob("*.hdf5")):
        with h5py.File(path) as file:
            labels = [d for t in file.values() for n, d in t.items() if n != "input_features"]
            last = max((array.id.get_offset() for array in labels), default=0)
            assert all(last < t["input_features"].id.get_offset() for t in file.values())


def test_an_interrupted_set_is_completed_and_the_seed_decides_everything(
    folder, manifest, tmp_path
):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    store = open_store(tmp_path / "new")
    with pytest.raises(KeyboardInterrupt):
        synthesize(store, SMALL, progress=interrupt)
    there = {key: info.etag for key, info in store.list().items() if key != MANIFEST_NAME}
    again = synthesize(store, SMALL)
    assert there and there.items() <= {k: i.etag for k, i in store.list().items()}.items()
    assert again.fingerprint() == manifest.fingerprint()
    for key in manifest.files:
        assert store.read(key) == (folder / key).read_bytes()
    assert made(tmp_path / "other", seed=4).fingerprint() != manifest.fingerprint()


@pytest.mark.parametrize(
    ("changes", "form", "classes"),
    [
        ({"label_form": "transition"}, "transition", 1681),
        ({"phoneme_set": True}, "phoneme", 41),
    ],
)
def test_every_kind_of_set_can_be_made(tmp_path, changes, form, classes):
    manifest = made(tmp_path, train_trials=2, **changes)
    assert (manifest.label_form, manifest.n_classes) == (form, classes)


def test_features_are_z_scored_per_block(folder, manifest):
    store = open_store(folder)
    block = [t for t in manifest.trials if t.session == "t15.2023.08.11" and t.split == "train"]
    assert len({t.block_num for t in block}) == 1
    values = np.concatenate([t.decode(span_of(store, t)) for t in block]).astype(np.float64)
    assert np.allclose(values.mean(axis=0), 0, atol=1e-4)
    assert np.allclose(values.std(axis=0), 1, atol=1e-4)


def test_ctc_has_enough_frames_after_the_random_cut(manifest):
    for trial in manifest.trials:
        assert (trial.n_time_steps - 2 - 14) // 4 + 1 >= trial.frames_needed


def test_no_sentence_of_training_is_held_out(manifest):
    train, val = (
        {manifest.trials[i].sentence_label for i in manifest.select(split)}
        for split in ("train", "val")
    )
    assert train and val and not train & val


def test_sessions_differ_more_the_further_apart_they_are():
    mixings = [session_mixing(SMALL, index) for index in range(4)]

    def likeness(a, b):
        return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))

    assert likeness(mixings[0], mixings[1]) > likeness(mixings[0], mixings[3])
    alike = dataclasses.replace(SMALL, session_change=0.0)
    assert np.array_equal(session_mixing(alike, 0), session_mixing(alike, 3))


def test_corpora_are_known_by_block():
    assert corpus_of("t15.2023.08.11", 2) == "50-Word"
    assert corpus_of("t15.2023.08.11", 99) is None
