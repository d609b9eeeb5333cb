"""The least-privilege policy of the job, proved: a run under an S3 that enforces IAM (moto)."""

import json
import urllib.request
from pathlib import Path

import boto3
import pytest
import train_model_sagemaker
from integration.kill_harness import SETTINGS
from moto.server import ThreadedMotoServer
from support.tiny_data import write_dataset

pytestmark = pytest.mark.aws

POLICY = Path(train_model_sagemaker.__file__).parent / "aws" / "job_policy.json"
BUCKET, REGION = "brain-recordings", "us-east-1"
PREFIX, OUTPUT = "data/set", "sagemaker-outputs/job-1"


class Account:
    """A bucket with an unindexed dataset, and a user who holds the job's policy."""

    def __init__(self, endpoint: str, data: Path) -> None:
        self.endpoint = endpoint
        self.session = boto3.Session("testing", "testing", region_name=REGION)
        self.enforce(False)
        urllib.request.urlopen(  # servers of one process share their state
            urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")
        ).read()
        self.s3 = self.client("s3")
        self.s3.create_bucket(Bucket=BUCKET)
        for path in sorted(data.rglob("*.hdf5")):
            key = f"{PREFIX}/{path.relative_to(data).as_posix()}"
            self.s3.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())

    def client(self, service: str):
        return self.session.client(service, endpoint_url=self.endpoint)

    def job_key(self, without: str | None) -> dict[str, str]:
        policy = json.loads(POLICY.read_text().replace("YOUR-BUCKET", BUCKET))
        kept = [s for s in policy["Statement"] if s["Sid"] != without]
        assert without is None or len(kept) == len(policy["Statement"]) - 1
        iam = self.client("iam")
        iam.create_user(UserName="job")
        document = json.dumps({**policy, "Statement": kept})
        iam.put_user_policy(UserName="job", PolicyName="job", PolicyDocument=document)
        return iam.create_access_key(UserName="job")["AccessKey"]

    def enforce(self, yes: bool) -> None:
        request = urllib.request.Request(
            f"{self.endpoint}/moto-api/reset-auth",
            data=b"0" if yes else b"inf",  # calls that are let through first
            headers={"Content-Type": "text/plain"},
        )
        urllib.request.urlopen(request).read()

    def keys(self) -> set[str]:
        self.enforce(False)
        return {o["Key"] for o in self.s3.list_objects_v2(Bucket=BUCKET)["Contents"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, n_features=16, bins=(80, 140), trials={"train": 3, "val": 1})
    return folder


@pytest.fixture
def train(data, tmp_path, monkeypatch, capfd):
    """train(statement left out) -> (exit code, what was said, failure text, keys in the bucket)."""
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    account = Account(f"http://{host}:{port}", data)

    def run(without: str | None) -> tuple[int, str, str, set[str]]:
        key = account.job_key(without)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", account.endpoint)
        monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path))
        (tmp_path / "output").mkdir()
        settings = SETTINGS | {"num_training_batches": 3, "batches_per_val_step": 2}
        words = [w for name, value in settings.items() for w in (f"--{name}", str(value))]
        where = ["--s3-bucket", BUCKET, "--s3-data-prefix", PREFIX]
        where += ["--output-s3-uri", f"s3://{BUCKET}/{OUTPUT}"]
        account.enforce(True)
        code = train_model_sagemaker.main([*where, *words])
        failure = tmp_path / "output" / "failure"
        said = "".join(capfd.readouterr())
        text = failure.read_text() if failure.exists() else ""
        return code, said, text, account.keys()

    yield run
    server.stop()


def test_what_the_policy_lists_suffices(train):
    code, said, _, keys = train(without=None)
    assert code == 0, said
    assert f"{PREFIX}/trial_manifest.json.gz" in keys
    assert f"{OUTPUT}/logs/training_log" in keys
    assert "WARNING" not in said


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("FindTheData", "Cannot list s3://brain-recordings/data/set: access denied"),
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
