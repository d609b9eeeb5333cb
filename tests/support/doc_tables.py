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
    """Every GPU type that the image can use with its figures; by name where no price is known."""
    config = load_config(CODE_FOLDER / DEFAULT_CONFIG)
    header = ["type", "GPUs", "RAM", "per hour", "150,000 steps", "cost"]
    rows, unknown, measured = [header, ["---"] * len(header)], [], []
    for name, row in instance_types().items():
        if row.gpu is None or GPUS[row.gpu].capability < OLDEST_CAPABILITY:
            continue
        made = estimate(config, name)
        if made.measured:
            measured.append(name)
        if made.usd is None:
            unknown.append(f"`{name}`")
            continue
        cells = [f"`{name}`", f"{row.gpus} x {row.gpu} {GPUS[row.gpu].memory_gib:g} GiB"]
        cells += [f"{row.ram_gib} GiB", f"${made.usd_per_hour:.2f}"]
        rows.append([*cells, f"{made.hours:.1f} h", f"${made.usd:.0f}"])
    lines = ["| " + " | ".join(line) + " |" for line in rows]
    said = f"Measured on a GPU: {', '.join(measured) or 'no figure in this table'}."
    return "\n".join([*lines, "", said, f"No price is known here of {', '.join(unknown)}."])


def filled(text: str) -> str:
    """The guide's text with its table of instances made anew."""
    marked = re.compile(r"(<!-- table instances -->\n).*?(<!-- end -->)", re.DOTALL)
    return marked.sub(lambda match: f"{match[1]}{instance_table()}\n{match[2]}", text)


if __name__ == "__main__":
    GUIDE.write_text(filled(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
