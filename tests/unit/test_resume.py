"""The guard of a resumed run sees every change that matters."""

import shutil

from brain_to_text.config import config_keys
from brain_to_text.training.resume import LIBRARY, code_fingerprint


def test_a_change_in_any_file_of_the_library_but_the_launcher_is_seen(tmp_path):
    copy = tmp_path / "library"
    shutil.copytree(LIBRARY, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = code_fingerprint(copy)
    assert before == code_fingerprint()
    changed = sorted(path.relative_to(copy).as_posix() for path in copy.rglob("*.py"))
    for name in changed:
        (copy / name).write_text("")
    after = code_fingerprint(copy)
    assert {name for name in changed if not name.startswith("launch/")} == {
        name for name in after if name.endswith("__init__.py") or after[name] != before[name]
    }


def test_only_what_leaves_results_alone_may_differ_on_resume():
    free = {name for name, _, entry in config_keys() if entry.metadata["free_on_resume"]}
    assert {"dataset.cache_gb", "batches_per_save", "batches_per_train_log"} <= free
    assert not {name for name in free if name.startswith(("model.", "objective.", "lr_"))}
    assert not {"seed", "dataset.seed", "dataset.batch_size", "num_training_batches"} & free
