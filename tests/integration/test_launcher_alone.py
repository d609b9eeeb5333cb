"""The launcher needs boto3 and pyyaml alone: its checks where nothing else can be imported.

From an empty HOME, against an account that evaluates; a job would pay for each of the mistakes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import launch_sagemaker_job
import pytest
from support.aws_emulation import (
    BUCKET,
    PREFIX,
    USER,
    archive,
    assert_no_credentials,
    emulated_aws,
    ready_to_train,
)

pytestmark = pytest.mark.aws

CODE = Path(launch_sagemaker_job.__file__).parent
# boto3, pyyaml, what they need themselves, and the standard library
NEEDED = (
    "boto3",
    "botocore",
    "yaml",
    "_yaml",
    "jmespath",
    "dateutil",
    "s3transfer",
    "six",
    "urllib3",
)
BARRIER = """
import importlib.machinery, os, runpy, sys
Finder = importlib.machinery.PathFinder
class Only:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in (*sys.stdlib_module_names, *NEEDED):
            return Finder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(Finder)] = Only()
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(tmp_path, program, *arguments, **variables):
    script = BARRIER.replace("NEEDED", repr((*NEEDED, "brain_to_text")))
    home = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "AWS_DEFAULT_REGION": "us-east-1"}
    return subprocess.run(
        [sys.executable, "-c", script, str(CODE / program), *map(str, arguments)],
        env={**home, **variables},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_launcher_makes_a_request_with_boto3_and_pyyaml_alone(tmp_path):
    done = run(tmp_path, "launch_sagemaker_job.py", "--s3-bucket", "my-bucket", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ResourceConfig"]["InstanceType"] == "ml.g5.2xlarge"
    assert "Price:" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["index", "s3://b/p"], ["validate", "folder"]])
def test_data_commands_say_in_one_sentence_what_they_need(tmp_path, command):
    done = run(tmp_path, "prepare_dataset.py", *command)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "h5py" in line and "pip install" in line


def archived(aws):
    archive(aws, f"{PREFIX}/t15.2023.08.12/data_val.hdf5")


def foreign(aws):
    aws.client("s3").create_bucket(Bucket="somebody-elses")
    aws.foreign_buckets.add("somebody-elses")


def may_list_any_bucket(aws):
    """The launcher's policy names one bucket; of others the account only says "not you"."""
    allow = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [allow]})
    aws.client("iam").put_user_policy(UserName=USER, PolicyName="s3", PolicyDocument=policy)


# What is wrong: done to the account, options instead of the right ones, and the errors that are
# printed: all of them, each by a part.
MISTAKES = {
    "the phoneme file on diphone data": (
        None,
        {"--config-file": "rnn_args_phoneme_sagemaker.yaml"},
        ["labels have 1681 classes: use --config-file rnn_args_diphone_sagemaker.yaml"],
    ),
    "trials too short for the patches": (
        None,
        {"--model.patch_size": 70},
        ["60 bins give 0 frames at patches of 70 bins"],
    ),
    "an archived file": (
        archived,
        {},
        ["1 of 9 files", "archived (GLACIER", "aws s3api restore-object --bucket speech-data"],
    ),
    "another account's bucket": (
        foreign,
        {"--s3-bucket": "somebody-elses"},
        ["S3 refused access to bucket somebody-elses (AccessDenied", "another account"],
    ),
    "no such bucket": (
        may_list_any_bucket,
        {"--s3-bucket": "speech-dta"},
        ["Bucket speech-dta does not exist"],
    ),
}


@pytest.fixture
def aws(monkeypatch):
    with emulated_aws(monkeypatch) as emulated:
        ready_to_train(emulated, monkeypatch)
        yield emulated


def check(aws, tmp_path, options, **variables):
    """`--check` as the user of the account, with some options and variables replaced."""
    account = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    account |= variables
    given = {"--s3-bucket": BUCKET, "--image-uri": aws.image_uri, **options}
    words = [str(word) for pair in given.items() for word in pair]
    done = run(tmp_path, "launch_sagemaker_job.py", "--check", *words, **account)
    assert "Traceback" not in done.stderr and aws.sent == []
    assert_no_credentials(done.stdout + done.stderr)
    return done


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_the_one_error_of_the_check(aws, tmp_path, mistake):
    prepare, options, said = MISTAKES[mistake]
    if prepare is not None:
        prepare(aws)
    done = check(aws, tmp_path, options)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert all(part in line for part in said), line
    assert "unchecked" not in done.stderr and "no module" not in done.stderr


@pytest.mark.parametrize(
    "name, stray", [("AWS_SESSION_TOKEN", "\n"), ("AWS_SECRET_ACCESS_KEY", "\r")]
)
def test_a_credential_with_a_stray_character_is_named_and_never_printed(aws, tmp_path, name, stray):
    secret = "FwoGZXIvYXdzEXAMPLE"
    done = check(aws, tmp_path, {}, **{name: secret + stray})
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert name in line and secret not in done.stderr + done.stdout
