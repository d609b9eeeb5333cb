#!/usr/bin/env python3
"""Make .venv at the repository's top, or bring it up to date: standard library only.

    python3 tests/set_up.py

Does nothing when .venv already matches tests/requirements.txt. Needs Python >= 3.11 with venv, a C
compiler and Python's headers (the toolkit has a C extension), and a package index.

Environment: TORCH_INDEX_URL, an index to take torch from. Without it: a CPU wheel where this
machine offers one or has no NVIDIA GPU, else the package index's own build (on Linux with CUDA:
several GB).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
ENVIRONMENT = REPOSITORY / ".venv"
REQUIREMENTS = REPOSITORY / "tests" / "requirements.txt"
STAMP = ENVIRONMENT / "set-up-stamp"
TORCH = "torch==2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main() -> int:
    # the floor comes first: an old Python must see this sentence and not a syntax error later
    if sys.version_info < (3, 11):  # noqa: UP036
        print(f"Python 3.11 or newer is needed; {sys.executable} is {sys.version.split()[0]}.")
        return 1
    wanted = fingerprint()
    with exclusive():
        if STAMP.exists() and STAMP.read_text() == wanted:
            return 0
        say("Setting up .venv (once; a few minutes) ...")
        if not (ENVIRONMENT / "bin" / "python").exists():
            venv.create(ENVIRONMENT, with_pip=True, symlinks=True)
        if not install():
            say("Setting up .venv failed: the lines above say which package and why.")
            return 1
        STAMP.write_text(wanted)
        say("Set up .venv.")
    return 0


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
    if index := os.environ.get("TORCH_INDEX_URL"):
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
def exclusive() -> Iterator[None]:
    """One set-up at a time: a second one waits, then finds the work done."""
    folder = REPOSITORY / ".local"
    folder.mkdir(exist_ok=True)
    with (folder / "set-up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
