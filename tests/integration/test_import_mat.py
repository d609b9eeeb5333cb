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
from support.commands import run
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


def test_sessions_become_splits_of_256_z_scored_features(benchmark_folder, tmp_path, capsys):
    target = tmp_path / "new"
    assert run("import-mat", benchmark_folder, target) == 0
    printed = capsys.readouterr().out
    assert "2 sessions, 20 trials (8 train, 8 val, 4 test), 256 features, 1681 classes" in printed
    store = open_store(target)
    manifest = load_manifest(store)
    first = manifest.trials[0]
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
    second = manifest.trials[1]
    got = second.decode(span_of(store, second))
    assert np.allclose(got, expected, atol=1e-5) and got.dtype == np.float32
    assert run("validate", target) == 0
    assert "0 errors, 0 warnings" in capsys.readouterr().out


def test_it_trains_with_patches_of_32_by_two_overrides(benchmark_folder, tmp_path) -> None:
    assert run("import-mat", benchmark_folder, tmp_path / "data") == 0
    run_in = tmp_path / "run"
    arguments = ["--data-dir", tmp_path / "data", "--config-file", "rnn_args_smoke.yaml"]
    arguments += ["--num-training-batches", 2, "--batch-size", 4, "--dataset.days_per_batch", 2]
    arguments += ["--model.patch_size", 32, "--model.patch_stride", 4]
    for place in ("model-dir", "output-data-dir", "checkpoint-dir"):
        arguments += [f"--{place}", run_in / place]
    assert train_model_sagemaker.main([str(argument) for argument in arguments]) == 0
    log = next(run_in.rglob("training_log")).read_text()
    assert "Train batch 0: loss:" in log


def test_the_copy_repeats_itself_and_never_lands_in_its_source(benchmark_folder, tmp_path, capsys):
    before = {p: p.read_bytes() for p in benchmark_folder.rglob("*.mat")}
    assert run("import-mat", benchmark_folder, benchmark_folder / "train") == 1
    assert "lies in" in capsys.readouterr().err
    for _ in range(2):
        assert run("import-mat", benchmark_folder, tmp_path / "new") == 0
    assert run("import-mat", benchmark_folder, tmp_path / "new", "--form", "transition") == 1
    assert "begun with other options (form was self_loop)" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in benchmark_folder.rglob("*.mat")}


def test_words_that_nobody_knows_are_named_given_or_left_out(benchmark_folder, tmp_path, capsys):
    path = benchmark_folder / "train" / f"{SESSIONS[0]}.mat"
    savemat(path, variables(["Turn it up", "the zzqrk", "", "Go 2 it"]))
    assert run("import-mat", benchmark_folder, tmp_path / "a") == 1
    assert "how to pronounce 2 words (and how often they occur): zzqrk (1), 2 (1);" in (
        capsys.readouterr().err
    )
    lexicon = tmp_path / "words.txt"
    lexicon.write_text("zzqrk Z ER K\n")
    options = ["--lexicon", lexicon, "--exclude-damaged"]
    assert run("import-mat", benchmark_folder, tmp_path / "b", *options) == 0
    printed = capsys.readouterr().out
    assert f"Left out: {path}:trial_0002: " in printed and "has no words" in printed
    assert f"Left out: {path}:trial_0003: " in printed and "how to pronounce 2;" in printed
    assert "18 trials (6 train" in printed


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def without(name: str):
    def change(path: Path) -> None:
        savemat(path, {k: v for k, v in variables(list(SENTENCES)).items() if k != name})

    return change


def altered(**changes: object):
    return lambda path: savemat(path, variables(list(SENTENCES)) | changes)


ODD = {
    "cut off": (truncated, "cannot be read as a MATLAB file"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as a MATLAB file"),
    "noise": (
        lambda path: path.write_bytes(np.random.default_rng(0).bytes(4000)),
        "cannot be read as a MATLAB file",
    ),
    "HDF5 (7.3)": (
        lambda path: path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + bytes(400)),
        "a MATLAB 7.3 file; get it again from the archive, or save it with MATLAB's '-v7'",
    ),
    "no tx1": (without("tx1"), "has no variable tx1"),
    "no blocks": (without("blockIdx"), "has no variable blockIdx"),
    "blocks that are no numbers": (altered(blockIdx=np.full((4, 1), np.nan)), "no whole numbers"),
    "blocks of other trials": (altered(blockIdx=np.ones((3, 1))), "3 block numbers"),
    "narrow": (altered(tx1=cell([np.ones((200, 64))] * 4)), "not numbers [T, 128 or more]"),
    "text for numbers": (altered(tx1=cell([np.array("x")] * 4)), "not numbers [T, 128 or more]"),
    "bins that differ": (
        altered(tx1=cell([np.ones((200, 256))] * 4)),
        "tx1 of trial 0 has 200 bins, its spikePow",
    ),
    "NaN": (altered(spikePow=cell([np.full((200, 256), np.nan)] * 4)), "bins"),
    "numbers for text": (altered(sentenceText=np.ones((4, 1))), "not a text"),
}


@pytest.mark.parametrize("kind", ODD)
def test_files_that_are_not_the_benchmarks_are_one_sentence(
    kind, benchmark_folder, tmp_path, capsys
) -> None:
    damage, reason = ODD[kind]
    path = benchmark_folder / "train" / f"{SESSIONS[0]}.mat"
    damage(path)
    assert run("import-mat", benchmark_folder, tmp_path / "new") == 1
    error = capsys.readouterr().err.strip()
    assert reason in error and str(path) in error and "\n" not in error
    assert not (tmp_path / "new" / SESSIONS[0] / "data_train.hdf5").exists()


def test_a_folder_without_them_says_what_to_give(tmp_path, capsys) -> None:
    assert run("import-mat", tmp_path, tmp_path / "new") == 1
    assert "give the folder competitionData" in capsys.readouterr().err
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "notes.mat").touch()
    assert run("import-mat", tmp_path, tmp_path.parent / "new") == 1
    assert "notes.mat is not named like a session" in capsys.readouterr().err
