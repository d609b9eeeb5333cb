"""The guide's table of instances, made from the code, so that it cannot say anything else.

`python tests/support/doc_tables.py` (with code/ and tests/ on the path) writes it into
code/README_SAGEMAKER.md, between <!-- table instances --> and <!-- end -->.
"""

from __future__ import annotations

import re

from brain_to_text.config_reader import load_config
from brain_to_text.gpus import GPUS, OLDEST_CAPABILITY
from brain_to_text.launch.pricing import estimate, instance_types
from brain_to_text.launch.request import CODE_FOLDER, DEFAULT_CONFIG

GUIDE = CODE_FOLDER / "README_SAGEMAKER.md"


def instance_table() -> str:
    """GPU types with a known price, by number and kind of GPUs; the smallest with its figures."""
    config = load_config(CODE_FOLDER / DEFAULT_CONFIG)
    rows: dict[tuple[str, int, str], list[str]] = {}
    for name, row in instance_types().items():
        if row.gpu is None or GPUS[row.gpu].capability < OLDEST_CAPABILITY:
            continue
        _, family, size = name.split(".")
        made, kind = estimate(config, name), (family, row.gpus, row.gpu)
        if kind in rows:
            rows[kind][0] += f", {size}"
        elif made.usd is not None:
            rows[kind] = [
                f"`{name}`",
                f"{row.gpus} x {row.gpu} {GPUS[row.gpu].memory_gib:g} GiB",
                *(f"{row.ram_gib} GiB", f"${made.usd_per_hour:.2f}"),
                *(f"{made.hours:.1f} h", f"${made.usd:.0f}"),
                "measured" if made.measured else "estimate",
            ]
    header = ["type (and larger)", "GPUs", "RAM", "per hour", "150,000 steps", "cost", "basis"]
    lines = [header, ["---"] * len(header), *rows.values()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def filled(text: str) -> str:
    """The guide's text with its table of instances made anew."""
    marked = re.compile(r"(<!-- table instances -->\n).*?(<!-- end -->)", re.DOTALL)
    return marked.sub(lambda match: f"{match[1]}{instance_table()}\n{match[2]}", text)


if __name__ == "__main__":
    GUIDE.write_text(filled(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
