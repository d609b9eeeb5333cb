#!/usr/bin/env python3
"""Front door on your machine: launch a training job, watch it, fetch what it made.

Needs boto3, pyyaml and the SageMaker SDK (`pip install 'sagemaker<3' boto3 pyyaml`); not torch.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import typing
from dataclasses import MISSING, fields
from typing import Any, Literal, get_args, get_origin

from brain_to_text.config import resolve_key
from brain_to_text.errors import BrainToTextError, ConfigError
from brain_to_text.launch import launch_training_job
from brain_to_text.sagemaker_job import JobSettings

__all__ = ["launch_training_job", "main"]


def build_parser() -> argparse.ArgumentParser:
    """One option per field of JobSettings, and what to do with them."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="Any training setting can be given by its dotted key: --model.n_units 768.",
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(JobSettings)
    job = parser.add_argument_group("the job")
    for entry in fields(JobSettings):
        flag = entry.metadata.get("flag", f"--{entry.name.replace('_', '-')}")
        if flag is not None:
            job.add_argument(flag, dest=entry.name, **_argument(entry, hints[entry.name]))
    where = parser.add_argument_group("where")
    where.add_argument("--region", help="AWS region; default: the standard AWS settings")
    where.add_argument("--profile", help="profile of the AWS configuration files")
    action = parser.add_argument_group("what to do (default: check, launch)")
    action.add_argument(
        "--dry-run", action="store_true", help="print the CreateTrainingJob request and stop"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 for success, 1 for an error the user can act on, 2 for wrong usage."""
    parser = build_parser()
    options, extra = parser.parse_known_args(arguments)
    try:
        settings = job_settings(options, overrides(extra, parser))
        if not options.s3_bucket:
            parser.error("--s3-bucket is needed to launch a job")
        job = launch_training_job(
            **settings, region=options.region, profile=options.profile, dry_run=options.dry_run
        )
        if options.dry_run:
            print(json.dumps(job.request, indent=2))
        else:
            print(f"Launched {job.name}; outputs go to {job.output_uri}")
    except BrainToTextError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def job_settings(options: argparse.Namespace, changes: dict[str, str]) -> dict[str, Any]:
    """The options given, as arguments of launch_training_job."""
    names = [entry.name for entry in fields(JobSettings) if entry.name != "overrides"]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    for name in ("tags", "environment"):
        if name in given:
            given[name] = dict(given[name])
    for name in ("subnets", "security_group_ids"):
        if name in given:
            given[name] = tuple(given[name])
    return {**given, "overrides": changes}


def overrides(extra: list[str], parser: argparse.ArgumentParser) -> dict[str, str]:
    """`--model.n_units 768 --seed=3` as {"model.n_units": "768", "seed": "3"}."""
    values: dict[str, str] = {}
    remaining = list(extra)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--") or len(word) < 3:
            parser.error(f"unexpected argument: {word}")
        name, equals, value = word[2:].partition("=")
        _refuse_misspelt(name, parser)
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                parser.error(f"--{name} needs a value (and is no option of this command)")
            value = remaining.pop(0)
        values[name] = value
    return values


def _refuse_misspelt(name: str, parser: argparse.ArgumentParser) -> None:
    """Usage error when `name` is no training setting but almost an option of this command."""
    try:
        resolve_key(name)
    except ConfigError:
        flags = [flag[2:] for flag in parser._option_string_actions if flag.startswith("--")]
        close = difflib.get_close_matches(name, flags, n=1, cutoff=0.75)
        if close and "." not in name:
            parser.error(f"unknown option --{name}: did you mean --{close[0]}?")


def _argument(entry: Any, hint: Any) -> dict[str, Any]:
    """argparse details for one field; None stands for "not given" so that defaults stay one."""
    shown = "" if entry.default in (MISSING, None, (), False, True) else f" [{entry.default}]"
    details: dict[str, Any] = {"help": entry.metadata["help"] + shown, "default": None}
    if hint is bool:
        return {**details, "action": argparse.BooleanOptionalAction}
    if get_origin(hint) is Literal:
        return {**details, "choices": get_args(hint)}
    if get_origin(hint) is tuple:
        return {**details, "nargs": "+", "metavar": "ID"}
    if "Mapping" in str(hint):
        return {**details, "action": "append", "type": _pair, "metavar": "NAME=VALUE"}
    simple = next((kind for kind in (int, float) if kind in (hint, *get_args(hint))), str)
    return {**details, "type": simple, "metavar": simple.__name__.upper()}


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE")
    return name, value


if __name__ == "__main__":
    sys.exit(main())
