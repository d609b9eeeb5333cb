"""What a job left: its reason and the next step, archives unpacked without trusting them."""

import io
import tarfile

import pytest
from brain_to_text.errors import JobError
from brain_to_text.launch.fetch import fetch, result_table, unpack
from brain_to_text.launch.jobs import JobState
from brain_to_text.log_lines import rows_of_log
from support.aws_emulation import BUCKET, emulated_aws


def archive(path, *members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content, changes in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in changes.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_files_and_folders_arrive(tmp_path):
    path = archive(
        tmp_path / "model.tar.gz",
        ("./checkpoint", b"", {"type": tarfile.DIRTYPE}),
        ("./checkpoint/best_checkpoint", b"weights", {"mode": 0o6777}),
        ("training_log", b"log", {}),
    )
    unpack(path, tmp_path / "model")
    best = tmp_path / "model" / "checkpoint" / "best_checkpoint"
    assert best.read_bytes() == b"weights"
    assert best.stat().st_mode & 0o7000 == 0
    assert (tmp_path / "model" / "training_log").read_bytes() == b"log"


DANGEROUS = {
    "parent": ("../outside", b"x", {}),
    "absolute": ("/etc/outside", b"x", {}),
    "symlink": ("link", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
    "hardlink": ("hard", b"", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"}),
    "device": ("device", b"", {"type": tarfile.CHRTYPE}),
    "large": ("large", b"1234567890", {}),
    "twice": ("training_log", b"second", {}),
    "truncated": ("noise", bytes(range(256)) * 500, {}),
}


@pytest.mark.parametrize("kind", DANGEROUS)
def test_a_dangerous_or_damaged_archive_writes_nothing_at_all(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("brain_to_text.launch.fetch.MAX_BYTES", 12 if kind == "large" else 10**6)
    path = archive(tmp_path / "model.tar.gz", ("training_log", b"log", {}), DANGEROUS[kind])
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    inside = tmp_path / "deep" / "er"
    inside.mkdir(parents=True)
    with pytest.raises(JobError) as refused:
        unpack(path, inside / "model")
    told = "fetch it again" if kind in ("twice", "truncated") else repr(DANGEROUS[kind][0])
    assert told in str(refused.value)
    assert list(inside.iterdir()) == [] and not list(tmp_path.rglob("*outside*"))


def test_the_result_table_shows_first_best_and_last():
    log = "\n".join(
        f"Val batch {step}: DER (avg): {der} CTC Loss (avg): 1.5 time: 2.0"
        for step, der in ((1500, 0.8), (3000, 0.5), (4500, 0.6))
    )
    assert result_table(rows_of_log(log)) == [
        "       batch  DER (avg)  CTC Loss (avg)",
        "first  1,500     0.8000          1.5000",
        " best  3,000     0.5000          1.5000",
        " last  4,500     0.6000          1.5000",
    ]
    assert result_table({}) == ["No validation yet; last training step -1."]


# --- why a job ended, and what to do next


@pytest.mark.parametrize(
    ("secondary", "reason", "said"),
    [
        ("Failed", "CapacityError: Unable to provision requested ML compute capacity", "try again"),
        ("Failed", "ClientError: Could not assume role arn:aws:iam::1:role/x", "trust_policy.json"),
        ("Failed", "AlgorithmError: Trial 3 is damaged", "correct what the reason names"),
        ("MaxRuntimeExceeded", "", "raise --max-run-hours, and go on from its last checkpoint"),
        ("MaxWaitTimeExceeded", "", "raise --max-wait-hours or leave --spot out"),
        ("Interrupted", "", "the spot instance was taken back"),
        (
            "NeverHeardOf",
            "",
            "its last state is NeverHeardOf. Next: see its log with --watch b2t-1",
        ),
    ],
)
def test_every_end_has_its_reason_and_a_next_step(secondary, reason, said):
    status = "Failed" if secondary in ("Failed", "NeverHeardOf") else "Stopped"
    job = {"TrainingJobStatus": status, "SecondaryStatus": secondary, "FailureReason": reason}
    text = " ".join(JobState("b2t-1", job).why())
    assert reason in text and "Next: " in text and said in text
    assert ("--resume-from" in text) == ("--resume-from b2t-1." in text)


def test_a_job_that_completed_needs_no_next_step_and_an_unknown_state_is_an_end():
    assert JobState("b2t-1", {"TrainingJobStatus": "Completed"}).why() == []
    assert JobState("b2t-1", {"TrainingJobStatus": "Deleting"}).is_final


@pytest.fixture
def job(monkeypatch, tmp_path):
    """job(description, **objects) -> what --fetch says of a job that SageMaker describes so."""
    with emulated_aws(monkeypatch) as aws:
        s3 = aws.client("s3")
        s3.create_bucket(Bucket=BUCKET)

        def run(description, **objects):
            for name, content in objects.items():
                key = f"out/b2t-1/{name.replace('__', '/')}"
                s3.put_object(Bucket=BUCKET, Key=key, Body=content)
            request = {**description, "OutputDataConfig": {"S3OutputPath": f"s3://{BUCKET}/out"}}
            state = JobState("b2t-1", request)
            monkeypatch.setattr("brain_to_text.launch.fetch.job_state", lambda *_: state)
            return "\n".join(fetch("b2t-1", aws.account, tmp_path / "job"))

        yield run


FAILED = {"TrainingJobStatus": "Failed", "FailureReason": "AlgorithmError: Trial 3 is damaged."}


@pytest.mark.aws
def test_a_failed_job_says_its_reason_whatever_it_left(job):
    with pytest.raises(JobError, match=r"left nothing under .*Why: AlgorithmError: Trial 3"):
        job(FAILED)
    said = job(FAILED, logs__training_log=b"")
    assert "Why: AlgorithmError: Trial 3 is damaged." in said and "ended without" in said
    assert "try again when" not in said


@pytest.mark.aws
def test_an_uncompressed_model_is_fetched(job, tmp_path):
    ended = {"TrainingJobStatus": "Completed"}
    said = job(ended, output__model__checkpoint__best_checkpoint=b"w", output__model__x=b"")
    assert (tmp_path / "job/model/checkpoint/best_checkpoint").read_bytes() == b"w"
    assert f"evaluate_model.py --model {tmp_path / 'job/model'}" in said


@pytest.mark.aws
def test_a_key_that_leads_elsewhere_is_not_fetched(job, tmp_path):
    with pytest.raises(JobError, match="would be written outside the folder"):
        job(
            {"TrainingJobStatus": "Completed"},
            **{"output/model/a": b"", "output/model/../../x": b""},
        )
    assert not list(tmp_path.rglob("x")) and not (tmp_path / "job/model").exists()
