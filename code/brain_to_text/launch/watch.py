"""Follow a job: phases as they change, log lines as they arrive, a bar with what is left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TextIO

from botocore.exceptions import ClientError

from ..errors import JobError
from ..log_lines import best_validation, error_rate, read_line, total_steps
from ..redaction import one_line
from .account import NO_ANSWER, AwsAccount, error_code
from .account_checks import LOG_GROUP
from .jobs import JobState, duration, job_state

BAR_CELLS = 24
POLL_SECONDS = 10.0
PATIENCE = 10  # failed polls in a row before giving up watching; the job is not affected


def new_lines(job_name: str, account: AwsAccount, tokens: dict[str, str]) -> Iterator[str]:
    """Lines that every host of a job has logged since the last call; each host's in their order.

    Args:
        tokens: by log stream, how far it was read; {} before the first call, kept up to date here.

    Yields:
        Lines of the first host as they are, those of further hosts after the host's name.
    """
    logs, prefix = account.client("logs"), f"{job_name}/"
    try:
        pages = logs.get_paginator("describe_log_streams").paginate(
            logGroupName=LOG_GROUP, logStreamNamePrefix=prefix
        )
        streams = [stream["logStreamName"] for page in pages for stream in page["logStreams"]]
    except ClientError as error:
        if error_code(error) == "ResourceNotFoundException":
            return  # no job has ever logged in this region
        raise
    for stream in streams:
        # streams are named JOB/algo-2-1700000000
        host = stream.removeprefix(prefix).rpartition("-")[0]
        while True:
            arguments = {"logGroupName": LOG_GROUP, "logStreamName": stream}
            if stream in tokens:
                arguments["nextToken"] = tokens[stream]
            answer = logs.get_log_events(startFromHead=True, **arguments)
            for event in answer["events"]:
                line = one_line(event["message"].rstrip("\r\n"))
                yield line if host in ("algo-1", "") else f"{host}: {line}"
            before, tokens[stream] = tokens.get(stream), answer["nextForwardToken"]
            if before == tokens[stream] or not answer["events"]:
                break


def watch(
    name: str,
    account: AwsAccount,
    *,
    out: TextIO | None = None,
    bar: TextIO | None = None,
) -> JobState:
    """Show a job until it ends; returns its last state.

    Args:
        name: the training job.
        account: where it runs.
        out: phases and log lines; standard output by default.
        bar: where the progress bar is redrawn; standard error by default, and only on a terminal.

    Raises:
        JobError: no such job, or AWS could not be asked ten times in a row.
        KeyboardInterrupt: Ctrl-C; the job is not affected.
    """
    out, bar = out or sys.stdout, bar or sys.stderr
    progress, tokens = Progress(), dict[str, str]()
    shown, failures = 0, 0
    state, fresh = job_state(name, account), True
    while True:
        lines = []
        try:
            state = state if fresh else job_state(name, account)
            fresh = False
            # after the state: what was logged before the end is read before leaving
            lines = list(new_lines(name, account, tokens))
            failures = 0
        except (*NO_ANSWER, JobError) as error:  # the job may be perfectly well
            failures += 1
            if failures == PATIENCE:
                raise JobError(
                    f"AWS could not be asked about {name} {PATIENCE} times in a row ({error}): the "
                    f"job is not affected; come back with --watch {name}."
                ) from error
            if failures == 1:
                print(one_line(f"Lost sight of {name} for a moment: {error}"), file=bar, flush=True)
        _redraw(bar, "")
        for started, phase, message in state.transitions[shown:]:
            print(one_line(f"{started:%H:%M:%S} {phase}: {message}"), file=out, flush=True)
        shown = len(state.transitions)
        for line in lines:
            progress.read(line)
            print(line, file=out, flush=True)
        if state.is_final and not failures:
            return state
        _redraw(bar, progress.bar() if progress.train else state.status)
        time.sleep(POLL_SECONDS)


@dataclass
class Progress:
    """What the log lines so far say.

    Attributes:
        total_steps: of the whole run; None until known.
        train: numbers of the last training line, {} before the first.
        validations: numbers of every validation, in order.
    """

    total_steps: int | None = None
    train: dict[str, float] = field(default_factory=dict)
    validations: list[dict[str, float]] = field(default_factory=list)

    def read(self, line: str) -> None:
        """Take in one log line; lines that say nothing about progress change nothing."""
        self.total_steps = total_steps(line) or self.total_steps
        kind, numbers = read_line(line) or (None, {})
        if kind == "train":
            self.train = numbers
        elif kind == "validation":
            self.validations.append(numbers)

    def bar(self) -> str:
        """One line for the terminal: bar, step, loss, best error rate, time left."""
        steps = int(self.train.get("step", -1)) + 1
        if not self.total_steps:
            return f"step {steps:,}"
        share = min(steps / self.total_steps, 1.0)
        full = int(share * BAR_CELLS)
        parts = [f"[{'#' * full}{'-' * (BAR_CELLS - full)}] {100 * share:.0f}%"]
        parts.append(f"step {steps:,}/{self.total_steps:,}")
        if "loss" in self.train:
            parts.append(f"loss {self.train['loss']:.2f}")
        if rate := error_rate(best_validation(self.validations) or {}):
            parts.append(f"best {rate[0]} {rate[1]:.4f}")
        if "seconds_per_step" in self.train:
            seconds = (self.total_steps - steps) * self.train["seconds_per_step"]
            parts.append(f"{duration(seconds)} left")
        return "  ".join(parts)


def _redraw(stream: TextIO, text: str) -> None:
    """Replace the line that the cursor is on, on terminals only."""
    if stream.isatty():
        stream.write(f"\r\x1b[K{text}")
        stream.flush()
