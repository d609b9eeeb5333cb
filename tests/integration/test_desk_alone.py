"""The launcher needs boto3 and pyyaml alone: run where nothing else of ours can be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import launch_sagemaker_job
import pytest

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


def run(tmp_path, *arguments):
    script = BARRIER.replace("NEEDED", repr((*NEEDED, "brain_to_text")))
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"], "AWS_DEFAULT_REGION": "us-east-1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_launcher_makes_a_request_with_boto3_and_pyyaml_alone(tmp_path):
    done = run(tmp_path, CODE / "launch_sagemaker_job.py", "--s3-bucket", "my-bucket", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ResourceConfig"]["InstanceType"] == "ml.g5.2xlarge"
    assert "Price:" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["index", "s3://b/p"], ["validate", "folder"]])
def test_data_commands_say_in_one_sentence_what_they_need(tmp_path, command):
    done = run(tmp_path, CODE / "prepare_dataset.py", *command)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "h5py" in line and "pip install" in line
