"""Log lines: on stdout and in the file, never with a secret, whole again after a resume."""

import json
from contextlib import contextmanager

import pytest
from brain_to_text.errors import InUseError, StorageError
from brain_to_text.training.log_files import LogUploader, RunLog, scalars


@contextmanager
def run_log(folder):
    log = RunLog(folder / "model" / "training_log", folder / "output" / "metrics.jsonl")
    try:
        yield log
    finally:
        log.close()


def test_credentials_never_reach_the_log(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-long-session-token")
    with run_log(tmp_path) as log:
        log.begin()
        log.info("key AKIAIOSFODNN7EXAMPLE with wJalrXUtnFEMI/K7MDENG and a-long-session-token")
        log.warning("again wJalrXUtnFEMI/K7MDENG")
    written = log.log_file.read_text()
    printed = "".join(capfd.readouterr())
    for text in (written, printed):
        assert "EXAMPLE" not in text and "wJalr" not in text and "a-long" not in text
        assert text.count("***") == 4


def test_a_resumed_job_continues_the_log_of_the_checkpoint(tmp_path):
    with run_log(tmp_path) as log:
        log.begin()
        log.info("earlier job")
        log.metrics("train", step=0, loss=7.4)
        earlier = log.snapshot()
        log.info("lost")
        log.metrics("train", step=1, loss=7.3)  # after the checkpoint, and lost with the job
    with run_log(tmp_path) as log:
        log.info("this job")
        log.begin(earlier)
        log.info("goes on")
        log.metrics("train", step=1, loss=7.3)
    lines = [line.split(": ", 1)[-1] for line in log.log_file.read_text().splitlines()]
    assert lines == ["earlier job", "this job", "goes on"]
    entries = map(json.loads, log.metrics_file.read_text().splitlines())
    assert [entry["step"] for entry in entries] == [0, 1]


def test_a_job_that_was_refused_leaves_the_log_of_the_run_before(tmp_path):
    with run_log(tmp_path) as log:
        log.begin()
        log.info("the run before")
        log.metrics("train", step=0, loss=7.4)
    with run_log(tmp_path) as log:
        log.info("refused")
    assert log.log_file.read_text().endswith("the run before\n")
    assert log.metrics_file.read_text().count("\n") == 1
    with run_log(tmp_path) as log:
        log.info("another run")
        log.begin()
        log.info("goes on")
    lines = [line.split(": ", 1)[-1] for line in log.log_file.read_text().splitlines()]
    assert lines == ["another run", "goes on"] and log.metrics_file.read_text() == ""


def test_two_runs_never_write_one_log(tmp_path):
    with run_log(tmp_path) as log:
        log.begin()
        log.info("the first")
        for ours, option in ((log.log_file, "--model-dir"), (tmp_path / "b", "--output-data-dir")):
            with pytest.raises(InUseError, match=f"in use by another run.*{option}"):
                RunLog(ours, log.metrics_file)
        log.info("goes on")
    assert len(log.log_file.read_text().splitlines()) == 2


def test_a_follower_sees_what_was_and_what_comes(tmp_path):
    seen = []
    with run_log(tmp_path) as log:
        log.metrics("train", step=0, loss=7.4)
        log.follow(seen.append)
        log.metrics("validation", step=0, per=0.5, per_session={"t15": {"PER": 0.5}}, counts={})
    assert [entry["kind"] for entry in seen] == ["train", "validation"]
    assert all(entry["time"] > 1.7e9 for entry in seen)
    assert dict(scalars(seen[0])) == {"train/loss": 7.4}
    assert dict(scalars(seen[1])) == {"validation/per": 0.5, "sessions/t15/PER": 0.5}


def test_the_copy_is_complete_when_the_log_is_closed(tmp_path):
    path = tmp_path / "training_log"
    path.write_text("first\n")
    files = {"training_log": path, "tensorboard/events": tmp_path / "events"}
    uploader = LogUploader(files, str(tmp_path / "copy"), interval_seconds=60)
    path.write_text("first\nlast\n")
    (tmp_path / "events").write_bytes(b"later")  # did not exist at the start
    uploader.close()
    assert (tmp_path / "copy" / "training_log").read_text() == "first\nlast\n"
    assert (tmp_path / "copy" / "tensorboard" / "events").read_bytes() == b"later"


def test_a_copy_that_fails_is_one_warning(tmp_path, monkeypatch):
    def refuse(url):
        raise StorageError("no such place")

    monkeypatch.setattr("brain_to_text.training.log_files.open_store", refuse)
    with run_log(tmp_path) as log:
        log.begin()
        uploader = LogUploader({"training_log": log.log_file}, "s3://nowhere", 0.01)
        log.info("something to copy")
        uploader._thread.join(0.2)
        uploader.close()
    assert log.log_file.read_text().count("no such place") == 1
