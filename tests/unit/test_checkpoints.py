"""Resume states: whole or absent, checked before use, never more than asked for."""

import errno
import fcntl
import io
import os
import shutil
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from brain_to_text.errors import CheckpointError, InUseError
from brain_to_text.model.trained_model import initial_weights
from brain_to_text.model.weights_file import load_verified, save_atomically
from brain_to_text.training.checkpoints import CheckpointFolder


def state(value: int) -> dict:
    return {"step": value, "weights": torch.full((64, 64), float(value))}


@pytest.fixture
def folder(tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoints")
    yield folder
    folder.close()


def reopened(folder):
    folder.close()
    return CheckpointFolder(folder.path)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_newest_of_two_files_replaced_in_turn_is_found_by_its_content(folder):
    """Names stay the same: what SageMaker copied to S3 is replaced there, never left behind."""
    seen = set()
    for step in (10, 20, 100, 110):
        folder.save(state(step), step, wait=True)
        seen |= {path.name for path in folder.path.iterdir()}
        assert folder.saved_step == step
    assert seen == {"state-a.pt", "state-b.pt", ".lock"}
    folder = reopened(folder)
    loaded, passed_over = folder.load_newest()
    assert loaded["step"] == 110 and passed_over == []
    for _ in range(2):  # the last step's state is written again: the one before it stays
        folder.save(state(110), 110, wait=True)
    steps = {torch.load(p, weights_only=True)["step"] for p in folder.path.glob("state-*.pt")}
    assert steps == {100, 110}


def test_a_resumed_run_replaces_the_older_or_damaged_state_first(folder):
    for step in (1, 2):
        folder.save(state(step), step, wait=True)
    again = reopened(folder)
    again.load_newest()
    again.save(state(3), 3, wait=True)
    assert load_verified(folder.path / "state-b.pt")["step"] == 2
    flip_a_byte(folder.path / "state-a.pt")
    again = reopened(again)
    again.load_newest()
    again.save(state(4), 4, wait=True)
    assert again.load_newest()[1] == []


def test_a_background_save_holds_the_values_of_the_moment_it_was_asked_for(folder):
    live = state(1)
    folder.save(live, 1)
    live["weights"].fill_(99.0)
    folder.wait()
    assert folder.load_newest()[0]["weights"].eq(1.0).all()


@pytest.mark.parametrize("length", [0, 1000, None])
def test_a_damaged_state_is_reported_and_the_one_before_it_is_used(folder, length):
    for step in (1, 2):
        folder.save(state(step), step, wait=True)
    path = folder.newest()
    flip_a_byte(path) if length is None else os.truncate(path, length)
    loaded, passed_over = folder.load_newest()
    assert loaded["step"] == 1
    assert len(passed_over) == 1 and "state-b.pt" in passed_over[0]
    flip_a_byte(folder.path / "state-a.pt")  # a run never starts over in silence
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* can be read"):
        folder.load_newest()


@pytest.mark.parametrize("wait", [True, False])
def test_a_failed_save_is_raised_and_leaves_the_old_state(folder, monkeypatch, wait):
    """torch says "PytorchStreamWriter failed": the reason is the volume, while it is still full."""
    folder.save(state(1), 1, wait=True)

    def fill(content, file):
        file.write(b"half of it")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    def usage(_):
        return SimpleNamespace(free=0 if list(folder.path.glob("*.tmp")) else 1)

    monkeypatch.setattr(torch, "save", fill)
    monkeypatch.setattr("shutil.disk_usage", usage)
    with pytest.raises(CheckpointError, match="is full"):
        folder.save(state(2), 2, wait=wait)
        folder.wait()
    assert folder.load_newest()[0]["step"] == 1
    assert not list(folder.path.glob("*.tmp"))


def test_two_runs_cannot_share_a_folder(folder):
    with pytest.raises(InUseError, match=r"in use by another run.*--checkpoint-dir"):
        CheckpointFolder(folder.path)


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level("WARNING", logger="brain_to_text"):
        CheckpointFolder(tmp_path).close()
    assert "has no locks (No locks available)" in caplog.text


def test_a_folder_that_vanishes_is_one_sentence(folder):
    folder.save(state(1), 1, wait=True)
    shutil.rmtree(folder.path)
    for write in (lambda: folder.save(state(2), 2, wait=True), lambda: folder.keep(folder.path)):
        with pytest.raises(CheckpointError, match="has vanished while the run went on"):
            write()
    assert not folder.path.exists()


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    for name in ("state-a.pt.tmp", "best_checkpoint.tmp", "step_12.tmp", "thesis.tmp"):
        (tmp_path / name).write_bytes(b"x")
    folder = CheckpointFolder(tmp_path)
    assert [path.name for path in tmp_path.glob("*.tmp")] == ["thesis.tmp"], (
        "what is not ours stays"
    )
    folder.close()


def test_no_flipped_bit_and_no_cut_is_silent(tmp_path):
    """Whatever is damaged is refused, or was a byte that means nothing."""
    path = tmp_path / "state"
    content = {"weights": torch.arange(40.0), "nested": {"a": [1, (2, "x")]}}
    save_atomically(content, path)
    data = path.read_bytes()
    assert torch.equal(torch.load(path, weights_only=True)["weights"], content["weights"])
    damaged = [data[:end] for end in range(0, len(data), 53)]
    for bit in range(0, 8 * len(data), 15):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    refused = 0
    for number, bad in enumerate(damaged):
        try:
            found = load_verified(io.BytesIO(bad), "state")
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert torch.equal(found["weights"], content["weights"]), number
            assert found["nested"] == content["nested"], number
    assert refused > len(damaged) / 3


def test_a_compressed_checkpoint_is_refused(tmp_path):
    """A few bytes could stand for any amount of memory."""
    torch.save({"weights": torch.zeros(1000)}, tmp_path / "plain")
    with zipfile.ZipFile(tmp_path / "plain") as plain:
        with zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as packed:
            for name in plain.namelist():
                packed.writestr(name, plain.read(name))
    with pytest.raises(CheckpointError, match="is compressed, or damaged"):
        load_verified(tmp_path / "packed")


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("executed-by-unpickling",))


def test_pickled_code_is_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model_state_dict": Malicious()}, tmp_path / "best_checkpoint")
    with pytest.raises(CheckpointError, match="more than tensors"):
        initial_weights(tmp_path)
    assert not (tmp_path / "executed-by-unpickling").exists()


def test_numpy_scalars_of_the_public_baseline_are_data(tmp_path):
    torch.save({"val_PER": np.float64(0.101)}, tmp_path / "c")
    assert load_verified(tmp_path / "c")["val_PER"] == 0.101
