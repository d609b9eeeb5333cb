"""Names of places: buckets, prefixes and what a listing shows; the only split of an s3:// URL."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import StorageError

S3_ETAG = re.compile(r"[0-9a-f]{32}(-\d+)?")


@dataclass(frozen=True)
class ObjectInfo:
    """One entry of a listing. `key` is relative to the store; `etag` changes with the content."""

    key: str
    size: int
    etag: str


def is_s3(location: str | Path) -> bool:
    """True for the text of an s3:// URL."""
    return str(location).startswith("s3://")


def split_s3_url(url: str) -> tuple[str, str]:
    """Bucket and prefix (or key) of `s3://bucket/prefix`; slashes at the prefix's ends are dropped.

    Raises:
        StorageError: no bucket, or a prefix with an empty part, "." or "..", which S3, its clients
            and folders understand differently.
    """
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if bucket.startswith("arn:") and bucket.endswith(":accesspoint"):
        name, _, prefix = prefix.partition("/")
        bucket = f"{bucket}/{name}"
    prefix = prefix.strip("/")
    if not bucket:
        raise StorageError(f"'{url}' names no bucket: use s3://BUCKET/PREFIX.")
    parts = prefix.split("/") if prefix else []
    odd = next((part for part in parts if part in ("", ".", "..")), None)
    if odd is not None:
        plain = "/".join(part for part in parts if part not in ("", ".", ".."))
        advice = f"write s3://{bucket}/{plain}"
        if odd == "":
            advice += (
                "; objects that were uploaded under the double slash are moved by 'aws s3 mv "
                f"--recursive s3://{bucket}/{prefix}/ s3://{bucket}/{plain}/'"
            )
        raise StorageError(
            f"'{url}' has {'an empty part (//)' if odd == '' else repr(odd)} in its prefix, which "
            f"not every S3 client can read: {advice}."
        )
    return bucket, prefix


def s3_url(bucket: str, *prefixes: str) -> str:
    """`s3://bucket/prefix/prefix`, checked and without needless slashes.

    Args:
        bucket: its name; an s3:// URL of it is taken too.
        prefixes: one below the other; empty ones and slashes at their ends do not matter.

    Raises:
        StorageError: as `split_s3_url`.
    """
    bucket = bucket.removeprefix("s3://").strip("/")
    parts = [part for prefix in prefixes if (part := prefix.strip("/"))]
    bucket, prefix = split_s3_url("/".join([f"s3://{bucket}", *parts]))
    return f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
