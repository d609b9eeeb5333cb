"""The 2024 benchmark's MATLAB files, written with scipy in their layout, become a dataset."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import train_model_sagemaker
from brain_to_text.dataset.manifest import load_manifest
from brain_to_text.labels.phonemes import phoneme_symbols
from brain_to_text.storage.store import open_store
from support.commands import run, tree
from support.small_data import span_of

savemat = pytest.importorskip("scipy.io").savemat

SESSIONS = ("t12.2022.04.28", "t12.2022.05.05")
SENTENCES = ("Turn it up.", "Don't stop!", "We see you", "Go home now")


def cell(parts: list[np.ndarray]) -> np.ndarray:
    """A MATLAB cell array of one row."""
    row = np.empty((1, len(parts)), object)
    for i, part in enumerate(parts):
        row[0, i] = part
    return row


def variables(sentences: list[str], seed: int = 0, bins: tuple[int, int] = (180, 260)) -> dict:
    """What a session's file holds: char array, tx1 … tx4, spikePow of [T, 256], block numbers."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(*bins, len(sentences)).tolist()
    tx = {
        f"tx{k}": cell([rng.poisson(2, (n, 256)).astype(np.uint8) for n in lengths])
        for k in range(1, 5)
    }
    power = cell([rng.gamma(2, 900, (n, 256)).astype(np.float32) for n in lengths])
    blocks = np.array([[1 + i // 2] for i in range(len(sentences))], np.uint8)
    width = max(map(len, sentences), default=0)
    text = np.array([s.ljust(width) for s in sentences])
    return {"sentenceText": text, "spikePow": power, "blockIdx": blocks, **tx}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    for place, name in enumerate(("train", "test", "competitionHoldOut")):
        (folder / name).mkdir()
        for number, session in enumerate(SESSIONS):
            said = list(SENTENCES) if name != "competitionHoldOut" else ["", " "]
            savemat(folder / name / f"{session}.mat", variables(said, 10 * place + number))
    return folder


@pytest.fixture
def benchmark_folder(archive: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(archive, tmp_path / "competitionData"))


@pytest.fixture(scope="module")
def imported(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("imported") / "data"
    assert run("import-mat", archive, target) == 0
    return target


def test_sessions_become_splits_of_256_z_scored_features(imported, capsys) -> None:
    assert run("validate", imported) == 0
    printed = capsys.readouterr().out
    assert "2 sessions, 20 trials (8 train, 8 val, 4 test), 256 features, 1681 classes" in printed
    assert "0 errors, 0 warnings" in printed
    store = open_store(imported)
    manifest = load_manifest(store)
    first, second = manifest.trials[:2]
    assert (first.session, first.block_num, first.trial_num) == (SESSIONS[0], 1, 0)
    assert first.sentence_label == "Turn it up."
    assert " ".join(phoneme_symbols(first.phoneme_ids)) == "T ER N | IH T | AH P |"
    held_out = [t for t in manifest.trials if t.split == "test"]
    assert all(t.class_ids is None and t.sentence_label is None for t in held_out)

    raw = variables(list(SENTENCES), 0)
    block = [
        np.concatenate([raw["tx1"][0, i][:, :128], raw["spikePow"][0, i][:, :128]], axis=1)
        for i in (0, 1)
    ]
    together = np.concatenate(block).astype(np.float64)
    expected = (block[1] - together.mean(axis=0)) / (together.std(axis=0) + 1e-8)
    got = second.decode(span_of(store, second))
    assert np.allclose(got, expected, atol=1e-5) and got.dtype == np.float32


def test_it_trains_with_patches_of_32_by_two_overrides(imported, tmp_path) -> None:
    arguments = ["--data-dir", imported, "--config-file", "rnn_args_smoke.yaml"]
    arguments += ["--num-training-batches", 1, "--batch-size", 2, "--dataset.days_per_batch", 2]
    arguments += ["--model.patch_size", 32, "--model.patch_stride", 4, "--model.n_units", 8]
    for folder in ("model-dir", "output-data-dir", "checkpoint-dir"):
        arguments += [f"--{folder}", tmp_path / folder]
    assert train_model_sagemaker.main([str(argument) for argument in arguments]) == 0
    log = next(tmp_path.rglob("training_log")).read_text()
    assert "Train batch 0: loss:" in log


def test_the_copy_repeats_itself_and_never_lands_in_its_source(benchmark_folder, tmp_path, capsys):
    before = tree(benchmark_folder)
    assert run("import-mat", benchmark_folder, benchmark_folder / "train") == 1
    assert "lies in" in capsys.readouterr().err
    for _ in range(2):
        assert run("import-mat", benchmark_folder, tmp_path / "new") == 0
    assert "6 of 6 files are encoded already" in capsys.readouterr().out
    assert run("import-mat", benchmark_folder, tmp_path / "new", "--form", "transition") == 1
    assert "begun with other options (form was self_loop)" in capsys.readouterr().err
    assert tree(benchmark_folder) == before


def test_words_that_nobody_knows_are_named_given_or_left_out(benchmark_folder, tmp_path, capsys):
    path = benchmark_folder / "train" / f"{SESSIONS[0]}.mat"
    savemat(path, variables(["Turn it up", "the zzqrk", "", "Go 2 it"]))
    assert run("import-mat", benchmark_folder, tmp_path / "a") == 1
    assert "is known for 2 words (and how often each occurs): zzqrk (1), 2 (1);" in (
        capsys.readouterr().err
    )
    lexicon = tmp_path / "words.txt"
    lexicon.write_text("zzqrk Z ER K\n")
    options = ["--lexicon", lexicon, "--exclude-damaged"]
    assert run("import-mat", benchmark_folder, tmp_path / "b", *options) == 0
    printed = capsys.readouterr().out
    assert f"Left out: {path}:trial_0002: " in printed and "has no words" in printed
    assert f"Left out: {path}:trial_0003: " in printed and "is known for 2;" in printed
    assert "18 trials (6 train" in printed


def without(name: str) -> dict:
    return {k: v for k, v in variables(list(SENTENCES)).items() if k != name}


def altered(**changes: object) -> dict:
    return variables(list(SENTENCES)) | changes


# What stands in a session's file, as bytes or as variables, and why it is refused.
ODD = {
    "noise": (np.random.default_rng(0).bytes(4000), "cannot be read as a MATLAB file"),
    "HDF5 (7.3)": (
        b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + bytes(400),
        "a MATLAB 7.3 file; get it again from the archive, or save it with MATLAB's '-v7'",
    ),
    "no tx1": (without("tx1"), "has no variable tx1"),
    "blocks that are no numbers": (altered(blockIdx=np.full((4, 1), np.nan)), "no whole numbers"),
    "blocks of other trials": (altered(blockIdx=np.ones((3, 1))), "3 block numbers"),
    "narrow": (altered(tx1=cell([np.ones((200, 64))] * 4)), "not numbers [T, 128 or more]"),
    "bins that differ": (
        altered(tx1=cell([np.ones((200, 256))] * 4)),
        "tx1 of trial 0 has 200 bins, its spikePow",
    ),
    "NaN": (altered(spikePow=cell([np.full((200, 256), np.nan)] * 4)), "bins"),
    "numbers for text": (altered(sentenceText=np.ones((4, 1))), "not a text"),
}


@pytest.mark.parametrize("kind", ODD)
def test_files_that_are_not_the_benchmarks_are_one_sentence(kind, tmp_path, capsys) -> None:
    content, reason = ODD[kind]
    path = tmp_path / "train" / f"{SESSIONS[0]}.mat"
    path.parent.mkdir()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        savemat(path, content)
    assert run("import-mat", tmp_path, tmp_path.parent / "new" / kind) == 1
    error = capsys.readouterr().err.strip()
    assert reason in error and str(path) in error and "\n" not in error
    assert not list((tmp_path.parent / "new" / kind).rglob("*.hdf5"))


def test_a_folder_without_them_says_what_to_give(tmp_path, capsys) -> None:
    assert run("import-mat", tmp_path, tmp_path / "new") == 1
    assert "give the folder competitionData" in capsys.readouterr().err
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "notes.mat").touch()
    assert run("import-mat", tmp_path, tmp_path.parent / "new") == 1
    assert "notes.mat is not named like a session" in capsys.readouterr().err
