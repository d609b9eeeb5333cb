"""What every command does first and last: the Python it needs, its packages, its output.

Everything up to `require` must be read by Pythons as old as 3.6, here and in the front doors: no
`from __future__ import annotations`, no assignment inside an expression.
"""

import os
import signal
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, TextIO

OLDEST = (3, 11)
INTERRUPTIBLE = ("evaluate_model.py", "prepare_dataset.py", "launch_sagemaker_job.py")


def require(packages: str = "", remedy: str = "") -> None:
    """End the process with one sentence if Python is too old or a package is not installed.

    Args:
        packages: names to import, with spaces between them.
        remedy: what to type where one is missing.
    """
    program = os.path.relpath(sys.argv[0])
    if os.path.split(program)[1] in INTERRUPTIBLE:
        signal.signal(signal.SIGINT, _stop)  # until `run`, packages are being imported
    if sys.version_info < OLDEST:
        sys.exit(
            f"Python 3.11 or newer is needed, and {sys.executable} is {sys.version.split()[0]}: "
            f"type `python3.12 {program}` (local_run.sh, tests/run.sh: PYTHON=python3.12)."
        )
    missing = [name for name in packages.split() if find_spec(name) is None]
    if missing:
        sys.exit(
            f"Python packages that {program} needs are not installed for {sys.executable} "
            f"({', '.join(missing)}): {remedy}."
        )


def _stop(*_: "Any") -> None:
    """Ctrl-C during imports, which no command can handle: end at once, nothing has begun."""
    os.write(2, b"Stopped by Ctrl-C.\n")
    os._exit(130)


def run(main: "Callable[[], int]") -> int:
    """Call a command's `main`; its exit code, or 1 with one sentence where its output is lost.

    A reader that left (`… | head`) is no error to speak of.
    """
    from .errors import OutputError

    if sys.stdout is None:
        print("ERROR: Standard output is closed: send it to a file or terminal.", file=sys.stderr)
        return 1
    sys.stdout = _Output(sys.stdout)  # type: ignore[assignment]
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            return main()
        finally:  # also after a help text
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except OutputError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 1


class _Output:
    """Standard output whose failures are told from those of other files; the rest is discarded."""

    def __init__(self, stream: "TextIO") -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> "Any":
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._failing():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._failing():
            self._stream.flush()

    @contextmanager
    def _failing(self) -> "Iterator[None]":
        from .errors import OutputError

        try:
            yield
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if isinstance(error, BrokenPipeError):
                raise
            raise OutputError(
                f"Standard output cannot be written ({error}): free space, or send it elsewhere."
            ) from error
