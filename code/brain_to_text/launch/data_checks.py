"""Is the data where the job will look, indexed, and what the configuration says it is?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from botocore.exceptions import ClientError

from ..config import TrainingConfig
from ..errors import DataError
from .account import AwsAccount, error_code, sentence
from .findings import Finding, error, warning
from .request import JobSettings

MANIFEST = "trial_manifest.json.gz"
_DATA_FILE = re.compile(r"(?P<session>[^/]+)/data_(?P<split>train|val|test)\.hdf5")


def check_data(job: JobSettings, config: TrainingConfig, account: AwsAccount) -> Iterator[Finding]:
    """Findings about bucket, dataset, manifest, and checkpoints to start from."""
    s3 = account.client("s3")
    reachable = True
    for finding in _bucket(job, account, s3):
        reachable = reachable and finding.severity != "error"
        yield finding
    if not reachable:
        return
    try:
        yield from _dataset(job, config, s3)
        yield from _starting_points(job, s3)
    except ClientError as problem:
        yield error(
            "data-denied",
            sentence(problem, f"listing s3://{job.s3_bucket}/{job.s3_data_prefix}"),
        )


def _bucket(job: JobSettings, account: AwsAccount, s3: Any) -> Iterator[Finding]:
    try:
        answer = s3.head_bucket(Bucket=job.s3_bucket)
    except ClientError as problem:
        code = error_code(problem)
        if code in ("404", "NoSuchBucket"):
            yield error(
                "bucket-unknown",
                f"Bucket {job.s3_bucket} does not exist: check --s3-bucket against `aws s3 ls`, "
                "or create it.",
            )
        elif code in ("403", "AccessDenied"):
            yield error(
                "bucket-denied",
                f"You may not look into bucket {job.s3_bucket}: attach "
                "code/aws/launcher_policy.json, or check whose bucket it is.",
            )
        elif code == "301":
            yield _elsewhere(job, account, _region_of(problem.response) or "another region")
        else:
            yield error("bucket-unchecked", sentence(problem, f"looking at bucket {job.s3_bucket}"))
        return
    region = answer.get("BucketRegion") or _region_of(answer)
    if region and region != account.region and not job.is_local:
        yield _elsewhere(job, account, region)


def _elsewhere(job: JobSettings, account: AwsAccount, region: str) -> Finding:
    return error(
        "bucket-region",
        f"Bucket {job.s3_bucket} lies in {region} and the job would run in {account.region}: every "
        f"byte would cross regions, slowly and at a price; use --region {region}.",
    )


def _region_of(answer: dict[str, Any]) -> str | None:
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return headers.get("x-amz-bucket-region")


def _dataset(job: JobSettings, config: TrainingConfig, s3: Any) -> Iterator[Finding]:
    prefix = job.s3_data_prefix.strip("/")
    url = f"s3://{job.s3_bucket}/{prefix}"
    listing = _listing(s3, job.s3_bucket, f"{prefix}/")
    files = [match for key in listing if (match := _DATA_FILE.fullmatch(key))]
    splits = Counter(match["split"] for match in files)
    if not files:
        yield error(
            "data-missing",
            f"There is no SESSION/data_*.hdf5 under {url}: "
            + (
                _nearest_prefix(s3, job.s3_bucket, prefix) or "upload the dataset (README, step 2)."
            ),
        )
        return
    if not splits["train"]:
        yield error("data-no-train", f"{url} has no data_train.hdf5 in any session: upload them.")
    if not splits["val"]:
        yield warning(
            "data-no-val",
            f"{url} has no data_val.hdf5, so no best model can be chosen: upload validation data, "
            "or set --save_final_model true.",
        )
    size = sum(info.size for info in listing.values())
    if job.data_channel == "file" and size > 0.9 * job.volume_gb * 1e9:
        yield error(
            "volume-too-small",
            f"The dataset has {size / 1e9:.0f} GB and --volume-gb is {job.volume_gb}: use "
            f"--volume-gb {int(1.3 * size / 1e9) + 10}, or --data-channel stream, which copies "
            "nothing.",
        )
    if MANIFEST not in listing:
        yield warning(
            "manifest-missing",
            f"{url} has no {MANIFEST}, so the job must index {len(files)} files while you pay: run "
            f"`python code/prepare_dataset.py index {url}` once.",
        )
        return
    yield from _manifest(job, config, s3, listing, url)


def _manifest(
    job: JobSettings, config: TrainingConfig, s3: Any, listing: dict[str, Any], url: str
) -> Iterator[Finding]:
    try:
        from ..dataset.manifest import TrialManifest
        from ..dataset.selection import against_config
    except ImportError as problem:
        yield warning(
            "manifest-unchecked",
            f"The manifest could not be read here (no module {problem.name}): "
            "`pip install h5py numpy s3fs` to have the data checked against the configuration.",
        )
        return
    key = f"{job.s3_data_prefix.strip('/')}/{MANIFEST}"
    content = s3.get_object(Bucket=job.s3_bucket, Key=key)["Body"].read()
    try:
        manifest = TrialManifest.from_bytes(content)
        manifest.check_fresh(listing, url)
    except DataError as problem:
        yield error("manifest-stale", str(problem))
        return
    for mismatch in against_config(manifest, config):
        yield (error if mismatch.is_error else warning)(mismatch.name, mismatch.text)


def _starting_points(job: JobSettings, s3: Any) -> Iterator[Finding]:
    if job.resume_from:
        uri = f"{job.output_uri(job.resume_from)}/checkpoints/"
        if not _listing(s3, *_split(uri)):
            yield error(
                "resume-nothing",
                f"Job {job.resume_from} left no checkpoint under {uri}: check its name (--list).",
            )
    if job.init_from_checkpoint:
        bucket, key = _split(job.init_from_checkpoint)
        if not _listing(s3, bucket, key, everything=False):
            yield error(
                "init-nothing",
                f"There is nothing at {job.init_from_checkpoint}: give the s3:// URL of a "
                "model.tar.gz or a best_checkpoint.",
            )


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _listing(s3: Any, bucket: str, prefix: str, everything: bool = True) -> dict[str, Any]:
    """Objects under a prefix by their key relative to it, as object_store's listings."""
    from ..dataset.store import ObjectInfo

    found: dict[str, Any] = {}
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for entry in page.get("Contents", []):
            key = entry["Key"].removeprefix(prefix)
            found[key] = ObjectInfo(key, int(entry["Size"]), entry["ETag"].strip('"'))
        if not everything:
            break
    return found


def _nearest_prefix(s3: Any, bucket: str, prefix: str) -> str | None:
    """A sentence that names where data files do lie in the bucket; None if nowhere near the top."""
    pages = s3.get_paginator("list_objects_v2").paginate(
        Bucket=bucket, PaginationConfig={"MaxItems": 5000}
    )
    for page in pages:
        for entry in page.get("Contents", []):
            root, _, name = entry["Key"].rpartition("/data_")
            if name.endswith(".hdf5") and "/" in root:
                return f"it lies under --s3-data-prefix {root.rsplit('/', 1)[0]}."
    return None
