"""./build_and_push.sh on a path without Python: its options, what it asks Docker and AWS for, what
it says and what it leaves.

The docker and aws commands here recite: they note how they were called and answer what a test wrote
down (in the AWS command line's own words). The real ones are in tests/container/test_push.py.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
from brain_to_text.launch.image import code_differences, fingerprints
from support.bare_path import bare_path
from support.processes import heed_signals

TOP = Path(__file__).parents[2]
REGISTRY = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"
DIGEST = "sha256:" + "ab" * 32

DOCKER = """#!/bin/sh
echo "$@" >> "$NOTES/docker"
case "$1" in
version) echo "20.10.24 20.10.24" ;;
context) echo "unix:///run/somewhere.sock" ;;
build)
    env > "$NOTES/build-environment"
    test ! -e "$ANSWERS/build" || { cat "$ANSWERS/build"; exit 1; } ;;
image) echo "REGISTRY/other@sha256:00"; echo "REGISTRY/brain-to-text-training@DIGEST" ;;
--config)
    cat "$2/config.json" > "$NOTES/login"; echo "$DOCKER_HOST" > "$NOTES/host"
    test ! -e "$ANSWERS/slow" || { touch "$NOTES/pushing"; exec sleep 600; }
    test ! -e "$ANSWERS/push" || { cat "$ANSWERS/push" >&2; exit 1; } ;;
*) exit 1 ;;
esac
""".replace("REGISTRY", REGISTRY).replace("DIGEST", DIGEST)

AWS = """#!/bin/sh
echo "$@" >> "$NOTES/aws"
test ! -e "$ANSWERS/$2" || { cat "$ANSWERS/$2"; exit 0; }
test ! -e "$ANSWERS/$2.failed" || { cat "$ANSWERS/$2.failed" >&2; exit 254; }
case "$2" in
get) exit 1 ;;
get-caller-identity) printf '123456789012\\tarn:aws:iam::123456789012:user/me\\n' ;;
describe-repositories | create-repository) echo "REGISTRY/brain-to-text-training" ;;
describe-images)
    echo "An error occurred (ImageNotFoundException) when calling the DescribeImages operation:" >&2
    exit 254 ;;
get-authorization-token) echo QVdTOnBhc3N3b3Jk ;;
esac
""".replace("REGISTRY", REGISTRY)


class Desk:
    """A repository with the script, a path with its tools, and what the commands noted."""

    def __init__(self, base: Path) -> None:
        self.top, self.tools = base / "repository", base / "tools"
        self.notes, self.answers, self.scratch = base / "notes", base / "answers", base / "tmp"
        for folder in (self.tools, self.notes, self.answers, self.scratch):
            folder.mkdir()
        bare_path(self.tools)
        for name, content in {
            "code/train.py": "1",
            "code/with space/ä.yaml": "a: 1",
            "code/__pycache__/train.pyc": "x",
            "docker/Dockerfile": "FROM x",
            "docker/hook.py": "2",
            "docker/requirements_sagemaker.txt": "numpy",
            "docker/requirements_sagemaker_torch.txt": "torch",
            "docker/requirements_sagemaker_mlflow.txt": "mlflow",
            "LICENSE": "free",
            ".gitignore": "__pycache__\n/.local/\n",
        }.items():
            path = self.top / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        shutil.copy(TOP / "build_and_push.sh", self.top)
        self.git("init", "--quiet")
        self.commit()

    def git(self, *arguments: str) -> str:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        command = ["git", "-C", str(self.top), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self) -> None:
        self.git("add", ".")
        self.git("commit", "--quiet", "-m", "a change")

    def install(self, name: str, script: str, folder: Path | None = None) -> Path:
        path = (folder or self.tools) / name
        path.write_text(script)
        path.chmod(0o755)
        return path

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        own = {"PATH": str(self.tools), "HOME": str(self.top), "TMPDIR": str(self.scratch)}
        own |= {"NOTES": str(self.notes), "ANSWERS": str(self.answers), "LC_ALL": "C.UTF-8"}
        return subprocess.Popen(
            [str(self.top / "build_and_push.sh"), *arguments],
            env={**own, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_signals,
        )

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **variables)
        out, err = process.communicate(timeout=300)
        assert list(self.scratch.iterdir()) == [], "something was left behind"
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def says(self, *arguments: str, code: int = 1, **variables: str) -> str:
        """Run, expect a failure: the one sentence."""
        done = self.run(*arguments, **variables)
        assert done.returncode == code, done.stderr
        assert done.stdout == ""
        return done.stderr.strip().splitlines()[-1]

    def noted(self, command: str) -> str:
        path = self.notes / command
        return path.read_text() if path.exists() else ""


@pytest.fixture
def bare(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture
def desk(bare: Desk) -> Desk:
    bare.install("docker", DOCKER)
    bare.install("aws", AWS)
    return bare


def error(code: str, operation: str, message: str) -> str:
    return f"\nAn error occurred ({code}) when calling the {operation} operation: {message}\n"


# --- the engine


def fake_client(desk, client, server, plugin):
    folder = desk.tools.parent / f"bin-{client}"
    folder.mkdir()
    reached = f'echo "{client} {server}"; exit {0 if server else 1}'
    return desk.install(
        "docker",
        f'#!/bin/sh\nif [ "$1" = version ]; then {reached}; fi\n'
        f'if [ "$1 $2" = "buildx version" ]; then exit {0 if plugin else 1}; fi\n'
        f'echo "$0 $@" >> "$NOTES/docker"\n',
        folder,
    )


OLD, NEW = "20.10.24", "28.2.2"


@pytest.mark.parametrize(
    ("clients", "taken", "told"),
    [
        ([], None, "no docker command was found: install Docker."),
        ([(NEW, "", True)], None, "does not reach a Docker engine"),
        ([(NEW, OLD, False)], None, f"bin-{NEW}/docker {NEW} has no buildx plugin"),
        ([(NEW, OLD, False), (OLD, OLD, False)], OLD, ""),  # the engine's own
        ([(NEW, NEW, True), (OLD, NEW, False)], NEW, ""),
    ],
)
def test_the_first_client_that_can_build_is_taken(bare, clients, taken, told):
    folders = [fake_client(bare, *client).parent for client in clients]
    done = bare.run("--no-push", PATH=":".join(map(str, [*folders, bare.tools])))
    assert done.returncode == (0 if taken else 3), done.stderr
    assert told in done.stderr
    assert not taken or re.search(rf"/bin-{taken}/docker (buildx )?build ", bare.noted("docker"))


# As Docker documents its two kinds of builders: the engine's own puts every image into the engine;
# one in a container does so only where it is told to, and has no entitlement to the host's network.
BUILDX = """#!/bin/sh
echo "$@" >> "$NOTES/docker"
case "$1 $2" in
"version --format") echo "28.5.1 28.5.1" ;;
"buildx version") ;;
"buildx inspect") printf 'Name: mine\\nDriver: DRIVER\\nNodes:\\nDriver Options:\\n' ;;
"buildx build")
    case "DRIVER $*" in
    docker-container*"--network host"*)
        echo "ERROR: granting entitlement network.host is not allowed" >&2; exit 1 ;;
    "docker "* | *--load* | *"--output type=docker"*) touch "$NOTES/in-the-engine" ;;
    esac ;;
*) exit 1 ;;
esac
"""


@pytest.mark.parametrize("driver", ["docker", "docker-container"])
def test_a_documented_builder_of_each_kind_puts_the_image_into_the_engine(bare, driver):
    bare.install("docker", BUILDX.replace("DRIVER", driver))
    done = bare.run("--no-push", "--tag", "t")
    assert done.returncode == 0, done.stderr
    assert (bare.notes / "in-the-engine").exists()
    assert ("--network host" in bare.noted("docker")) == (driver == "docker")
    assert "type=docker,oci-mediatypes=false" in bare.noted("docker")


# --- the build


def test_only_building_asks_no_account_and_each_option_reaches_the_build(desk, tmp_path):
    bundle = tmp_path / "ca.pem"
    bundle.write_text("certificates")
    done = desk.run(
        *("--no-push", "--cpu", "--mlflow", "--base-image=debian:13", "--repository", "other"),
        PIP_CERT=str(bundle),
        TORCH_CPU_INDEX="https://example.com/whl",
    )
    revision = desk.git("rev-parse", "HEAD")
    name = f"other:{revision[:12]}-cpu-mlflow"
    assert (done.returncode, done.stdout) == (0, f"{name}\n"), done.stderr
    assert desk.noted("aws") == "" and "--platform" not in desk.noted("docker")
    assert "DOCKER_BUILDKIT=1" in desk.noted("build-environment")
    for words in (
        f"--tag {name}",
        "--build-arg TORCH_VARIANT=cpu",
        "--build-arg MLFLOW=yes",
        "--build-arg BASE_IMAGE=debian:13",
        "--build-arg TORCH_CPU_INDEX=https://example.com/whl",
        f"--build-arg REVISION={revision}",
        f"--secret id=ca_bundle,src={bundle}",
    ):
        assert words in desk.noted("docker"), words


@pytest.mark.parametrize("mlflow", [False, True])
def test_the_label_is_the_fingerprint_of_this_tree_as_the_launcher_makes_it(desk, mlflow):
    for name in ("code", "docker"):
        shutil.copytree(
            TOP / name, desk.top / name, ignore=shutil.ignore_patterns("*.whl"), dirs_exist_ok=True
        )
    desk.run("--no-push", *(["--mlflow"] if mlflow else []))
    (text,) = re.findall(
        r"--label brain-to-text\.code-fingerprints=(\{.*?\}) ", desk.noted("docker")
    )
    label = json.loads(text)
    added = {"code/train.py", "code/with space/ä.yaml", "docker/hook.py"}  # which only it has
    assert set(code_differences(label)) == added
    for name in added:
        content = (desk.top / name).read_bytes()
        assert label.pop(name) == hashlib.sha256(content).hexdigest()[:16]
    assert label == {name: digest for name, digest in fingerprints().items() if name in label}
    locks = {f"docker/requirements_sagemaker{kind}.txt" for kind in ("", "_torch")}
    locks |= {"docker/requirements_sagemaker_mlflow.txt"} if mlflow else set()
    assert {name for name in label if name.endswith(".txt")} == locks
    assert {"code/train_model_sagemaker.py", "docker/toolkit_hook.py"} <= label.keys()


def test_a_file_that_cannot_be_read_ends_the_build(desk):
    (desk.top / "docker" / "requirements_sagemaker_torch.txt").unlink()
    assert "requirements_sagemaker_torch.txt" in desk.says("--no-push")
    assert "build" not in [line.split()[0] for line in desk.noted("docker").splitlines()]


def test_a_file_name_that_no_label_can_hold_is_refused(desk):
    (desk.top / "code" / 'a"b.py').touch()
    assert "rename it" in desk.says("--no-push")


def test_changes_to_what_the_image_is_made_of_are_marked(desk):
    def tag() -> str:
        return desk.run("--no-push").stdout.strip().partition(":")[2]

    clean = tag()
    assert clean == desk.git("rev-parse", "HEAD")[:12]
    (desk.top / "README.md").write_text("2")
    assert tag() == clean
    (desk.top / "code/train.py").write_text("2")
    dirty = tag()
    assert re.fullmatch(rf"{clean}-dirty-[0-9a-f]{{8}}", dirty)
    assert f"REVISION={desk.git('rev-parse', 'HEAD')}-dirty" in desk.noted("docker")
    (desk.top / "code/new.py").write_text("3")
    more = tag()
    assert more not in (clean, dirty)
    (desk.top / "code/new.py").unlink()
    assert tag() == dirty


def test_outside_git_the_image_wants_a_name(desk):
    shutil.rmtree(desk.top / ".git")
    ceiling = {"GIT_CEILING_DIRECTORIES": str(desk.top.parent)}
    assert "name the image with --tag" in desk.says("--no-push", **ceiling)
    assert desk.run("--no-push", "--tag", "t", **ceiling).returncode == 0
    assert "REVISION=unknown" in desk.noted("docker")


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (
            "#3 [internal] load metadata for docker.io/nvidia/cuda:13\n"
            '#3 ERROR: failed to do request: Head "...": no such host\n',
            "the base image debian:13 cannot be pulled from here: give one that this engine has, "
            "any Debian or Ubuntu with Python >= 3.11, with --base-image IMAGE or BASE_IMAGE=IMAGE",
        ),
        (
            "#9 16.3 ERROR: no matching distribution for h5py\n"
            "#9 ERROR: executor failed running [/bin/sh -c pip wheel]: exit code: 1\n"
            "executor failed running [/bin/sh -c pip wheel]: exit code: 1\n",
            "no matching distribution for h5py",
        ),
    ],
    ids=["base", "step"],
)
def test_a_failed_build_shows_the_cause(desk, output, told):
    (desk.top / "docker" / "Dockerfile").write_text("ARG BASE_IMAGE=debian:13\n")
    (desk.answers / "build").write_text(output)
    assert told in desk.says("--no-push")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--platform", "x"], "there is no option '--platform'"),
        (["--tag"], "--tag needs a value"),
        (["--region="], "--region needs a value"),
        (["now"], "there is no option 'now'"),
    ],
)
def test_wrong_usage_is_named(desk, arguments, says):
    assert says in desk.says(*arguments, code=2)


def test_help_names_every_option(desk):
    said = desk.run("--help").stdout
    script = (TOP / "build_and_push.sh").read_text()
    rows = re.findall(r"^    (--[a-z |-]+)\)", script, re.M)
    options = {option for row in rows for option in row.split(" | ")}
    assert len(options) == 7
    assert all(f"  {option} " in said for option in options)


# --- the push


def test_a_push_leaves_a_digest_and_no_login(desk):
    done = desk.run("--region", "eu-west-1")
    uri = f"{REGISTRY}/brain-to-text-training@{DIGEST}"
    assert (done.returncode, done.stdout) == (0, uri + "\n"), done.stderr
    assert (desk.top / ".local/image_uri").read_text() == uri + "\n"
    assert "Account 123456789012, region eu-west-1" in done.stderr
    tag = f"{REGISTRY}/brain-to-text-training:{desk.git('rev-parse', 'HEAD')[:12]}"
    assert f"--tag {tag}" in desk.noted("docker") and "--platform linux/amd64" in desk.noted(
        "docker"
    )
    assert re.search(rf"^--config \S+ push {re.escape(tag)}$", desk.noted("docker"), re.M)
    # only in a file of our own; never on a command line, never by `docker login`
    assert f'{{"{REGISTRY}": {{"auth": "QVdTOnBhc3N3b3Jk"}}}}' in desk.noted("login")
    assert "QVdTOnBhc3N3b3Jk" not in desk.noted("docker") + done.stderr
    assert "login" not in [line.split()[0] for line in desk.noted("docker").splitlines()]
    # the user's own configuration may be what says which engine
    assert desk.noted("host").strip() == "unix:///run/somewhere.sock"


def test_the_region_comes_from_the_profile_last_and_the_command_line_is_needed(desk):
    assert desk.says().endswith("no AWS region: give --region, or set AWS_REGION.")
    (desk.answers / "get").write_text("eu-central-1")
    assert "region eu-central-1" in desk.run().stderr
    (desk.tools / "aws").unlink()
    assert "(aws) was not found: install it" in desk.says("--region", "eu-west-1")


@pytest.mark.parametrize(
    ("operation", "message", "says"),
    [
        (
            "get-caller-identity",
            error("ExpiredToken", "GetCallerIdentity", "The security token has expired"),
            "the AWS login has ended (GetCallerIdentity: ExpiredToken: The security token has exp",
        ),
        (
            "get-caller-identity",
            "\nError when retrieving token from sso: Token has expired and refresh failed\n",
            "run `aws sso login`",
        ),
        (
            "describe-repositories",
            "aws: [ERROR]: " + error("AccessDenied", "DescribeRepositories", "you may not").strip(),
            "AWS refused DescribeRepositories: AccessDenied: you may not (code/",
        ),
        (
            "describe-images",
            error("ThrottlingException", "DescribeImages", "Rate exceeded").replace(
                " operation", " operation (reached max retries: 4)"
            ),
            "AWS refused DescribeImages: ThrottlingException: Rate exceeded (code/",
        ),
    ],
)  # fmt: skip
def test_each_refusal_is_one_sentence(desk, operation, message, says):
    (desk.answers / f"{operation}.failed").write_text(message)
    assert says in desk.says("--region", "eu-west-1")


def test_a_refused_push_says_why(desk):
    (desk.answers / "push").write_text("WARNING: x\nno basic auth credentials\n")
    assert desk.says("--region", "eu-west-1").endswith("failed: no basic auth credentials.")
    assert not (desk.top / ".local/image_uri").exists()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_signal_during_the_push_leaves_no_password(desk, number):
    (desk.answers / "slow").touch()
    process = desk.start("--region", "eu-west-1")
    deadline = time.monotonic() + 300
    while not (desk.notes / "pushing").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    (folder,) = desk.scratch.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert "QVdTOnBhc3N3b3Jk" in (folder / "login/config.json").read_text()
    os.kill(process.pid, number)
    process.communicate(timeout=300)  # ends when the push, which holds its stderr, has ended too
    assert process.returncode == 128 + number
    assert list(desk.scratch.iterdir()) == []
