"""Tables of the guide that are made from the code, so that they cannot say anything else.

`python tests/support/doc_tables.py` (with code/ and tests/ on the path) writes them into
code/README_SAGEMAKER.md, between <!-- table NAME --> and <!-- end -->.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from brain_to_text.config import TrainingConfig, config_keys
from brain_to_text.config_reader import LEGACY_KEYS, load_config
from brain_to_text.gpus import OLDEST_CAPABILITY
from brain_to_text.launch.pricing import estimate, gpu_of, table
from brain_to_text.launch.request import CODE_FOLDER, DEFAULT_CONFIG, JobSettings

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


def config_table() -> str:
    """Every configuration key, its default, the diphone file's value where it differs."""
    default, diphone = TrainingConfig(), load_config(CODE_FOLDER / DEFAULT_CONFIG)
    rows = []
    for path, _, entry in config_keys():
        base, ours = value_of(default, path), value_of(diphone, path)
        rows.append(
            [f"`{path}`", shown(base), shown(ours) if ours != base else "", entry.metadata["help"]]
        )
    return markdown(["key", "default", "diphone file", "meaning"], rows)


def legacy_table() -> str:
    return markdown(
        ["key", "instead"], [[f"`{key}`", legacy.reason] for key, legacy in LEGACY_KEYS.items()]
    )


def options_table() -> str:
    """Every launcher option."""
    rows = []
    for entry in fields(JobSettings):
        flag = entry.metadata.get("flag", f"--{entry.name.replace('_', '-')}")
        if flag is None:
            continue
        default = "" if entry.default in (MISSING, None, (), False) else f"`{entry.default}`"
        rows.append([f"`{flag}`", default, entry.metadata["help"]])
    return markdown(["option", "default", "meaning"], rows)


def instance_table() -> str:
    """GPU types the image supports, by number and kind of GPUs; the smallest with its figures."""
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
        dollars = "?" if made.usd is None else f"${made.usd:.0f}"
        hourly = "?" if made.usd_per_hour is None else f"${made.usd_per_hour:.2f}"
        first = table()["first_estimates"].get(name)
        early = f"{first['hours']} h, ${first['usd']}" if first else ""
        rows[family, row["gpus"], row["gpu"]] = [
            f"`{name}`",
            f"{row['gpus']} x {row['gpu']} {gpu.memory_gib:g} GiB",
            *(f"{row['ram_gib']} GiB", hourly, f"{made.hours:.1f} h", dollars),
            *("measured" if made.measured else "estimate", early),
        ]
    header = ["type (and larger)", "GPUs", "RAM", "per hour", "150,000 steps", "cost", "basis"]
    return markdown([*header, "first estimate"], list(rows.values()))


TABLES: dict[str, Callable[[], str]] = {
    "configuration": config_table,
    "legacy": legacy_table,
    "options": options_table,
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
