#!/usr/bin/env python3
"""Make .venv at the repository's top, or bring it up to date: standard library only.

    python3 tests/set_up.py

Does nothing when .venv already matches tests/requirements.txt. Needs Python >= 3.11 with venv, a C
compiler and Python's headers (the toolkit has a C extension), and a package index.

Environment: TORCH_INDEX_URL, an index to take torch from. Without it: a CPU wheel where this
machine offers one or has no NVIDIA GPU, else the package index's own build (on Linux with CUDA:
several GB).
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "code"))

from brain_to_text.command_line import require

require()
ENVIRONMENT = REPOSITORY / ".venv"
REQUIREMENTS = REPOSITORY / "tests" / "requirements.txt"
STAMP = ENVIRONMENT / "set-up-stamp"
TORCH = "torch==2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main() -> int:
    """Make the environment or bring it up to date; 0, or 1 after one sentence."""
    wanted = fingerprint()
    try:
        with exclusive("set-up"):
            if STAMP.exists() and STAMP.read_text() == wanted:
                return 0
            missing = lacking()
            if missing:
                say(f"{missing}, then run this again.")
                return 1
            say("Setting up .venv (once; a few minutes) ...")
            if not (ENVIRONMENT / "bin" / "python").exists() and not make_environment():
                return 1
            if not install():
                say("Setting up .venv failed: the lines above say which package and why.")
                return 1
            STAMP.write_text(wanted)
            say("Set up .venv.")
    except KeyboardInterrupt:
        say("\nStopped: .venv is not finished; run this again to go on.")
        return 130
    return 0


def make_environment() -> bool:
    """An empty environment with pip; False after one sentence, and nothing is there then."""
    try:
        venv.create(ENVIRONMENT, with_pip=True, symlinks=True)
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        say(f".venv cannot be made ({error}): install Python's venv (Debian: python3-venv).")
        return False
    return True


def lacking() -> str:
    """What to install before a package with a C extension can be built; "" for nothing."""
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return "A C compiler is needed: install one (Debian: gcc; macOS: xcode-select --install)"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        return f"Python's headers are needed in {headers}: install them (Debian: python3-dev)"
    return ""


def fingerprint() -> str:
    """Changes when the requirements, torch or Python's minor version change."""
    digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    return f"{sys.version_info.major}.{sys.version_info.minor} {TORCH} {digest}\n"


def install() -> bool:
    """Install torch, then everything else; False if a step failed."""
    return install_torch() and pip("install", "--quiet", "-r", str(REQUIREMENTS))


def install_torch() -> bool:
    """Install torch from where it is right for this machine; see the module's docstring."""
    if pip("show", "--quiet", "torch", quiet=True) and pip("install", "--quiet", TORCH, quiet=True):
        return True
    index = os.environ.get("TORCH_INDEX_URL")
    if index:
        return pip("install", "--quiet", "--index-url", index, TORCH)
    if pip("install", "--quiet", f"{TORCH}+cpu", quiet=True):
        return True
    if sys.platform == "linux" and shutil.which("nvidia-smi") is None:
        only_cpu = ("install", "--quiet", "--retries", "1", "--no-deps", "--index-url")
        if pip(*only_cpu, TORCH_CPU_INDEX, TORCH, quiet=True):
            return True
    return pip("install", TORCH)


def pip(*arguments: str, quiet: bool = False) -> bool:
    """Run the environment's pip; True on success."""
    # with that variable pip leaves out the bytecode, and every process compiles torch anew
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", *arguments],
        env=environment,
        check=False,
        stdout=subprocess.DEVNULL if quiet else sys.stderr,
        stderr=subprocess.DEVNULL if quiet else None,
    )
    return done.returncode == 0


@contextlib.contextmanager
def exclusive(work: str) -> Iterator[None]:
    """One process at a time does this work: a second one waits, then finds it done."""
    folder = REPOSITORY / ".local"
    folder.mkdir(exist_ok=True)
    with (folder / f"{work}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
