"""The driver of ./local_run.sh: what it shows and what it puts in the SDK's way."""

import io
import subprocess

import local_run
import pytest
from support import local_mode
from support.bare_path import bare_path


def test_composes_prefix_and_chatter_are_not_shown(tmp_path, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr("sys.stdout", terminal)
    with (tmp_path / "log").open("w") as file:
        tee = local_run._Tee(file, local_run._is_trainer_line, local_run.COMPOSE_PREFIX)
        tee.write("Creating abc-algo-1 ... done\n\x1b[0mAborting on container exit...\n")
        tee.write("\x1b[36mabc-algo-1 |\x1b[0m 2026: sagemaker-training-toolkit INFO  x\r\n")
        tee.write("\x1b[36mabc-algo-1 |\x1b[0m 2026: Train ")
        tee.write("batch 0: loss: 7.43\r\n")
        tee.write("abc-algo-1  | 2026: Val batch 0\n")
    assert terminal.getvalue() == "2026: Train batch 0: loss: 7.43\n2026: Val batch 0\n"
    assert "sagemaker-training-toolkit" in (tmp_path / "log").read_text()


def test_without_an_engine_there_is_no_image_and_a_sentence_why(tmp_path, monkeypatch, capsys):
    (tmp_path / "tools").mkdir()
    monkeypatch.setenv("PATH", str(bare_path(tmp_path / "tools")))
    monkeypatch.setattr(local_run, "REPOSITORY", tmp_path)
    assert local_run.provide_image(tmp_path, gpu=False, base_image=None) is None
    assert "no docker command was found: install Docker." in capsys.readouterr().out


@pytest.fixture
def fake_docker(tmp_path, monkeypatch):
    """fake_docker(plugin="v5.0.1" or None, standalone="1.29.2" or None): the commands on PATH."""

    def install(plugin, standalone):
        tools = tmp_path / "tools"
        tools.mkdir()
        script(
            tools / "docker",
            f'[ "$1" = compose ] && echo "{plugin}" && exit 0\nexit 1' if plugin else "exit 1",
        )
        if standalone:
            script(tools / "docker-compose", f'echo "{standalone}"')
        monkeypatch.setenv("PATH", str(tools))

    def script(path, body):
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    return install


def test_a_compose_plugin_of_any_version_becomes_docker_compose(fake_docker, tmp_path):
    fake_docker("Docker Compose version v5.0.1", None)
    local_mode.provide_compose(True, tmp_path)
    said = subprocess.run(
        [str(tmp_path / "docker-compose"), "version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == "Docker Compose version v5.0.1"


def test_a_standalone_compose_serves_without_a_gpu(fake_docker, tmp_path):
    fake_docker(None, "1.29.2")
    local_mode.provide_compose(False, tmp_path)
    assert not (tmp_path / "docker-compose").exists()


def test_a_compose_too_old_for_a_gpu_is_named(fake_docker, tmp_path):
    fake_docker(None, "1.29.2")
    with pytest.raises(RuntimeError, match="gives containers no GPU"):
        local_mode.provide_compose(True, tmp_path)


def test_without_compose_it_says_what_to_install(fake_docker, tmp_path):
    fake_docker(None, None)
    with pytest.raises(RuntimeError, match="docker-compose-plugin"):
        local_mode.provide_compose(False, tmp_path)


@pytest.mark.parametrize("steps", ["0", "-3", "many"])
def test_a_senseless_number_of_steps_is_a_usage_error(steps):
    with pytest.raises(SystemExit) as exit_:
        local_run.parse_arguments(["--steps", steps])
    assert exit_.value.code == 2
