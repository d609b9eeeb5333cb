"""The failure file: the first reason, scrubbed, in one line, also where hardly anything fits."""

import errno
from pathlib import Path

import pytest
import train_model_sagemaker
from brain_to_text.errors import DataError
from brain_to_text.launch.pricing import hourly_price
from brain_to_text.training.container import SageMakerEnvironment, failure_text


@pytest.fixture
def environment(tmp_path):
    (tmp_path / "output").mkdir()
    return SageMakerEnvironment.from_variables({"SAGEMAKER_BASE_DIR": str(tmp_path)})


def test_no_secret_and_no_line_break_gets_into_the_failure_text(environment):
    error = DataError(
        "s3://b/k at https://me:word@host/k?X-Amz-Signature=abc&X-Amz-Credential=def of session "
        "t15\nERROR: everything is well"
    )
    said = environment.write_failure(error)
    assert environment.failure_file.read_text() == f"{said}\n"
    assert len(said.splitlines()) == 1
    for secret in ("word", "abc", "def"):
        assert secret not in said


def test_a_cause_is_scrubbed_too():
    error = DataError("It cannot be read.")
    error.__cause__ = OSError("https://key:secret@host is away")
    assert failure_text(error) == "It cannot be read. Cause: OSError: https://***@host is away"


def test_the_first_reason_stays(environment):
    environment.write_failure(DataError("first"))
    assert environment.write_failure(DataError("second")) == "second"
    assert environment.failure_file.read_text() == "first\n"


def test_room_that_was_kept_is_given_up_for_the_reason(environment, monkeypatch):
    reserve = environment.failure_file.with_name("failure-reserve")
    real = Path.open

    def full_while_reserved(path, mode="r", *rest, **more):
        if path.name == "failure" and "x" in mode and reserve.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", full_while_reserved)
    reserve.write_bytes(b"the hook's")
    environment.write_failure(DataError("The volume is full."))
    assert environment.failure_file.read_text() == "The volume is full.\n"
    assert not reserve.exists()


def test_an_earlier_runs_failure_is_replaced_and_this_runs_stays(environment, tmp_path):
    environment.write_failure(DataError("of the run before"))
    now = SageMakerEnvironment.from_variables({"SAGEMAKER_BASE_DIR": str(tmp_path)})
    now.write_failure(DataError("this one's"))
    now.write_failure(DataError("a consequence"))
    assert now.failure_file.read_text() == "this one's\n"
    SageMakerEnvironment.from_variables({"SAGEMAKER_BASE_DIR": str(tmp_path)}).forget_failure()
    assert not now.failure_file.exists()


def test_a_jobs_report_says_duration_and_cost_where_the_price_is_known(monkeypatch):
    assert train_model_sagemaker.job_facts(0) == {}
    monkeypatch.setenv("SM_CURRENT_INSTANCE_TYPE", "ml.g5.xlarge")
    monkeypatch.setenv("SM_HOSTS", '["algo-1", "algo-2"]')
    facts = train_model_sagemaker.job_facts(1800)
    price, _ = hourly_price("ml.g5.xlarge")
    assert facts["Instance"] == "2 x ml.g5.xlarge" and facts["Duration of this job"] == "30.0 min"
    assert facts["Cost so far"].startswith(f"${price:.2f} on demand (")
