"""What the image installs: pinned by hash, and without known holes where that can be asked."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LOCKS = [
    REPOSITORY / "docker" / f"requirements_sagemaker{kind}.txt"
    for kind in ("", "_torch", "_mlflow")
]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_every_package_is_pinned_by_version_and_hash(lock):
    packages = re.split(r"(?m)^(?=[a-z0-9])", lock.read_text())
    packages = [text for text in packages if re.match(r"[a-z0-9]", text)]
    assert packages
    for text in packages:
        assert re.match(r"[\w.\-\[\]]+==[\w.+]+", text), text.splitlines()[0]
        assert "--hash=sha256:" in text, text.splitlines()[0]


def test_mlflow_changes_no_package_that_is_there_already():
    core, extra = ({*re.findall(r"(?m)^([\w.-]+==\S+)", path.read_text())} for path in LOCKS[::2])
    names = {pin.split("==")[0] for pin in core}
    assert {pin for pin in extra if pin.split("==")[0] in names} <= core


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_no_package_has_a_known_vulnerability(lock):
    if shutil.which("pip-audit") is None:
        pytest.skip("pip-audit is not installed: .venv/bin/pip install pip-audit")
    command = ["pip-audit", "--disable-pip", "--require-hashes", "--requirement", str(lock)]
    audit = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = audit.stdout + audit.stderr
    if re.search(r"ConnectionError|Max retries|ServiceError|Skip Reason", said):
        pytest.skip("no advisory database can be reached from here")
    assert audit.returncode == 0, said
