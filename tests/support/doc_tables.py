"""Tables of the guide that are made from the code, so that they cannot say anything else.

`python tests/support/doc_tables.py` (with code/ and tests/ on the path) writes them into
code/README_SAGEMAKER.md, between <!-- table NAME --> and <!-- end -->.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from brain_to_text.config import TrainingConfig
from brain_to_text.config_reader import load_config
from brain_to_text.gpus import OLDEST_CAPABILITY
from brain_to_text.launch.pricing import estimate, gpu_of, table
from brain_to_text.launch.request import CODE_FOLDER, DEFAULT_CONFIG

GUIDE = CODE_FOLDER / "README_SAGEMAKER.md"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def value_of(config: TrainingConfig, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = None if value is None else getattr(value, name)
    return value


def shown(value: Any) -> str:
    if value is None:
        return "null"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def instance_table() -> str:
    """GPU types with a known price, by number and kind of GPUs; the smallest with its figures."""
    config = load_config(CODE_FOLDER / DEFAULT_CONFIG)
    rows: dict[tuple[str, int, str], list[str]] = {}
    for name, row in table()["types"].items():
        gpu, family = gpu_of(name), name.split(".")[1]
        if gpu is None or gpu.capability < OLDEST_CAPABILITY:
            continue
        known = rows.get((family, row["gpus"], row["gpu"]))
        if known is not None:
            known[0] += f", {name.split('.')[2]}"
            continue
        made = estimate(config, name)
        if made.usd is None or made.usd_per_hour is None:
            continue
        rows[family, row["gpus"], row["gpu"]] = [
            f"`{name}`",
            f"{row['gpus']} x {row['gpu']} {gpu.memory_gib:g} GiB",
            *(f"{row['ram_gib']} GiB", f"${made.usd_per_hour:.2f}"),
            *(f"{made.hours:.1f} h", f"${made.usd:.0f}"),
            "measured" if made.measured else "estimate",
        ]
    header = ["type (and larger)", "GPUs", "RAM", "per hour", "150,000 steps", "cost", "basis"]
    return markdown(header, list(rows.values()))


TABLES: dict[str, Callable[[], str]] = {
    "instances": instance_table,
}


def filled(text: str) -> str:
    """The guide's text with every marked table made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if match := pattern.search(text):
            text = f"{text[: match.end(1)]}{make()}\n{text[match.start(2) :]}"
    return text


if __name__ == "__main__":
    path = Path(GUIDE)
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
