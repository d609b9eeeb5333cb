"""The hook between the toolkit and the trainer: commands, GPUs, failure texts, signals."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import toolkit_hook as hook
from sagemaker_training import errors
from support.container_job import write_configuration

TRACEBACK = """\
Traceback (most recent call last):
  File "train.py", line 5, in <module>
    raise RuntimeError("the bolts came off")
RuntimeError: the bolts came off"""

TORCHRUN = """\
Traceback (most recent call last):
  File "run.py", line 9, in main
    run(args)
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
train.py FAILED"""


def test_every_host_meets_the_first_and_knows_its_rank():
    for rank, host in enumerate(("algo-1", "algo-2")):
        command = hook.trainer_command(
            ["t.py"], hosts=["algo-2", "algo-1"], current_host=host, processes_per_host=1
        )
        assert command[1:3] == ["-m", "torch.distributed.run"] and command[-1] == "t.py"
        assert {f"--node-rank={rank}", "--master-addr=algo-1", "--nnodes=2"} <= set(command)


@pytest.mark.parametrize(
    ("gpus", "asked", "processes"),
    [(0, "", 1), (4, "", 4), (0, "2", 2), (4, "1", 1), (0, "0", None), (0, "two", None)],
)
def test_processes_per_host(gpus, asked, processes):
    if processes:
        assert hook.processes_per_host(gpus, {hook.PROCESSES_VARIABLE: asked}) == processes
    else:
        with pytest.raises(errors.ClientError, match=hook.PROCESSES_VARIABLE):
            hook.processes_per_host(gpus, {hook.PROCESSES_VARIABLE: asked})


WORKER = "\n".join(f"[rank0]: {line}" for line in TRACEBACK.splitlines())
PRINTED = "Prefix s3://b/p has no sessions: check --s3-data-prefix."


@pytest.mark.parametrize(
    ("stderr", "code", "text"),
    [
        (f"ERROR: {PRINTED}\nERROR: torch: peers are gone\n{TRACEBACK}", 1, PRINTED),
        (f"noise\n{TRACEBACK}", 1, f"RuntimeError: the bolts came off\n\n{TRACEBACK}"),
        (f"{WORKER}\n{TORCHRUN}", 1, f"RuntimeError: the bolts came off\n\n{TRACEBACK}"),
        ("one\ntwo", 1, "two\n\none\ntwo"),
        ("", 3, "The trainer ended with exit code 3."),
        ("", -signal.SIGSEGV, "The trainer was ended by SIGSEGV."),
    ],
)
def test_the_best_reason_there_is_becomes_the_failure_text(stderr, code, text):
    assert hook.failure_text(stderr.splitlines(), code) == text


def test_a_kill_names_memory():
    assert "out of memory: lower dataset.cache_gb" in hook.failure_text([], -signal.SIGKILL)


# --- under the real toolkit

PROGRAM = """
import os, signal, sys, time
mode = sys.argv[sys.argv.index("--mode") + 1]
rank = os.environ.get("RANK", "0")
base = os.environ["SAGEMAKER_BASE_DIR"]
open(f"{base}/started{rank}", "w").write(" ".join(sys.argv[1:]))
if mode == "raise":
    raise RuntimeError("the bolts came off")
if mode == "sentence":
    open(os.environ["SM_OUTPUT_DIR"] + "/failure", "w").write("One clear sentence.")
    sys.exit(1)
if mode == "full":  # the output volume is, before the sentence can be written
    try:
        with open(os.environ["SM_OUTPUT_DIR"] + "/big", "wb", buffering=0) as big:
            while True:
                big.write(b"x" * 1024)
    except OSError:
        open(os.environ["SM_OUTPUT_DIR"] + "/failure", "w").close()
        print("ERROR: The output volume is full.", file=sys.stderr)
        sys.exit(1)
if mode == "import":
    time.sleep(600)
if mode == "wait":
    def stop(*_):
        open(os.environ["SM_CHECKPOINT_DIR"] + f"/saved{rank}", "w").close()
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    open(f"{base}/listening{rank}", "w").close()
    time.sleep(600)
"""


@pytest.fixture
def toolkit(tmp_path):
    """Start the toolkit's `train` on a folder shaped like /opt/ml holding PROGRAM."""
    base = tmp_path / "ml"
    (base / "code").mkdir(parents=True)
    (base / "code" / "program.py").write_text(textwrap.dedent(PROGRAM))
    write_configuration(base, {}, ["localhost"], "localhost")
    started = []

    def start(mode: str, processes: int = 1, **more: str) -> tuple[subprocess.Popen, Path]:
        settings = {"mode": mode, "flag": "true", **more}
        (base / "input/config/hyperparameters.json").write_text(json.dumps(settings))
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("train"))],
            env={
                **os.environ,
                "SAGEMAKER_BASE_DIR": str(base),
                "SAGEMAKER_PROGRAM": "program.py",
                "SAGEMAKER_TRAINING_MODULE": "toolkit_hook:run_trainer",
                "PYTHONPATH": str(Path(hook.__file__).parent),
                hook.PROCESSES_VARIABLE: str(processes),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process, base

    start.base = base
    yield start
    for process in started:
        process.kill()
        process.communicate()
    subprocess.run(["umount", str(base / "output")], stderr=subprocess.DEVNULL, check=False)


@pytest.mark.parametrize(
    ("mode", "failure"),
    [("raise", "RuntimeError: the bolts came off\n"), ("sentence", "One clear sentence.")],
)
def test_a_failure_leaves_its_reason_and_a_non_zero_exit(toolkit, mode, failure):
    process, base = toolkit(mode)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output
    assert (base / "output" / "failure").read_text().startswith(failure)


@pytest.mark.parametrize(
    ("asked", "refused"),
    [
        ({"program": "mine.py"}, "The job's sagemaker_program is mine.py, and this"),
        (
            {"program": "program.py", "submit_directory": "s3://b/source.tar.gz"},
            "The job's sagemaker_submit_directory is s3://b/source.tar.gz, and this",
        ),
        ({"program": "program.py"}, None),
    ],
)
def test_a_job_for_another_program_is_refused_in_one_sentence(toolkit, asked, refused):
    process, base = toolkit("fine", **{f"sagemaker_{name}": v for name, v in asked.items()})
    output, _ = process.communicate(timeout=300)
    assert process.returncode == (1 if refused else 0), output
    failure = base / "output" / "failure"
    if refused:
        assert not (base / "started0").exists()
        (sentence,) = failure.read_text().splitlines()
        assert sentence.startswith(refused)
    else:  # hyperparameters are its arguments
        assert (base / "started0").read_text() == "--flag True --mode fine"
        assert not failure.exists()


def mount(folder: Path, *options: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a small volume")
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], check=True)


def test_a_full_output_volume_still_leaves_its_reason(toolkit):
    mount(toolkit.base / "output", "-o", "size=128k")
    process, base = toolkit("full")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output
    assert (base / "output" / "failure").read_text() == "The output volume is full."
    assert sorted(path.name for path in (base / "output").iterdir()) == ["big", "failure"]


def test_an_output_volume_that_cannot_be_written_is_a_failure_in_words(toolkit):
    mount(toolkit.base / "output", "-o", "ro")
    process, _ = toolkit("raise")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output
    assert "RuntimeError: the bolts came off" in output
    assert "output/failure cannot be written" in output


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_reaches_every_trainer_process(toolkit, processes):
    process, base = toolkit("wait", processes)
    _await(lambda: len(list(base.glob("listening*"))) == processes)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert len(list((base / "checkpoints").glob("saved*"))) == processes
    assert not (base / "output" / "failure").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_before_the_trainer_listens_is_no_failure(toolkit, processes):
    process, base = toolkit("import", processes)
    _await(lambda: len(list(base.glob("started*"))) == processes)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert not (base / "output" / "failure").exists()


def test_a_stop_that_finds_only_torchrun_is_no_failure(toolkit):
    process, base = toolkit("fine", 2)
    _await(lambda: "torch.distributed.run" in _children_of(process.pid))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert not (base / "output" / "failure").exists()


def _children_of(pid: int) -> str:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return " ".join(Path(f"/proc/{child}/cmdline").read_text() for child in children)


def _await(condition, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
