"""The guide's tutorial works: every command of its blocks, in order, in an empty folder.

What differs from what a reader types is in `REPLACED` and in `archive`, and nowhere else: the
programs' places, a small model, few steps, a bucket of the test's own, and instead of the public
download a synthetic archive of the same layout. `aws s3 sync` copies into the test's S3 server.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import prepare_dataset
import pytest

CODE = Path(prepare_dataset.__file__).parent
REPLACED = {
    ".venv/bin/python": sys.executable,
    "code/": f"{CODE}/",
    "rnn_args_diphone_sagemaker.yaml": "rnn_args_smoke.yaml",
    "--num-training-batches 1000": "--num-training-batches 8",
}
DOWNLOAD = ".local/t15_copyTask_neuralData.zip"
pytestmark = [pytest.mark.slow]


def commands() -> list[str]:
    """The commands of the tutorial's blocks, one line each."""
    guide = (CODE / "README_SAGEMAKER.md").read_text(encoding="utf-8")
    tutorial = guide.split("\n## Tutorial\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", tutorial, re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split("#")[0].split()) for line in lines if line.split("#")[0].strip()]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """An empty folder with the public archive's synthetic twin: phoneme labels, four sessions."""
    source = tmp_path / "source"
    sizes = ["--sessions", "4", "--trials", "15"]
    assert prepare_dataset.main(["synthesize", str(source), "--phonemes", *sizes]) == 0
    folder = tmp_path / "reader"
    (folder / DOWNLOAD).parent.mkdir(parents=True)
    with zipfile.ZipFile(folder / DOWNLOAD, "w") as file:
        for path in sorted(source.rglob("*.hdf5")):
            file.write(path, Path("hdf5_data_final") / path.relative_to(source))
    return folder


def test_the_tutorial_has_the_whole_way():
    programs = [command.split()[1] for command in commands() if not command.startswith("aws")]
    assert {Path(p).name for p in programs[1:]} == {
        "prepare_dataset.py",
        "train_model_sagemaker.py",
        "evaluate_model.py",
        "launch_sagemaker_job.py",
    }
    assert DOWNLOAD in commands()[0]


@pytest.mark.timeout(1800)
def test_every_command_of_the_tutorial_works(archive: Path, s3_bucket: str, upload) -> None:
    variables = {**os.environ, "AWS_DEFAULT_REGION": "us-east-1", "OMP_NUM_THREADS": "1"}
    for command in commands():
        line = command.replace("YOUR-BUCKET", s3_bucket)
        for typed, run in REPLACED.items():
            line = line.replace(typed, run)
        arguments = shlex.split(line)
        if arguments[:3] == ["aws", "s3", "sync"]:
            upload(archive / arguments[3], arguments[4])
            continue
        done = subprocess.run(
            arguments, cwd=archive, env=variables, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"

    report = (archive / ".local" / "dataset.html").read_text(encoding="utf-8")
    assert "Sessions and splits" in report
    results = archive / ".local" / "results"
    assert "Phoneme confusions" in (results / "report.html").read_text(encoding="utf-8")
    assert json.loads((results / "summary.json").read_text())["n_trials"] == 12
    assert (archive / ".local" / "test-results" / "phoneme_logits.hdf5").exists()
