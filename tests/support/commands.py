"""prepare_dataset.py as a function, and what lies in a folder before and after it."""

from __future__ import annotations

from pathlib import Path

import prepare_dataset


def run(*arguments: object) -> int:
    return prepare_dataset.main([str(argument) for argument in arguments])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
