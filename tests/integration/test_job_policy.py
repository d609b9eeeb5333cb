"""The least-privilege policy of the job, proved: a run on an account that enforces IAM."""

from pathlib import Path

import pytest
import train_model_sagemaker
from integration.kill_harness import SETTINGS
from support.aws_emulation import BUCKET, emulated_aws, log_in, policy_document
from support.tiny_data import write_dataset

pytestmark = pytest.mark.aws

PREFIX, OUTPUT = "data/set", "sagemaker-outputs/job-1"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, n_features=16, bins=(80, 140), trials={"train": 3, "val": 1})
    return folder


@pytest.fixture
def train(data, tmp_path, monkeypatch, capfd):
    """train(statement left out) -> (exit code, what was said, failure text, keys in the bucket)."""

    def run(without: str | None) -> tuple[int, str, str, set[str]]:
        with emulated_aws(monkeypatch) as aws:
            s3 = aws.client("s3")
            s3.create_bucket(Bucket=BUCKET)
            for path in sorted(data.rglob("*.hdf5")):
                key = f"{PREFIX}/{path.relative_to(data).as_posix()}"
                s3.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())
            policy = policy_document("job_policy.json")
            kept = [s for s in policy["Statement"] if s["Sid"] != without]
            assert without is None or len(kept) == len(policy["Statement"]) - 1
            log_in(aws, monkeypatch, {**policy, "Statement": kept})
            monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path))
            (tmp_path / "output").mkdir()
            settings = SETTINGS | {"num_training_batches": 3, "batches_per_val_step": 2}
            words = [w for name, value in settings.items() for w in (f"--{name}", str(value))]
            where = ["--s3-bucket", BUCKET, "--s3-data-prefix", PREFIX]
            where += ["--output-s3-uri", f"s3://{BUCKET}/{OUTPUT}"]
            code = train_model_sagemaker.main([*where, *words])
            keys = {found["Key"] for found in s3.list_objects_v2(Bucket=BUCKET)["Contents"]}
        failure = tmp_path / "output" / "failure"
        text = failure.read_text() if failure.exists() else ""
        return code, "".join(capfd.readouterr()), text, keys

    return run


def test_what_the_policy_lists_suffices(train):
    code, said, _, keys = train(without=None)
    assert code == 0, said
    assert f"{PREFIX}/trial_manifest.json.gz" in keys
    assert f"{OUTPUT}/logs/training_log" in keys
    assert "WARNING" not in said


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("FindTheData", f"Cannot list s3://{BUCKET}/data/set: access denied"),
        ("ReadTheData", "access denied"),
    ],
)
def test_without_a_statement_the_job_fails_with_its_reason(train, statement, words):
    code, said, failure, _ = train(without=statement)
    assert code == 1
    assert words in failure and "s3:GetObject" in failure, failure
    assert "Traceback" not in said


def test_without_the_manifests_statement_the_job_says_that_it_indexes_every_time(train):
    code, said, _, keys = train(without="KeepTheManifest")
    assert code == 0
    assert "The index serves this run only" in said and "access denied" in said
    assert f"{PREFIX}/trial_manifest.json.gz" not in keys


def test_without_the_outputs_statement_the_missing_log_is_said_once(train):
    code, said, _, keys = train(without="WriteOutputsAndCheckpoints")
    assert code == 0
    assert said.count("The log is not copied to") == 1 and "access denied" in said
    assert f"{OUTPUT}/logs/training_log" not in keys
