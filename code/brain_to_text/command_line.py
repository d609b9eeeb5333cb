"""What every command does with its output."""

from __future__ import annotations

import os
import sys


def discard_output() -> int:
    """After a BrokenPipeError (`… | head`): let what is left to print go nowhere; the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
