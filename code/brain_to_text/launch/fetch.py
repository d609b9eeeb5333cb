"""Fetch what a job left: model and outputs, unpacked without trusting the archive."""

from __future__ import annotations

import gzip
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import JobError
from ..log_lines import VALIDATION_FIELDS, best_validation, rows_of_log
from ..storage.locations import s3_url, split_s3_url
from .account import AwsAccount, error_code, explained
from .jobs import job_state
from .request import OUTPUT_PREFIX

MAX_MEMBERS = 10_000
MAX_BYTES = 64 * 10**9


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
    s3 = account.client("s3")
    has_model = _unpacked(s3, bucket, f"{prefix}/output/model.tar.gz", folder / "model")
    has_model = has_model or _copied(s3, bucket, f"{prefix}/output/model/", folder / "model")
    _unpacked(s3, bucket, f"{prefix}/output/output.tar.gz", folder / "output")
    log = folder / "model" / "training_log"
    if not log.is_file():
        log = folder / "logs" / "training_log"
        if not _downloaded(s3, bucket, f"{prefix}/logs/training_log", log) and not has_model:
            if state is not None and state.is_final:
                raise JobError(f"{name} left nothing under {output_uri}. {' '.join(state.why())}")
            raise JobError(
                f"There is nothing under {output_uri} yet: watch the job with --watch {name}."
            )
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [*result_table(rows_of_log(text)), f"Files: {folder}"]
    if state is not None and state.is_final:
        lines += state.why()
    if not has_model:
        if state is not None and state.is_final:
            return [*lines, f"There is no model: {name} ended without one."]
        return [*lines, f"There is no model yet; try again when {name} has ended."]
    lines.append(
        f"Evaluate: python code/evaluate_model.py --model {folder / 'model'} "
        f"--s3-bucket {trained_on[0]} --s3-data-prefix {trained_on[1]} --split val "
        f"--output-dir {folder / 'evaluation'}"
    )
    return lines


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .tar.gz archive that came over the network.

    Only files and folders, only below `folder`, no links, no devices, no name twice, bounded number
    and size; and all of it or nothing.

    Raises:
        JobError: the archive breaks one of these rules or is damaged; `folder` does not exist then.
    """
    size = 0
    try:
        with (
            _all_or_nothing(folder) as partial,
            gzip.open(archive) as stream,
            tarfile.open(fileobj=stream, mode="r:") as tar,
        ):
            for number, member in enumerate(tar):
                size += member.size
                target = partial / member.name
                if problem := _danger(member, target.exists(), number, size):
                    raise JobError(
                        f"{archive.name} is not unpacked because its member {member.name!r} "
                        f"{problem}: this is no archive that our trainer wrote."
                    )
                if member.isdir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source is not None  # of a plain file
                with source, target.open("xb") as file:
                    shutil.copyfileobj(source, file)
            while stream.read(2**20):  # tarfile stops before gzip's checksum
                pass
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise JobError(
            f"{archive.name} could not be unpacked into {folder} ({error}): fetch it again."
        ) from error


def _danger(member: tarfile.TarInfo, exists: bool, number: int, size: int) -> str | None:
    """Why this member, at this place of the archive, must not be written."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
        return "would be written outside the folder"
    if not (member.isreg() or member.isdir()):
        return "is a link or a device"
    if member.size < 0:
        return "has a negative size"
    if number >= MAX_MEMBERS or size > MAX_BYTES:
        return f"is beyond the limit of {MAX_MEMBERS:,} files or {MAX_BYTES / 1e9:.0f} GB"
    return "occurs twice" if member.isreg() and exists else None


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


def _unpacked(s3: Any, bucket: str, key: str, folder: Path) -> bool:
    with tempfile.TemporaryDirectory() as temporary:
        archive = Path(temporary) / key.rsplit("/", 1)[-1]
        if not _downloaded(s3, bucket, key, archive):
            return False
        folder.parent.mkdir(parents=True, exist_ok=True)
        unpack(archive, folder)
    return True


def _copied(s3: Any, bucket: str, prefix: str, folder: Path) -> bool:
    """Download what lies under a prefix, by the rules for archives; False if there is nothing.

    Raises:
        JobError: a key would be written elsewhere, there is too much, or AWS refused.
    """
    with explained(f"downloading s3://{bucket}/{prefix}"):
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        listed = [entry for page in pages for entry in page.get("Contents", [])]
        objects = {e["Key"]: e["Size"] for e in listed if not e["Key"].endswith("/")}
        if not objects:
            return False
        with _all_or_nothing(folder) as partial:
            for number, key in enumerate(objects):
                member = tarfile.TarInfo(key.removeprefix(prefix))
                if problem := _danger(member, False, number, sum(objects.values())):
                    raise JobError(f"s3://{bucket}/{key} is not fetched: it {problem}.")
                target = partial / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                s3.download_file(bucket, key, str(target))
    return True


@contextmanager
def _all_or_nothing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when the block ends well and is removed otherwise."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _downloaded(s3: Any, bucket: str, key: str, target: Path) -> bool:
    """Download an object; False when it does not exist."""
    from botocore.exceptions import ClientError

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
