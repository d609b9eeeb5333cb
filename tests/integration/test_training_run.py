"""Whole runs of the front door in this process: what they leave, and what they say on failure."""

import dataclasses
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import h5py
import pytest
import torch
import train_model_sagemaker
from brain_to_text.config_reader import load_config
from brain_to_text.errors import TrainingError
from brain_to_text.model.train_step import TrainStep
from brain_to_text.model.weights_file import save_atomically
from brain_to_text.scoring.decoding import decode
from brain_to_text.training import build_run, rnn_trainer_s3
from support.fault_proxy import FaultProxy, Faults
from support.tiny_data import TINY_DECODER, write_dataset
from support.training_examples import newest_state

SETTINGS = {
    **TINY_DECODER,
    "num_training_batches": 6,
    "lr_warmup_steps": 2,
    "batches_per_train_log": 2,
    "batches_per_val_step": 3,
}


@dataclasses.dataclass
class Run:
    """One call of the front door and what it left."""

    folder: Path
    code: int
    said: str

    @property
    def failure(self) -> str | None:
        path = self.folder / "output" / "failure"
        return path.read_text().strip() if path.exists() else None

    @property
    def files(self) -> set[str]:
        paths = (path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix() for path in paths}

    def metrics(self, kind: str = "train") -> list[dict]:
        """Entries of metrics.jsonl."""
        lines = (self.folder / "output/data/metrics.jsonl").read_text().splitlines()
        return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]

    def train_lines(self) -> list[str]:
        return [line for line in self.said.splitlines() if ": Train batch " in line]

    def best(self) -> dict:
        return torch.load(self.folder / "model/checkpoint/best_checkpoint", weights_only=True)

    def last(self) -> dict:
        return newest_state(self.folder / "checkpoints")[1]


@pytest.fixture(scope="module")
def finished_in(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def train(data, finished_in, tmp_path, monkeypatch, capfd):
    """train(folder name, options…, key=value…) -> Run; data-dir and small settings are given."""

    def run(name: str, *options: str, **settings: object) -> Run:
        folder = (finished_in if name == "finished" else tmp_path) / name
        (folder / "output").mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(folder))
        merged = {**SETTINGS, **settings}
        words = [w for key, value in merged.items() for w in (f"--{key}", str(value))]
        capfd.readouterr()
        where = () if "--s3-bucket" in options else ("--data-dir", str(data))
        code = train_model_sagemaker.main([*where, *options, *words])
        return Run(folder, code, "".join(capfd.readouterr()))

    return run


@pytest.fixture
def finished(train, finished_in) -> Run:
    """The run of SETTINGS alone, as train("finished") leaves it: made once, then put back."""
    kept, folder = finished_in / "kept", finished_in / "finished"
    if not kept.exists():
        run = train("finished")
        assert run.code == 0, run.said
        (finished_in / "said").write_text(run.said)
        shutil.copytree(folder, kept)
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)
    return Run(folder, 0, (finished_in / "said").read_text())


def test_a_run_leaves_exactly_what_is_promised(finished):
    run = finished
    assert {name for name in run.files if name.startswith("model/")} == {
        "model/checkpoint/best_checkpoint",
        "model/checkpoint/args.yaml",
        "model/checkpoint/val_metrics.pkl",
        "model/training_log",
    }
    config = load_config(run.folder / "model/checkpoint/args.yaml")
    assert config.dataset.sessions == ["t15.2023.08.11", "t15.2023.08.13", "t15.2023.08.18"]
    validations = pickle.loads((run.folder / "model/checkpoint/val_metrics.pkl").read_bytes())
    assert [v["step"] for v in validations] == [0, 3, 5]
    assert {"day_weights.0", "day_biases.2", "gru.weight_ih_l0", "out.weight", "h0"} <= set(
        run.best()["model_state_dict"]
    )
    assert "output/data/report.html" in run.files
    assert "output/data/val_logits.pt" not in run.files


def test_the_log_holds_the_promised_lines(train):
    run = train("job", **{"objective.schedule": "[[0, 0], [4, 1]]"})
    log = (run.folder / "model" / "training_log").read_text()
    rate = r"\d\.\d{4}"
    for line in (
        r": Using device: cpu",
        r": Model has \d{1,3}(,\d{3})* parameters",
        r": Loading data from: ",
        r": Successfully initialized S3-backed datasets",
        r": First batch after \d+\.\d\d s, read after \d+\.\d\d s",
        r": Train batches: 6",
        r": Train batch 2: loss: \d+\.\d\d grad norm: \d+\.\d\d time: \d+\.\d{3}",
        r": Running test after training batch: 3",
        rf": Val batch 3: DER \(avg\): {rate} CTC Loss \(avg\): \d+\.\d+ time: \d+\.\d{{3}}",
        rf":   t15.2023.08.13 DER: {rate} PER: {rate} PER_path: {rate} CTC_loss: \d+\.\d{{4}}",
        rf": New best test DER inf --> {rate}",
        r": Checkpointing model",
    ):
        assert re.search(rf"(?m)^\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d{line}", log), line
    # the phoneme loss has no part in the first step
    assert [line.count(" phoneme: ") for line in run.train_lines()] == [0, 1, 1]
    assert [numbers["phoneme_weight"] for numbers in run.metrics()] == [0, 0.5, 1]
    for line, numbers in zip(run.train_lines(), run.metrics(), strict=True):
        number = r"\d+(\.\d+)?"
        assert re.search(
            rf"time: {number} (phoneme: {number} )?phoneme weight: {number} "
            rf"lr: {number}e[+-]\d+ trials/s: {number} frames/s: {number} data wait: {number}% "
            rf"GETs: {number} MB: {number} cache hits: {number}% retries: 0$",
            line,
        ), line
        assert 0 <= numbers["data_wait_share"] <= 1
        assert numbers["trials_per_second"] * numbers["seconds_per_step"] == pytest.approx(4)
    sessions = run.metrics("validation")[-1]["per_session"]
    assert sum(rates["n_trials"] for rates in sessions.values()) == 9


@pytest.mark.parametrize("end", ["finish", "stop", "failure"])
def test_what_was_streamed_is_said_last_however_a_run_ends(train, monkeypatch, end):
    real = TrainStep.__call__

    def ending(self, batch, step, *rest):
        if step == 4 and end == "failure":
            raise TrainingError("The fifth step fails.")
        if step == 4 and end == "stop":
            signal.raise_signal(signal.SIGTERM)
        return real(self, batch, step, *rest)

    monkeypatch.setattr(TrainStep, "__call__", ending)
    run = train("job", cache_gb=0)
    assert run.code == (1 if end == "failure" else 0)
    (line,) = re.findall(r"(?m)^.*: Streaming: \d+ GETs, .* waited .*$", run.said)
    after = run.said[run.said.index(line) + len(line) :].strip()
    assert not after or (run.code and after.startswith("ERROR: ")), after
    if end == "finish":
        in_steps = sum(numbers["requests"] for numbers in run.metrics())
        val_trials = 9  # read by three validations, and by the report
        assert int(re.search(r"Streaming: (\d+)", line)[1]) >= in_steps + 4 * val_trials


def test_faults_of_the_network_do_not_change_the_run(
    data, train, s3_prefix, upload, fault_proxy: FaultProxy
):
    alone = train("folder", num_training_batches=4, cache_gb=0)
    upload(data, s3_prefix)
    bucket, prefix = s3_prefix.removeprefix("s3://").split("/", 1)
    where = ("--s3-bucket", bucket, "--s3-data-prefix", prefix)
    assert train("index", *where, num_training_batches=1).code == 0  # keeps the manifest
    fault_proxy.faults = Faults(
        slow_down=0.15, reset=0.1, truncate=0.1, short_body=0.1, flip=0.05, stall=0.01
    )
    run = train("faults", *where, num_training_batches=4, cache_gb=0, read_timeout_seconds=1)
    assert run.code == 0, run.said
    assert len(fault_proxy.counts.faults) >= 4, "the faults did not happen"
    for name, value in alone.last()["model"].items():
        assert torch.equal(value, run.last()["model"][name]), name
    assert "retries" in run.said


def test_a_run_that_diverges_says_where(train):
    run = train(
        "job",
        lr_max=1e30,
        lr_max_day=1e30,
        grad_norm_clip_value=0,
        num_training_batches=60,
        batches_per_train_log=1,
        non_finite_patience=3,
    )
    assert run.code == 1
    assert "3 updates in a row" in run.failure and "block" in run.failure
    assert "last good checkpoint is" in run.failure and "lower lr_max" in run.failure


@pytest.fixture
def refuse(monkeypatch):
    """refuse(steps): the loss is infinite at these steps."""
    real = TrainStep.backward

    def wrap(steps: set[int]) -> None:
        def backward(self, batch, step, *rest):
            terms, n_frames = real(self, batch, step, *rest)
            if step in steps:
                terms.total = terms.total * float("inf")
            return terms, n_frames

        monkeypatch.setattr(TrainStep, "backward", backward)

    return wrap


@pytest.mark.parametrize("patience", [2, 3])
def test_refusals_after_the_last_log_line_are_said_or_stop_the_run(train, refuse, patience):
    refuse({10, 11})
    run = train(
        "job",
        num_training_batches=12,
        batches_per_train_log=5,
        batches_per_val_step=100,
        non_finite_patience=patience,
    )
    if patience == 2:
        assert run.code == 1 and "2 updates in a row, last at step 11" in run.failure
        assert "Val batch 11" not in run.said
    else:
        assert run.code == 0
        last = run.said.rindex("2 updates were refused so far, last at step 11")
        assert last > run.said.index("Val batch 11"), "the last words say it"


def test_a_run_of_refusals_leaves_no_state_to_resume_from(train, refuse):
    refuse({1, 2, 3})
    run = train(
        "job",
        num_training_batches=30,
        batches_per_train_log=100,
        batches_per_val_step=100,
        batches_per_save=4,
        non_finite_patience=3,
    )
    assert run.code == 1 and "3 updates in a row, last at step 3" in run.failure
    assert run.last()["run"]["step"] == 1  # written with the validation after step 0


@pytest.mark.parametrize(
    ("fits", "words"), [(2, "start again with --batch-size 2"), (0, "Not even one trial")]
)
def test_a_batch_that_does_not_fit_is_found_before_the_first_step(train, monkeypatch, fits, words):
    # memory cannot run out on purpose here: only the answer of the probe is made up
    monkeypatch.setattr(build_run, "largest_batch", lambda step, *sizes: fits)
    run = train("job", try_largest_batches_first="true")
    assert run.code == 1 and words in run.failure
    assert "Train batch " not in run.said


def test_averaged_weights_are_validated_and_saved(train, monkeypatch):
    validated = []

    def spy(inference, *args, **options):
        validated.append(inference.model.out.weight.clone())
        return decode(inference, *args, **options)

    def few(inference, dataset, **options):
        assert sum(len(dataset.trial_indices(step)) for step in range(len(dataset))) <= 4
        return decode(inference, dataset, **options)

    monkeypatch.setattr(rnn_trainer_s3, "decode", spy)
    monkeypatch.setattr("brain_to_text.scoring.evaluate.decode", few)  # the report needs no pass
    settings = {"classifier": "plain", "ema_decay": 0.9, "lr_max": 0.1, "lr_min": 0.1}
    run = train("job", save_final_model=True, **settings)
    assert run.code == 0, run.said
    last = run.last()
    average = dict(zip(last["model"], last["train_step"]["average"], strict=True))
    assert not torch.equal(last["model"]["out.weight"], average["out.weight"])
    assert torch.equal(validated[-1], average["out.weight"])
    final = torch.load(run.folder / "model/checkpoint/final_checkpoint", weights_only=True)
    for name, value in average.items():
        assert torch.equal(final["model_state_dict"][name], value), name


def test_weights_that_are_not_finite_are_neither_saved_nor_called_best(train):
    run = train("job", lr_max=1e38, lr_warmup_steps=0, batches_per_val_step=1, batches_per_save=1)
    assert run.code == 1 and "weights are not finite after" in run.failure, run.said
    for path in (run.folder / "checkpoints").glob("[!.]*"):
        state = torch.load(path, weights_only=True)
        weights = state.get("model", state.get("model_state_dict"))
        assert all(value.isfinite().all() for value in weights.values()), path


def test_a_new_run_starts_from_given_weights_by_session_name(train):
    first = train("first", classifier="factored")
    second = train(
        "second",
        init_from_checkpoint=True,
        init_checkpoint_path=first.folder / "model",
        classifier="factored",
        sessions="[t15.2023.08.18, t15.2023.08.11]",
        lr_max=0,
        lr_min=0,
        lr_max_day=0,
        lr_min_day=0,
        num_training_batches=1,
    )
    assert second.code == 0, second.said
    old, new = first.best()["model_state_dict"], second.best()["model_state_dict"]
    assert torch.equal(old["day_weights.2"], new["day_weights.0"])
    assert torch.equal(old["day_weights.0"], new["day_weights.1"])
    for name in ("gru.weight_hh_l1", "out.weight", "out.bias"):
        assert torch.equal(old[name], new[name]), name


def test_settings_reach_what_they_decide(train, monkeypatch):
    tf32 = []
    monkeypatch.setattr(build_run, "allow_tf32", tf32.append)
    run = train(
        "job",
        sessions="[t15.2023.08.11, t15.2023.08.13, t15.2023.08.18]",
        dataset_probability_val="[1, 0, 1]",
        bad_trials_dict="{t15.2023.08.11: {1: [0, 2]}}",
        log_val_skip_logs=True,
        log_individual_day_val_PER=False,
        save_val_logits=True,
        allow_tf32=False,
    )
    assert run.code == 0
    assert "Validation skips session t15.2023.08.13" in run.said
    validated = run.metrics("validation")[-1]["per_session"]
    assert set(validated) == {"t15.2023.08.11", "t15.2023.08.18"}
    assert "t15.2023.08.11 DER" not in run.said
    assert "Left out: t15.2023.08.11/data_train.hdf5:trial_0000" in run.said
    assert "4 trials are left out" in run.said  # two in train, two in val: same block and number
    logits = torch.load(run.folder / "output/data/val_logits.pt", weights_only=True)
    assert {(value.dtype, value.shape[1]) for value in logits.values()} == {(torch.float16, 1681)}
    assert len(logits) == 4
    assert tf32 == [False]


BAD_SETTINGS = {  # what the data decides; test_config has what settings alone decide
    "classes of the other kind": ({"n_classes": 41}, "1681 classes"),
    "other width": (
        {"neural_dim": 512, "n_input_features": 512, "input_layer_sizes": "[512]"},
        "16 features per bin",
    ),
    "a session that is absent": ({"sessions": "[t15.2023.08.12]"}, "did you mean t15.2023.08.1"),
    "more days than sessions": ({"days_per_batch": 4}, "the run has 3 sessions"),
    "an impossible day": ({"must_include_days": "[7]"}, "numbered from 0 to 2"),
    "patches longer than trials": ({"patch_size": 200}, "frames"),
    "labels beyond the limit": ({"max_seq_elements": 1}, "max_seq_elements"),
    "nobody validates": (
        {
            "sessions": "[t15.2023.08.11, t15.2023.08.13]",
            "dataset_probability_val": "[0, 0]",
        },
        "No session has validation trials",
    ),
    "weights that are absent": (
        {"init_from_checkpoint": True, "init_checkpoint_path": "/nowhere/model"},
        "/nowhere/model does not exist",
    ),
    "a config that is absent": ({"config-file": "mine.yaml"}, "cannot be read"),
    "a folder that is absent": ({"data-dir": "/nowhere/data"}, "/nowhere/data"),
    "an option without a yes or no": ({"accept-changes": "perhaps"}, "true or false"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings_are_one_sentence_before_anything_is_computed(name, train):
    settings, words = BAD_SETTINGS[name]
    run = train("job", **settings)
    assert run.code == 1
    assert words in run.failure, run.failure
    assert "\n" not in run.failure and "Traceback" not in run.said
    assert run.said.strip().splitlines()[-1] == f"ERROR: {run.failure}"
    assert not [n for n in run.files if "best_checkpoint" in n or "state-" in n], run.files


@pytest.fixture
def small_volume(tmp_path) -> Iterator[Path]:
    """A 96 KiB volume: too small for a state of the test's model."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small volume needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("option", "mode", "words"),
    [
        ("--checkpoint-dir", "rw", "is full"),
        ("--model-dir", "rw", "is full"),
        ("--checkpoint-dir", "ro", "is read-only"),
    ],
)
def test_a_volume_that_takes_nothing_is_one_sentence(train, small_volume, option, mode, words):
    subprocess.run(["mount", "-o", f"remount,{mode}", str(small_volume)], check=True)
    run = train("job", option, str(small_volume))
    assert run.code == 1 and words in run.failure, run.failure
    assert "Traceback" not in run.said and "Logging error" not in run.said
    assert not list(small_volume.glob("*.tmp"))


def test_a_full_output_volume_is_one_sentence_on_stderr_and_in_the_failure_file(
    train, tmp_path, small_volume
):
    """The report does not fit; nor would its reason, had no room been kept for it."""
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "output").symlink_to(small_volume)
    (small_volume / "others").write_bytes(bytes(40 * 1024))
    (small_volume / "failure-reserve").write_bytes(bytes(16 * 1024))  # as the toolkit's hook does
    run = train("job")
    last = run.said.strip().splitlines()[-1]
    assert run.code == 1
    assert last.startswith("ERROR: ") and "full" in last, last
    assert run.failure == last.removeprefix("ERROR: ")
    assert "Traceback" not in run.said and "Logging error" not in run.said


def test_a_finished_run_is_not_run_again_and_leaves_everything_again(train, finished):
    """But for what it wrote, nothing in its folders is touched."""
    results = {name for name in finished.files if name.startswith(("model/", "output/"))}
    for name in results - {"output/data/metrics.jsonl", "output/data/report.html"}:
        (finished.folder / name).unlink()
    others = {"submission.csv", "nbest.csv", "phoneme_logits.hdf5", "language_model.arpa"}
    for name in others:
        (finished.folder / "output/data" / name).write_text("precious")
    run = train("finished")
    assert run.code == 0 and "already finished at step 6" in run.said
    assert results <= run.files
    for name in others:
        assert (run.folder / "output/data" / name).read_text() == "precious"


def test_changes_are_named_and_refused_unless_accepted(train, finished):
    changed = {"lr_max": 0.001, "cache_gb": 0, "num_training_batches": 8}
    run = train("finished", **changed)
    assert run.code == 1 and "lr_max: 0.004 -> 0.001" in run.failure
    assert "--accept-changes true" in run.failure and "cache_gb" not in run.failure
    accepted = train("finished", "--accept-changes", "true", **changed)
    assert accepted.code == 0 and "Resuming although changed: lr_max" in accepted.said
    assert "Finished at step 8" in accepted.said


def test_a_refused_run_can_have_its_folders_with_other_checkpoints(train, finished):
    """What the refusal advises works, and the refused run's folders belong to the new one alone."""
    checkpoints = finished.folder / "checkpoints"
    claimed = (checkpoints / ".folders").read_text()
    refused = train("other", "--checkpoint-dir", str(checkpoints), lr_max=0.001)
    assert refused.code == 1 and "give this run its own checkpoint location" in refused.failure
    assert (checkpoints / ".folders").read_text() == claimed
    assert train("other", lr_max=0.001).code == 0


def test_changed_data_is_refused(train, finished, tmp_path):
    write_dataset(tmp_path / "other", n_features=16, bins=(80, 140), seed=7)
    run = train("finished", **{"data-dir": tmp_path / "other"})
    assert run.code == 1 and "the trials or their bytes changed" in run.failure


@pytest.mark.parametrize("folder", ["model", "output/data"])
def test_a_run_does_not_begin_where_another_runs_results_lie(train, finished, folder):
    theirs = finished.folder / folder
    before = {p: p.read_bytes() for p in theirs.rglob("*") if p.is_file()}
    option = "--model-dir" if folder == "model" else "--output-data-dir"
    run = train("job", option, str(theirs))
    sentence = f"of another run, which this run would replace: give this run its own {option}"
    assert run.code == 1 and sentence in run.said
    assert before == {p: p.read_bytes() for p in theirs.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sessions": "[t15.2023.08.18, t15.2023.08.13]"}, "belongs to a run on other sessions"),
        ({"rnn_trainable": False}, "trained other parts of the model"),
    ],
)
def test_what_a_state_cannot_become_is_started_from_its_weights(train, finished, change, sentence):
    """Refused even with changes accepted; what the refusal advises works."""
    run = train("finished", "--accept-changes", "true", num_training_batches=7, **change)
    assert run.code == 1 and sentence in run.failure
    advised = re.search(r"--init-from-checkpoint true --init-checkpoint-path [^\s,]+", run.failure)
    other = train("other", *advised[0].rstrip(".").split(), **change)
    assert other.code == 0 and "Initialized weights from" in other.said, other.said


def test_another_model_size_is_one_sentence_before_the_first_step(train, finished):
    run = train("finished", "--accept-changes", "true", n_units=24)
    assert run.code == 1 and "Traceback" not in run.said
    assert "does not fit this model (size mismatch for h0: copying a param" in run.failure


def test_a_best_model_that_is_not_this_runs_is_named_and_chosen_anew(train, finished):
    path = finished.folder / "checkpoints" / "best_checkpoint"
    save_atomically({**torch.load(path, weights_only=True), "val_DER": 0.125}, path)
    run = train("finished", "--accept-changes", "true", num_training_batches=7)
    assert run.code == 0, run.said
    assert "is not this run's: it is of step" in run.said and run.best()["val_DER"] != 0.125


def test_without_its_states_a_run_starts_over_and_another_run_is_refused(train, finished):
    for path in (finished.folder / "checkpoints").glob("state-*.pt"):
        path.unlink()
    before = finished.best()["val_DER"]
    other = train("finished", lr_max=0.001)
    assert other.code == 1 and "belongs to a different run (lr_max: " in other.failure
    assert other.best()["val_DER"] == before
    again = train("finished")
    assert again.code == 0 and "holds no state of this run: it starts over" in again.said


def test_fewer_steps_than_were_done_are_one_sentence(train, finished):
    run = train("finished", "--accept-changes", "true", num_training_batches=3)
    assert run.code == 1
    assert "has done 6 steps and num_training_batches is 3: ask for at least 6" in run.failure


def test_the_advice_after_early_stopping_works(train):
    still = {"lr_max": 1e-9, "lr_min": 0, "lr_max_day": 1e-9, "lr_min_day": 0}
    stopping = {**still, "early_stopping": True, "early_stopping_val_steps": 2}
    settings = {**stopping, "num_training_batches": 20}
    first = train("job", **settings)
    assert first.code == 0 and "Stopping early" in first.said
    again = train("job", **settings)
    assert "set early_stopping to false, with --accept-changes true, to train on" in again.said
    settings["early_stopping"] = False
    more = train("job", "--accept-changes", "true", **settings)
    assert more.code == 0 and "Finished at step 20" in more.said, more.said


def test_neither_a_secret_nor_the_dataset_is_written(data, train, s3_prefix, upload):
    upload(data, s3_prefix)
    bucket, prefix = s3_prefix.removeprefix("s3://").split("/", 1)
    run = train("job", "--s3-bucket", bucket, "--s3-data-prefix", prefix)
    assert run.code == 0, run.said
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    with h5py.File(next(iter(data.rglob("data_train.hdf5")))) as file:
        needle = file["trial_0000/input_features"][0].tobytes()[:64]
    assert len(secret) > 8 and any(needle) and secret.decode() not in run.said
    assert not [name for name in run.files if name.endswith((".hdf5", ".h5", ".npy"))]
    for path in filter(Path.is_file, run.folder.rglob("*")):
        content = path.read_bytes()
        assert secret not in content and needle not in content, path
