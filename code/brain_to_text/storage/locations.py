"""s3:// URLs (nothing else splits one), listings, and which keys are data files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError, StorageError

DEFAULT_PREFIX = "data/hdf5_data_diphone_encoded"  # of the dataset in its bucket
MANIFEST_NAME = "trial_manifest.json.gz"
# a session is one folder's name: no "..", nothing that could break a line or is not UTF-8
DATA_FILE = re.compile(
    r"(?P<session>(?!\.{1,2}/)[^/\x00-\x1f\x7f\ufffd]+)/data_(?P<split>train|val|test)\.hdf5"
)
# names the KMS key that encrypts what is written to S3 (id or ARN), where no argument does
KMS_KEY_VARIABLE = "S3_KMS_KEY_ID"
# storage classes whose objects answer no GET until they are restored
ARCHIVED = {"GLACIER", "DEEP_ARCHIVE"}
S3_ETAG = re.compile(r"[0-9a-f]{32}(-\d+)?")
# what somebody probably meant as a data file
_NEARLY = re.compile(r"data[^/]*(train|val|test)[^/]*|.*\.(h5|hdf5?|he5|hdf)", re.IGNORECASE)


@dataclass(frozen=True)
class ObjectInfo:
    """One entry of a listing.

    Attributes:
        key: relative to the store.
        size: in bytes.
        etag: changes with the content.
        storage_class: as S3 lists it ("GLACIER", …); "" where nobody said. An archived object with
            a restored copy counts as "STANDARD". No part of what makes two entries equal.
    """

    key: str
    size: int
    etag: str
    storage_class: str = field(default="", compare=False)


def archived_sentence(listing: Mapping[str, ObjectInfo], url: str) -> str | None:
    """One sentence that counts and names what must be restored before anybody can read it.

    Args:
        listing: of what is going to be read; entries without a storage class are taken as readable.
        url: s3://bucket/prefix that the listing's keys are relative to.
    """
    archived = [key for key in sorted(listing) if listing[key].storage_class in ARCHIVED]
    if not archived:
        return None
    classes = ", ".join(sorted({listing[key].storage_class for key in archived}))
    others = ", and so each of the others" if len(archived) > 1 else ""
    return (
        f"{len(archived)} of {len(listing)} files in {url} cannot be read because they are archived"
        f" ({classes}: {shortened(archived)}): {restore_advice(s3_url(url, archived[0]))}{others}."
    )


def refuse_archived(listing: Mapping[str, ObjectInfo], url: str) -> None:
    """See `archived_sentence`.

    Raises:
        DataError: that sentence.
    """
    sentence = archived_sentence(listing, url)
    if sentence:
        raise DataError(sentence)


def restore_advice(url: str) -> str:
    """What makes an archived object readable again, as the end of a sentence."""
    bucket, key = split_s3_url(url)
    return (
        f"restore it (hours) with 'aws s3api restore-object --bucket {bucket} "
        f'--key "{key}" --restore-request Days=30\''
    )


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
    plain = [part for part in parts if part not in ("", ".", "..")]
    if plain != parts:
        there = f"s3://{bucket}/{'/'.join(plain)}"
        raise StorageError(
            f"'{url}' has an empty part (//), '.' or '..' in its prefix, which not every S3 client "
            f"can read: write {there}; objects that lie there are moved by 'aws s3 mv --recursive "
            f"s3://{bucket}/{prefix}/ {there}/'."
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


def session_and_split(key: str) -> tuple[str, str]:
    """What the key of a data file says.

    Raises:
        DataError: it is none.
    """
    match = DATA_FILE.fullmatch(key)
    if match is None:
        raise DataError(
            f"{key} is not named SESSION/data_train.hdf5, data_val.hdf5 or data_test.hdf5."
        )
    return match["session"], match["split"]


def data_files(listing: Mapping[str, ObjectInfo], url: str) -> dict[str, ObjectInfo]:
    """The listing's SESSION/data_{train,val,test}.hdf5, sorted.

    Raises:
        DataError: there are none; says where they are if they lie deeper. Or some are archived.
    """
    found = {key: listing[key] for key in sorted(listing) if DATA_FILE.fullmatch(key)}
    if found:
        refuse_archived(found, url)
        return found
    near = not_taken(listing)
    deeper = sorted(
        {key.rsplit("/", 2)[0] for key in near if DATA_FILE.search(key) and key.count("/") > 1}
    )
    if deeper:
        hint = f"give {url.rstrip('/')}/{deeper[0]} instead"
    elif near:
        hint = f"rename what has nearly that name ({shortened(near)})"
    elif listing:
        hint = f"it holds other things ({shortened(sorted(listing))}); check the prefix"
    elif is_s3(url):
        hint = "there is nothing at all; check bucket and prefix, or upload the dataset first"
    else:
        hint = "there is nothing at all; check the folder's name"
    raise DataError(f"No SESSION/data_train.hdf5 (or val, test) in {url}: {hint}.")


def not_taken(listing: Mapping[str, ObjectInfo]) -> list[str]:
    """Keys that are nearly those of data files (.h5, capitals, deeper, not UTF-8), sorted."""
    return [
        key
        for key in sorted(listing)
        if not DATA_FILE.fullmatch(key) and _NEARLY.fullmatch(key.rpartition("/")[2])
    ]


def not_taken_sentence(listing: Mapping[str, ObjectInfo]) -> str | None:
    """One line that names them, None where there are none."""
    keys = not_taken(listing)
    if not keys:
        return None
    return f"Not taken, because not named SESSION/data_{{train,val,test}}.hdf5: {shortened(keys)}"


def dataset_command(command: str, url: str) -> str:
    """What a user types to have a dataset indexed or validated, in quotes."""
    return f"'python code/prepare_dataset.py {command} {shlex.quote(url)}'"


def shortened(names: Sequence[str], limit: int = 4) -> str:
    """The first names, and how many more there are."""
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
