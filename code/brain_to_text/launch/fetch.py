"""Fetch what a job left: model and outputs, written without trusting their names."""

from __future__ import annotations

import gzip
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from botocore.exceptions import ClientError

from ..errors import JobError
from ..log_lines import VALIDATION_FIELDS, best_validation, rows_of_log
from ..storage.locations import s3_url, split_s3_url
from .account import AwsAccount, error_code, explained
from .jobs import job_state
from .request import OUTPUT_PREFIX

MAX_MEMBERS = 10_000
MAX_BYTES = 64 * 10**9
# a file that was found: its name and size, and what writes it to a path
Member = tuple[tarfile.TarInfo, Callable[[Path], object]]


def fetch(
    name: str,
    account: AwsAccount,
    folder: Path,
    *,
    s3_bucket: str | None = None,
    output_prefix: str = OUTPUT_PREFIX,
) -> list[str]:
    """Download and unpack what a job left, or its log so far while it runs.

    The folder then holds model/ (checkpoint/, training_log), output/, logs/ as far as they exist.

    Args:
        name: the training job.
        folder: where to put it; must not hold an earlier model.
        s3_bucket, output_prefix: where to look for a job that SageMaker does not know, e.g. one of
            another account.

    Returns:
        The result for people: table of validations, where the files are, what to do next.

    Raises:
        JobError: there is no such job and no output, the folder is in use, the archive is unsafe
            or damaged, or AWS refused.
    """
    trained_on = "YOUR-BUCKET", "YOUR-PREFIX"
    state = None
    if s3_bucket is not None:
        output_uri = s3_url(s3_bucket, output_prefix, name)
    else:
        state = job_state(name, account)
        output_uri, values = state.output_uri, state.request.get("HyperParameters", {})
        if "s3-bucket" in values:
            trained_on = values["s3-bucket"], values.get("s3-data-prefix", "")
    if (folder / "model").exists():
        raise JobError(f"{folder / 'model'} exists already: give another folder with --to.")
    bucket, prefix = split_s3_url(output_uri)
    s3, ended = account.client("s3"), state is not None and state.is_final
    why = state.why() if state is not None and ended else []
    has_model, _ = (
        _fetched(account, bucket, f"{prefix}/output/{part}", folder / part)
        for part in ("model", "output")
    )
    log = folder / "model" / "training_log"
    if not log.is_file():
        log = folder / "logs" / "training_log"
        if not _downloaded(s3, bucket, f"{prefix}/logs/training_log", log) and not has_model:
            if ended:
                raise JobError(f"{name} left nothing under {output_uri}. {' '.join(why)}")
            raise JobError(
                f"There is nothing under {output_uri} yet: watch the job with --watch {name}."
            )
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [*result_table(rows_of_log(text)), f"Files: {folder}", *why]
    if not has_model:
        after = f": {name} ended without one" if ended else f" yet; try again when {name} has ended"
        return [*lines, f"There is no model{after}."]
    lines.append(
        f"Evaluate: python code/evaluate_model.py --model {folder / 'model'} "
        f"--s3-bucket {trained_on[0]} --s3-data-prefix {trained_on[1]} --split val "
        f"--output-dir {folder / 'evaluation'}"
    )
    return lines


def _fetched(account: AwsAccount, bucket: str, key: str, folder: Path) -> bool:
    """Fetch a folder of the job, which is an archive in S3, or files where it asked for that.

    Returns:
        False where there is neither.

    Raises:
        JobError: see `unpack`, or AWS refused.
    """
    s3, prefix = account.client("s3"), f"{key}/"
    with tempfile.TemporaryDirectory() as temporary:
        archive = Path(temporary) / f"{folder.name}.tar.gz"
        if _downloaded(s3, bucket, f"{key}.tar.gz", archive):
            unpack(archive, folder)
            return True
    with explained(f"downloading s3://{bucket}/{prefix}"):
        entries = [e for e in account.objects(bucket, prefix) if not e["Key"].endswith("/")]
        if entries:
            _write(f"s3://{bucket}/{prefix}", _objects(s3, bucket, prefix, entries), folder)
    return bool(entries)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .tar.gz archive: only files and folders, only below `folder`, all of it or nothing.

    Raises:
        JobError: the archive breaks a rule or is damaged; `folder` does not exist then.
    """
    try:
        _write(archive.name, _archived(archive), folder)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise JobError(
            f"{archive.name} could not be unpacked into {folder} ({error}): fetch it again."
        ) from error


def _archived(archive: Path) -> Iterator[Member]:
    def write(target: Path) -> None:
        source = tar.extractfile(member)
        assert source is not None  # of a plain file
        with source, target.open("xb") as file:
            shutil.copyfileobj(source, file)

    with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            yield member, write
        while stream.read(2**20):  # tarfile stops before gzip's checksum
            pass


def _objects(s3: Any, bucket: str, prefix: str, entries: list[dict[str, Any]]) -> Iterator[Member]:
    for entry in entries:
        member = tarfile.TarInfo(entry["Key"].removeprefix(prefix))
        member.size = entry["Size"]
        yield member, partial(s3.download_file, bucket, entry["Key"])


def _write(source: str, members: Iterable[Member], folder: Path) -> None:
    """Write members below `folder`, which takes its name when all of them are there."""
    unfinished, size = folder.with_name(f"{folder.name}.partial"), 0
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        for number, (member, write) in enumerate(members):
            size += member.size
            target = unfinished / member.name
            if problem := _danger(member, number, size):
                raise JobError(
                    f"{source} is not fetched because its member {member.name!r} {problem}: our "
                    "trainer writes no such thing."
                )
            (target if member.isdir() else target.parent).mkdir(parents=True, exist_ok=True)
            if member.isreg():
                write(target)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _danger(member: tarfile.TarInfo, number: int, size: int) -> str | None:
    """Why this member, the one of that number, must not be written."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name:
        return "would be written outside the folder"
    if not (member.isreg() or member.isdir()):
        return "is a link or a device"
    if number >= MAX_MEMBERS or size > MAX_BYTES:
        return f"is beyond the limit of {MAX_MEMBERS:,} files or {MAX_BYTES / 1e9:.0f} GB"
    return None


def result_table(rows: dict[str, list[dict[str, float]]]) -> list[str]:
    """First, best and last validation as an aligned table; one line if there was none."""
    validations = rows.get("validation", [])
    best = best_validation(validations)
    if best is None:
        last = rows.get("train", [{"step": -1}])[-1]["step"]
        return [f"No validation yet; last training step {last}."]
    labels = {
        field.name: field.label
        for field in VALIDATION_FIELDS
        if field.name != "seconds" and any(field.name in row for row in validations)
    }
    table = [["", "batch", *labels.values()]]
    for title, row in (("first", validations[0]), ("best", best), ("last", validations[-1])):
        values = [f"{row[name]:.4f}" if name in row else "-" for name in labels]
        table.append([title, f"{row['step']:,}", *values])
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in table
    ]


def _downloaded(s3: Any, bucket: str, key: str, target: Path) -> bool:
    """Download an object; False when it does not exist."""
    with explained(f"downloading s3://{bucket}/{key}"):
        try:
            s3.head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if error_code(error) in ("404", "NoSuchKey"):
                return False
            raise
        target.parent.mkdir(parents=True, exist_ok=True)
        s3.download_file(bucket, key, str(target))
    return True
