"""Building the image: which docker client, what it is given, what is said when it fails."""

import build_image
import pytest
from build_image import ImageError, build_problem, docker_client


@pytest.fixture
def clients(tmp_path, monkeypatch):
    """clients(client="28.2", server="20.10", plugin=False): fake docker commands, first on PATH."""
    folders = []

    def add(client, server, plugin):
        folder = tmp_path / f"bin{len(folders)}"
        folder.mkdir()
        script = folder / "docker"
        script.write_text(
            "#!/bin/sh\n"
            f'if [ "$1" = version ]; then echo "{client} {server}"; exit {0 if server else 1}; fi\n'
            f'if [ "$1" = buildx ]; then echo "buildx v0.1"; exit {0 if plugin else 1}; fi\n'
            "exit 1\n"
        )
        script.chmod(0o755)
        folders.append(str(folder))
        monkeypatch.setenv("PATH", ":".join(folders))
        return str(script)

    monkeypatch.setenv("PATH", str(tmp_path))
    docker_client.cache_clear()
    yield add
    docker_client.cache_clear()


def test_without_docker_it_says_what_to_install(clients):
    with pytest.raises(ImageError, match="no docker command was found"):
        docker_client()


def test_without_an_engine_it_says_so(clients):
    clients("28.2.2", "", plugin=True)
    with pytest.raises(ImageError, match="does not reach a Docker engine"):
        docker_client()


def test_a_new_client_without_buildx_is_passed_over_for_the_engines_own(clients):
    clients("28.2.2", "20.10.24", plugin=False)
    own = clients("20.10.24", "20.10.24", plugin=False)
    assert docker_client() == own


def test_a_new_client_without_buildx_alone_is_named(clients):
    clients("28.2.2", "20.10.24", plugin=False)
    with pytest.raises(ImageError, match="no buildx plugin"):
        docker_client()


def test_a_new_client_with_buildx_is_taken(clients):
    first = clients("28.2.2", "28.2.2", plugin=True)
    clients("20.10.24", "28.2.2", plugin=False)
    assert docker_client() == first


def test_a_base_that_cannot_be_pulled_names_the_argument():
    lines = [
        "#3 [internal] load metadata for docker.io/nvidia/cuda:13",
        '#3 ERROR: failed to do request: Head "...": no such host',
    ]
    said = build_problem(lines, None)
    assert "--base-image" in said
    assert "BASE_IMAGE" in said


def test_a_failed_step_shows_its_own_error():
    lines = [
        "#9 16.3 ERROR: no matching distribution for h5py",
        "#9 ERROR: executor failed running [/bin/sh -c pip wheel]: exit code: 1",
        "executor failed running [/bin/sh -c pip wheel]: exit code: 1",
    ]
    assert "no matching distribution for h5py" in build_problem(lines, None)


def test_changes_to_what_the_image_is_made_of_are_marked(tmp_path, monkeypatch):
    import subprocess

    def git(*arguments):
        who = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True)

    git("init", "--quiet")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("1")
    (tmp_path / "README.md").write_text("1")
    git("add", ".")
    git("commit", "--quiet", "-m", "start")
    monkeypatch.setattr(build_image, "REPOSITORY", tmp_path)
    clean = build_image.source_revision()
    assert len(clean) == 40
    (tmp_path / "README.md").write_text("2")
    assert build_image.source_revision() == clean
    (tmp_path / "code" / "a.py").write_text("2")
    assert build_image.source_revision() == f"{clean}-dirty"


def test_the_certificate_bundle_is_the_one_pip_is_told_to_use(tmp_path, monkeypatch):
    bundle = tmp_path / "ca.pem"
    bundle.write_text("certificates")
    monkeypatch.setenv("PIP_CERT", str(bundle))
    assert build_image.certificate_bundle() == bundle
