"""A PATH for ./build_and_push.sh that holds the tools it is written for, and no Python."""

from __future__ import annotations

import shutil
from pathlib import Path

SHELL = ["bash", "env", "sh"]
COREUTILS = ["cat", "cut", "date", "dirname", "head", "mkdir", "mkfifo", "mktemp", "paste", "rm"]
COREUTILS += ["sha256sum", "sleep", "sort", "tail", "tee", "touch"]
OTHERS = ["awk", "find", "git", "grep", "sed", "xargs"]


def bare_path(folder: Path) -> Path:
    """Links in `folder` to those tools.

    Raises:
        FileNotFoundError: one of them is not on this machine.
    """
    for name in [*SHELL, *COREUTILS, *OTHERS]:
        found = shutil.which(name)
        if found is None:
            raise FileNotFoundError(name)
        (folder / name).symlink_to(found)
    return folder
