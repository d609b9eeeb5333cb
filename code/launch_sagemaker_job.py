#!/usr/bin/env python3
"""Front door on your machine: launch a training job, watch it, fetch what it made.

Needs boto3 and pyyaml (`pip install boto3 pyyaml`) and nothing else.
"""

import sys

from brain_to_text.command_line import require, run

require("boto3 yaml", "type `pip install boto3 pyyaml`")

import argparse
import difflib
import json
import typing
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, TextIO, get_args, get_origin

from brain_to_text.config_reader import resolve_key, split_overrides
from brain_to_text.errors import BrainToTextError, ConfigError
from brain_to_text.launch.account import AwsAccount
from brain_to_text.launch.fetch import fetch
from brain_to_text.launch.jobs import EXIT_CODES, job_state, list_jobs, release_job, stop_job
from brain_to_text.launch.pricing import estimate
from brain_to_text.launch.request import OUTPUT_PREFIX, JobSettings
from brain_to_text.launch.submit import launch_training_job, preflight, prepare, submit
from brain_to_text.launch.watch import watch
from brain_to_text.redaction import one_line, redact

__all__ = ["launch_training_job", "main"]

COMMAND = "python code/launch_sagemaker_job.py"
JOBS_FOLDER = Path(__file__).resolve().parent.parent / ".local" / "jobs"


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
    action = parser.add_argument_group("what to do (default: check, then launch)")
    one = action.add_mutually_exclusive_group()
    one.add_argument("--check", action="store_true", help="check only; launch nothing")
    one.add_argument(
        "--dry-run", action="store_true", help="print request and price; ask AWS nothing"
    )
    one.add_argument("--watch", metavar="JOB", help="follow a job that runs")
    one.add_argument("--describe", metavar="JOB", help="print what SageMaker knows about a job")
    one.add_argument("--stop", metavar="JOB", help="stop a job; it saves a checkpoint first")
    one.add_argument("--release", metavar="JOB", help="give back the instances it keeps warm")
    one.add_argument("--list", action="store_true", help="list this project's latest jobs")
    one.add_argument("--fetch", metavar="JOB", help="download what a job left, show its results")
    action.add_argument("--to", metavar="FOLDER", help="where --fetch puts it [.local/jobs/JOB]")
    action.add_argument("--wait", action="store_true", help="after launching, follow to the end")
    action.add_argument("--skip-checks", action="store_true", help="launch without checking")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 success, 1 an error to act on, 2 wrong usage; with --wait or --watch 3 for a failed job,
        4 for a stopped one, 130 when you stopped watching.
    """
    parser = build_parser()
    options, extra = parser.parse_known_args(arguments)
    for word in extra:
        if word.startswith("--") and "." not in word:
            _refuse_misspelt(word[2:].partition("=")[0], parser)
    elsewhere = ("watch", "describe", "stop", "release", "list", "fetch")
    launching = not any(getattr(options, name) for name in elsewhere)
    if launching and not options.s3_bucket:
        parser.error("--s3-bucket is needed to launch a job")
    try:
        settings = job_settings(options, split_overrides(extra))
    except ConfigError as error:
        parser.error(one_line(str(error)))
    if options.to and not options.fetch:
        parser.error("--to says where --fetch JOB puts what it downloads: give both")
    if options.wait and (options.check or options.dry_run or not launching):
        parser.error("--wait follows a job that is launched: --watch JOB follows one that runs")
    try:
        if options.dry_run:
            return _dry_run(settings)
        account = AwsAccount(options.region, options.profile)
        if launching:
            return _launch(settings, options, account)
        return _existing_job(options, account)
    except BrainToTextError as error:
        _say(f"{parser.prog}: {error}", file=sys.stderr)
        return 1


def _say(*lines: str, file: TextIO | None = None) -> None:
    """Print lines without secrets: a service may repeat one."""
    print(*map(one_line, lines), sep="\n", file=file, flush=True)


def _dry_run(settings: JobSettings) -> int:
    """The request on standard output, what it would cost on standard error."""
    job = prepare(settings)
    print(json.dumps(job.request, indent=2))
    _say(
        *estimate(job.config, settings.instance_type, settings.instance_count).lines(),
        "Not checked: role, image, bucket, quota (use --check)",
        file=sys.stderr,
    )
    return 0


def _launch(settings: JobSettings, options: argparse.Namespace, account: AwsAccount) -> int:
    job = prepare(settings, account)
    if options.check or not options.skip_checks:
        report = preflight(job, account)
        _say(*report.lines(), file=sys.stderr)
        if report.of("error"):
            if not options.check:
                _say("Nothing was launched: correct the errors, or use --skip-checks.")
            return 1
    elif job.image_found:
        _say(job.image_found, file=sys.stderr)
    if options.check:
        return 0
    submit(job, account)
    _say(f"Launched {job.name}; outputs go to {job.output_uri}")
    if settings.debug_shell:
        target = f"sagemaker-training-job:{job.name}_algo-1"
        _say(f"A shell in it, once it runs: aws ssm start-session --target {target}")
    if options.wait:
        return _follow(job.name, account)
    _say(f"Follow it: {COMMAND} --watch {job.name}")
    return 0


def _existing_job(options: argparse.Namespace, account: AwsAccount) -> int:
    if options.watch:
        return _follow(options.watch, account)
    if options.describe:
        state = job_state(options.describe, account)
        print(redact(json.dumps(state.request, indent=2, default=str)))
        _say(*state.summary(), file=sys.stderr)
    elif options.stop:
        stop_job(options.stop, account)
        _say(f"Stopping {options.stop}: it saves a checkpoint and ends within two minutes.")
    elif options.release:
        release_job(options.release, account)
        _say(f"The instances that {options.release} kept warm are given back.")
    elif options.list:
        _say(*list_jobs(account) or ["No training jobs of this project yet."])
    else:
        name, prefix = options.fetch, options.output_prefix or OUTPUT_PREFIX
        folder = Path(options.to) if options.to else JOBS_FOLDER / name
        _say(*fetch(name, account, folder, s3_bucket=options.s3_bucket, output_prefix=prefix))
    return 0


def _follow(name: str, account: AwsAccount) -> int:
    try:
        state = watch(name, account)
    except KeyboardInterrupt:
        _say(
            "",
            f"{name} goes on without you: come back with `{COMMAND} --watch {name}`, "
            f"stop it with `{COMMAND} --stop {name}`.",
            file=sys.stderr,
        )
        return 130
    _say(*state.summary())
    if state.status == "Completed":
        _say(f"Fetch it: {COMMAND} --fetch {name}")
    return EXIT_CODES.get(state.status, EXIT_CODES["Failed"])


def job_settings(options: argparse.Namespace, changes: dict[str, str]) -> JobSettings:
    """The options given, as settings of a job."""
    names = [entry.name for entry in fields(JobSettings) if entry.name != "overrides"]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    for name in ("tags", "environment"):
        if name in given:
            keys = [key for key, _ in given[name]]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            if twice:
                option = "--tag" if name == "tags" else "--env"
                raise ConfigError(f"{option} {twice[0]} is given twice: give it once.")
            given[name] = dict(given[name])
    for name in ("subnets", "security_group_ids"):
        if name in given:
            given[name] = tuple(given[name])
    return JobSettings(**{"s3_bucket": "", **given}, overrides=changes)


def _refuse_misspelt(name: str, parser: argparse.ArgumentParser) -> None:
    """Usage error when `name` is no training setting but almost an option of this command."""
    try:
        resolve_key(name)
    except ConfigError:
        flags = [flag[2:] for flag in parser._option_string_actions if flag.startswith("--")]
        close = difflib.get_close_matches(name, flags, n=1, cutoff=0.75)
        if close:
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
    sys.exit(run(main))
