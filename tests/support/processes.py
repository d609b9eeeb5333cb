"""Processes that tests start: how they heed signals, how they end."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any


def stop(process: subprocess.Popen[Any], seconds: float, *, group: bool = False) -> None:
    """SIGTERM, and SIGKILL to what has not ended after `seconds`; returns when it has.

    Args:
        group: the process leads a group of its own, whose members end with it.
    """

    def send(number: int) -> None:
        if group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)

    try:
        send(signal.SIGTERM)
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        send(signal.SIGKILL)
        process.wait()
    except ProcessLookupError:
        process.wait()


def heed_signals() -> None:
    """For `preexec_fn`: as at a terminal; a background job hands SIGINT and SIGHUP down ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def hold(path: str) -> None:
    """For a worker: write a dot to a pipe, and keep it open until the process is ended."""
    with Path(path).open("wb", buffering=0) as pipe:
        pipe.write(b".")
        signal.pause()
