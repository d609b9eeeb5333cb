"""Synthetic recordings have the schema, come back from their seed, and can be learnt from."""

import dataclasses

import h5py
import numpy as np
import pytest
from brain_to_text.dataset.encoding import EncodingOptions, dataset_sources, encode_files
from brain_to_text.dataset.manifest import load_manifest
from brain_to_text.dataset.synthetic import SyntheticDataset, session_mixing, synthesize
from brain_to_text.errors import DataError
from brain_to_text.labels.recording_blocks import corpus_of
from brain_to_text.storage.locations import MANIFEST_NAME
from brain_to_text.storage.store import open_store
from support.small_data import span_of

SMALL = SyntheticDataset(sessions=2, train_trials=6, val_trials=3, test_trials=2, electrodes=8)


def made(folder, **changes):
    return synthesize(open_store(folder), dataclasses.replace(SMALL, **changes))


def test_labels_lie_together_before_the_features_as_encode_leaves_them(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    made(old, phoneme_set=True)
    encode_files(dataset_sources(str(old)), str(old), open_store(new), EncodingOptions())
    for folder in (old, new):
        for path in folder.rglob("*.hdf5"):
            with h5py.File(path) as file:
                labels = [d for t in file.values() for n, d in t.items() if n != "input_features"]
                last = max((array.id.get_offset() for array in labels), default=0)
                assert all(last < t["input_features"].id.get_offset() for t in file.values())


def test_files_have_the_public_schema(tmp_path):
    made(tmp_path)
    names = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.hdf5"))
    splits = ("test", "train", "val")
    sessions = ("t15.2023.08.11", "t15.2023.08.13")
    assert names == [f"{s}/data_{p}.hdf5" for s in sessions for p in splits]
    with h5py.File(tmp_path / "t15.2023.08.13/data_val.hdf5") as file:
        assert list(file) == ["trial_0000", "trial_0001", "trial_0002"]
        trial = file["trial_0000"]
        n_labels, n_phonemes = trial.attrs["seq_len"], trial.attrs["seq_len_phoneme"]
        assert n_labels == 2 * n_phonemes + 1
        assert trial["input_features"].shape == (trial.attrs["n_time_steps"], 16)
        assert trial["input_features"].dtype == np.float32
        for name in ("seq_class_ids", "seq_class_ids_phoneme", "transcription"):
            assert trial[name].shape == (500,) and trial[name].dtype == np.int32
        sentence = trial.attrs["sentence_label"]
        codes = trial["transcription"][:]
        assert "".join(map(chr, codes[codes > 0])) == sentence
        assert trial.attrs["session"] == "t15.2023.08.13"
        assert trial.attrs["block_num"] == 8  # the session's held-out block
    with h5py.File(tmp_path / "t15.2023.08.11/data_test.hdf5") as file:
        assert set(file["trial_0001"]) == {"input_features"}
        assert set(file["trial_0001"].attrs) == {
            "n_time_steps",
            "session",
            "block_num",
            "trial_num",
        }


def test_a_manifest_is_written_that_fits(tmp_path):
    manifest = made(tmp_path)
    kept = load_manifest(open_store(tmp_path))
    assert kept is not None and kept.to_bytes() == manifest.to_bytes()
    kept.check_fresh(open_store(tmp_path).list(), "data")
    assert [len(kept.select(split)) for split in ("train", "val", "test")] == [12, 6, 4]


def test_an_interrupted_set_is_unfinished_until_it_is_repeated(tmp_path):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    store = open_store(tmp_path / "new")
    with pytest.raises(KeyboardInterrupt):
        synthesize(store, SMALL, progress=interrupt)
    with pytest.raises(DataError, match=r"is unfinished.*Repeat 'prepare_dataset.py synthesize'"):
        load_manifest(store)
    there = {key: info.etag for key, info in store.list().items() if key != MANIFEST_NAME}
    again, whole = synthesize(store, SMALL), synthesize(open_store(tmp_path / "whole"), SMALL)
    assert there and there.items() <= {k: i.etag for k, i in store.list().items()}.items()
    for key in whole.files:
        assert store.read(key) == (tmp_path / "whole" / key).read_bytes()
    assert again.fingerprint() == whole.fingerprint()


def test_a_seed_decides_everything(tmp_path):
    first, again, other = (
        made(tmp_path / name, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


@pytest.mark.parametrize(
    ("changes", "form", "classes"),
    [
        ({"label_form": "transition"}, "transition", 1681),
        ({"phoneme_set": True}, "phoneme", 41),
    ],
)
def test_every_kind_of_set_can_be_made(tmp_path, changes, form, classes):
    manifest = made(tmp_path, **changes)
    assert (manifest.label_form, manifest.n_classes) == (form, classes)


def test_features_are_z_scored_per_block(tmp_path):
    manifest = made(tmp_path, train_trials=30)
    store = open_store(tmp_path)
    block = [t for t in manifest.trials if t.session == "t15.2023.08.11" and t.split == "train"]
    assert len({t.block_num for t in block}) == 1
    values = np.concatenate([t.decode(span_of(store, t)) for t in block]).astype(np.float64)
    assert np.allclose(values.mean(axis=0), 0, atol=1e-4)
    assert np.allclose(values.std(axis=0), 1, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_ctc_always_has_room(tmp_path, seed):
    manifest = made(tmp_path, seed=seed)
    for trial in manifest.trials:
        if trial.class_ids is not None:
            labels = trial.class_ids
            needed = len(labels) + int((labels[1:] == labels[:-1]).sum())
            assert (trial.n_time_steps - 2 - 14) // 4 + 1 >= needed


def test_no_sentence_of_training_is_held_out(tmp_path):
    manifest = made(tmp_path, train_trials=40, val_trials=20)
    train, val = (
        {manifest.trials[i].sentence_label for i in manifest.select(split)}
        for split in ("train", "val")
    )
    assert not train & val


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
