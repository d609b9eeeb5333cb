"""The README's way to a job, command by command, from an empty HOME, on an account that evaluates.

What differs from what a reader types: the bucket's name, the job's name, the quota's code and, for
the public download, a small synthetic archive of the same layout. Pushing the image, which needs an
engine, is tests/container/test_push.py; here it is put as that script puts it. `aws logs tail`,
which only version 2 of the command line has and which has no end, is the call that it repeats.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import prepare_dataset
import pytest
from brain_to_text.config_reader import load_config
from brain_to_text.launch.image import LABEL, fingerprints
from brain_to_text.launch.request import CODE_FOLDER
from brain_to_text.launch.submit import launch_training_job
from support.aws_emulation import (
    ADMINISTRATOR,
    BUCKET,
    REGION,
    ROLE,
    assert_no_credentials,
    emulated_aws,
    launcher_policy,
    log_in,
    put_image,
)

pytestmark = [pytest.mark.aws, pytest.mark.slow]

TOP = CODE_FOLDER.parent
LOG_GROUP = "/aws/sagemaker/TrainingJobs"


def commands() -> list[str]:
    """The commands of the README's steps on AWS, one line each."""
    text = (TOP / "README.md").read_text(encoding="utf-8")
    steps = text.split("\n## Three steps on AWS\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", steps, re.S)
    return [line for line in "".join(blocks).replace("\\\n", " ").splitlines() if line.strip()]


@pytest.fixture
def aws(monkeypatch):
    with emulated_aws(monkeypatch) as emulated:
        emulated.client("s3").create_bucket(Bucket=BUCKET)
        log_in(emulated, monkeypatch, launcher_policy())
        yield emulated


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A reader's checkout beside the download, and an empty HOME."""
    source = tmp_path / "source"
    sizes = ["--sessions", "4", "--trials", "15"]
    assert prepare_dataset.main(["synthesize", str(source), "--phonemes", *sizes]) == 0
    folder = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", ".local", ".venv", ".git", "tests", "*.whl")
    shutil.copytree(TOP, folder, ignore=ignored)
    with zipfile.ZipFile(folder / "t15_copyTask_neuralData.zip", "w") as file:
        for path in sorted(source.rglob("*.hdf5")):
            file.write(path, Path("hdf5_data_final") / path.relative_to(source))
    (tmp_path / "home").mkdir()
    return folder


class Reader:
    """Types the commands, as the user with the launcher's policy or as an administrator."""

    def __init__(self, aws, folder):
        self.aws, self.folder, self.known = aws, folder, {"YOUR-BUCKET": BUCKET}
        programs = [Path(sys.executable).parent, Path(str(shutil.which("aws"))).parent]
        self.variables = {n: v for n, v in os.environ.items() if n.startswith("AWS_")} | {
            "HOME": str(folder.parent / "home"),
            "PATH": os.pathsep.join([*map(str, programs), "/usr/bin", "/bin"]),
            "OMP_NUM_THREADS": "1",
        }
        for name in ("PYENV_ROOT", "PYENV_VERSION"):  # `aws` may be a shim
            if name in os.environ:
                self.variables[name] = os.environ[name]

    def types(self, command):
        line = command
        for blank, value in self.known.items():
            line = line.replace(blank, value)
        administrators = command.startswith("aws cloudformation")
        key = {"AWS_ACCESS_KEY_ID": ADMINISTRATOR} if administrators else {}
        done = subprocess.run(
            ["bash", "-ec", line],
            cwd=self.folder,
            env={**self.variables, **key},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        assert_no_credentials(done.stdout + done.stderr)
        return done


def logged(aws, job):
    """The log and the archive of a job that ran, which the emulation does not run."""
    logs, stream = aws.client("logs"), f"{job}/algo-1-1700000000"
    logs.create_log_group(logGroupName=LOG_GROUP)
    logs.create_log_stream(logGroupName=LOG_GROUP, logStreamName=stream)
    event = {"timestamp": int(time.time() * 1000), "message": "Train batch 0: loss: 7.43"}
    logs.put_log_events(logGroupName=LOG_GROUP, logStreamName=stream, logEvents=[event])
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("training_log"))
    key = f"sagemaker-outputs/{job}/output/model.tar.gz"
    aws.client("s3").put_object(Bucket=BUCKET, Key=key, Body=packed.getvalue())


@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("aws") is None, reason="the AWS command line is not installed")
def test_the_readmes_commands_end_in_one_job_that_is_the_launchers(aws, checkout):
    reader, done = Reader(aws, checkout), []
    for command in commands():
        if command == "./build_and_push.sh":
            aws.image_uri = put_image(aws, {LABEL: json.dumps(fingerprints())})
            (checkout / ".local").mkdir(exist_ok=True)
            (checkout / ".local" / "image_uri").write_text(aws.image_uri)
            continue
        if command.startswith("aws logs tail"):
            place = {"logGroupName": LOG_GROUP, "logStreamNamePrefix": reader.known["JOB-NAME"]}
            (event,) = aws.account.client("logs").filter_log_events(**place)["events"]
            assert "Train batch 0: loss: 7.43" in event["message"]
            continue
        result = reader.types(command)
        done.append(command.split()[1])
        if "list-service-quotas" in command:
            quotas = [line.split("\t") for line in result.stdout.splitlines()]
            assert {float(value) for _, value, _ in quotas} == {2} and len(quotas) == 3
            reader.known["CODE"] = quotas[0][2]
        if "--wait" in command:
            assert "Checked: 0 errors, 0 warnings" in result.stderr
            (sent,) = aws.sent
            reader.known["JOB-NAME"] = sent["TrainingJobName"]
            logged(aws, sent["TrainingJobName"])
    assert len(done) == 8
    (sent,) = aws.sent  # one job, and it is what the launcher announces for it
    job = sent["TrainingJobName"]
    known = {"role": ROLE, "image_uri": aws.image_uri, "job_name": job}
    assert sent == launch_training_job(BUCKET, dry_run=True, **known).request
    assert (checkout / ".local" / "jobs" / job / "model" / "training_log").exists()
    keys = {k: v for k, v in sent["HyperParameters"].items() if "-" not in k}
    shipped = checkout / "code" / "rnn_args_diphone_sagemaker.yaml"
    assert load_config(None, keys) == load_config(shipped)


@pytest.mark.timeout(600)
def test_from_an_empty_home_without_credentials_one_sentence_says_what_to_do(tmp_path):
    launcher = CODE_FOLDER / "launch_sagemaker_job.py"
    done = subprocess.run(
        [sys.executable, str(launcher), "--s3-bucket", BUCKET, "--region", REGION, "--check"],
        env={
            "HOME": str(tmp_path),
            "PATH": os.environ["PATH"],
            "AWS_EC2_METADATA_DISABLED": "true",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "aws configure" in line
