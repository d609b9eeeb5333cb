"""The guard of a resumed run sees every change that matters, and says what it cannot see."""

import hashlib
from pathlib import Path

import brain_to_text
import pytest
from brain_to_text.config import config_keys
from brain_to_text.errors import CheckpointError
from brain_to_text.training import resume
from brain_to_text.training.resume import code_fingerprint

LIBRARY = Path(brain_to_text.__file__).parent


def test_every_room_that_batches_or_trains_is_fingerprinted():
    fingerprint = code_fingerprint()
    rooms = {Path(name).stem for name in fingerprint}
    assert {"dataset_s3", "trial_stream", "batch_plan", "augmentations", "train_step"} <= rooms
    for name, digest in fingerprint.items():
        assert hashlib.sha256((LIBRARY / name).read_bytes()).hexdigest().startswith(digest)


def test_a_folder_without_code_is_an_error():
    with pytest.raises(CheckpointError, match=r"moved_away holds no Python file"):
        code_fingerprint(("model", "moved_away"))
    assert all((LIBRARY / folder).is_dir() for folder in resume.COMPUTING_FOLDERS)


def test_only_what_leaves_results_alone_may_differ_on_resume():
    free = {name for name, _, entry in config_keys() if entry.metadata["free_on_resume"]}
    assert {"dataset.cache_gb", "batches_per_save", "batches_per_train_log"} <= free
    assert not {name for name in free if name.startswith(("model.", "objective.", "lr_"))}
    assert not {"seed", "dataset.seed", "dataset.batch_size", "num_training_batches"} & free
