"""What would fail only after billing began, or in words nobody understands: GPU, image, data.

Each finding is one line that says what to type next. `account_checks` looks at role and network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from botocore.exceptions import ClientError

from ..config import TrainingConfig
from ..dataset.manifest import TrialManifest
from ..dataset.selection import against_config
from ..errors import BrainToTextError, Finding, error, note, warning
from ..gpus import OLDEST_CAPABILITY, frame_weights, n_frames
from ..storage.locations import (
    DATA_FILE,
    MANIFEST_NAME,
    ObjectInfo,
    archived_sentence,
    dataset_command,
    not_taken_sentence,
    s3_url,
    shortened,
    split_s3_url,
)
from .account import AwsAccount, error_code
from .image import ECR_URI, Image, code_differences
from .pricing import cheaper_choice, gpu_of, instance_types, step_seconds
from .request import JobSettings

LONG_TRIAL_BINS = 2500  # 50 s of attempted speech: about the longest trials of the public corpus
_PUSH = "./build_and_push.sh"


# --- the instance type ----------------------------------------------------------------------------


def check_machine(job: JobSettings, config: TrainingConfig) -> Iterator[Finding]:
    """Does the configuration fit the instance type: GPU generation, memory, time?"""
    row, gpu = instance_types().get(job.instance_type), gpu_of(job.instance_type)
    if row is None:
        return  # one that is not in our table; the price line says so
    if gpu is None:
        yield warning(
            "instance-cpu",
            f"{job.instance_type} has no GPU and training would take weeks: use --instance-type "
            "ml.g5.2xlarge.",
        )
        return
    if gpu.capability < OLDEST_CAPABILITY:
        yield error(
            "gpu-too-old",
            f"{job.instance_type} has a {row.gpu} (compute capability {gpu.capability}) and the "
            f"image supports {OLDEST_CAPABILITY} and newer: use --instance-type ml.g4dn.xlarge or "
            "ml.g5.2xlarge.",
        )
        return
    if config.use_amp and config.amp_dtype == "bfloat16" and not gpu.has_bfloat16:
        yield note("precision", f"A {row.gpu} has no bfloat16: float16 instead.")
    n_gpus, batch = row.gpus * job.instance_count, config.dataset.batch_size
    need, memory = memory_gib(config, n_gpus), gpu.memory_gib
    if need > memory:
        smaller = range(batch - 1, 0, -1)
        fits = next((n for n in smaller if memory_gib(config, n_gpus, n) < 0.85 * memory), None)
        way = f"use --batch-size {fits}" if fits else "use a GPU with more memory"
        yield error(
            "gpu-memory",
            f"A batch of {batch} long trials needs about {need:.0f} GiB and the {row.gpu} has "
            f"{memory:g}: {way}.",
        )
    speed = step_seconds(config, job.instance_type, job.instance_count)
    hours = config.num_training_batches * speed[0] / 3600 if speed else 0.0
    if hours > job.max_run_hours:
        yield error(
            "max-run",
            f"The job needs about {hours:.0f} h and SageMaker would stop it after "
            f"{job.max_run_hours:g}: use --max-run-hours {2 * hours:.0f}, or fewer "
            "--num-training-batches.",
        )
    if choice := cheaper_choice(config, job.instance_type, job.instance_count):
        yield warning("cheaper-choice", choice)


def memory_gib(config: TrainingConfig, n_gpus: int = 1, batch_size: int | None = None) -> float:
    """GPU memory of a step whose trials are all long: an estimate, to within a third.

    Weights, gradients and Adam's two moments in float32; features and their augmented copies in
    float32; patches, gate activations of each GRU layer, logits with gradients.
    """
    model, dataset = config.model, config.dataset
    trials = -(-(batch_size or dataset.batch_size) // n_gpus)
    frames = max(n_frames(config, LONG_TRIAL_BINS), 1)
    directions, width = 1 + model.bidirectional, config.width
    patch = width * model.patch_size
    weights = frame_weights(config) + 45 * width**2
    activation = 2 if config.use_amp else 4
    per_frame = activation * (2 * patch + 6 * model.n_layers * model.n_units * directions)
    per_frame += 4 * 4 * dataset.n_classes
    per_bin = 4 * 5 * width
    total = 16 * weights + trials * (frames * per_frame + LONG_TRIAL_BINS * per_bin)
    return total / 2**30 + 0.8


# --- the image ------------------------------------------------------------------------------------


def check_image(
    settings: JobSettings, image: Image | None, account: AwsAccount
) -> Iterator[Finding]:
    """Is the image where the job looks, for its processor, and made of the code that is here?

    Args:
        image: what ECR says of it (`image.look_at`).

    Raises:
        Exception: of botocore, when ECR refused to answer.
    """
    if image is None:
        yield error("image-missing", f"The job has no image: run {_PUSH}, or give --image-uri.")
        return
    parts = ECR_URI.fullmatch(image.uri)
    if parts is None:
        yield error(
            "image-not-ecr",
            f"Image {image.uri} is not in ECR, and SageMaker pulls from nowhere else: run "
            f"{_PUSH} and leave out --image-uri.",
        )
        return
    if parts["region"] != account.region:
        yield error(
            "image-region",
            f"The image lies in {parts['region']} and the job runs in {account.region}: run "
            f"{_PUSH} --region {account.region}.",
        )
        return
    if image.refusal:
        raise image.refusal
    if image.missing:
        repository = parts["repository"]
        yield error(
            "image-unknown",
            f"ECR in {account.region} of account {parts['account']} has no image {image.missing} "
            f"in a repository {repository}: run {_PUSH}, or choose one of "
            f"`aws ecr list-images --repository-name {repository}`.",
        )
        return
    if image.architectures and "amd64" not in image.architectures:
        yield error(
            "image-architecture",
            f"The image is for {', '.join(sorted(image.architectures))} and SageMaker's GPU "
            f"instances are amd64: run {_PUSH}, which builds for linux/amd64 everywhere.",
        )
    if settings.mlflow_tracking_uri and (image.labels or {}).get("brain-to-text.mlflow") == "no":
        yield error(
            "image-without-mlflow",
            "--mlflow-tracking-uri is given and the image holds no MLflow client, so nothing would "
            f"be tracked: run {_PUSH} --mlflow, or drop the option.",
        )
    yield from _code(settings, image)


def _code(settings: JobSettings, image: Image) -> Iterator[Finding]:
    """Whether the code here, which was checked, is the code that will run."""
    if image.code is None:
        yield warning(
            "image-code-unknown",
            "The image does not say what code it was made of, or ECR does not let us look: whether "
            f"code/ here is what will run is unknown; {_PUSH} makes an image that says it.",
        )
        return
    files = code_differences(image.code)
    if files:
        named = ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
        finding = error(
            "code-differs",
            f"The image was made of other code than is here ({named}): run {_PUSH}, or launch what "
            "the image holds with --accept-code-difference.",
        )
        accepted = settings.accept_code_difference
        yield replace(finding, severity="warning") if accepted else finding


# --- the data -------------------------------------------------------------------------------------


def check_bucket(settings: JobSettings, account: AwsAccount) -> Iterator[Finding]:
    """Is the bucket there, open to you, and in the job's region?"""
    s3, bucket = account.client("s3"), settings.s3_bucket
    try:
        answer = s3.head_bucket(Bucket=bucket)
    except ClientError as problem:
        code, answer = error_code(problem), problem.response
        if code in ("404", "NoSuchBucket"):
            yield error(
                "bucket-unknown",
                f"Bucket {bucket} does not exist: check --s3-bucket against `aws s3 ls`, or create "
                "it.",
            )
            return
        if code in ("403", "AccessDenied"):
            yield error(
                "bucket-forbidden",
                f"S3 refused access to bucket {bucket} ({_why_refused(s3, bucket)}): it belongs to "
                "another account, or a policy keeps you out. Check --s3-bucket, ask the bucket's "
                "owner to admit you and the job's role, or attach code/aws/launcher_policy.json.",
            )
            return
        if code != "301":
            raise
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = answer.get("BucketRegion") or headers.get("x-amz-bucket-region")
    if region and region != account.region:
        yield error(
            "bucket-region",
            f"Bucket {bucket} lies in {region} and the job would run in {account.region}: every "
            f"byte would cross regions, slowly and at a price; use --region {region}.",
        )


def _why_refused(s3: Any, bucket: str) -> str:
    """What S3 says to a request whose answer has a body, which HEAD's has not."""
    try:
        s3.list_objects_v2(Bucket=bucket, MaxKeys=1)
    except ClientError as problem:
        answer = problem.response["Error"]
        return f"{answer.get('Code', '')}: {answer.get('Message', '')}".rstrip(": .")
    return "403 to HeadBucket"


def check_data(job: JobSettings, config: TrainingConfig, account: AwsAccount) -> Iterator[Finding]:
    """Is the data where the job will look, indexed, and what the configuration says it is?"""
    prefix = f"{job.s3_data_prefix.strip('/')}/"
    listing = _listing(account.objects(job.s3_bucket, prefix), prefix)
    url = s3_url(job.s3_bucket, prefix)
    splits = Counter(match["split"] for key in listing if (match := DATA_FILE.fullmatch(key)))
    if not splits:
        yield error(
            "data-missing",
            f"There is no SESSION/data_*.hdf5 under {url}: upload the dataset (README, step 2), or "
            f"give the --s3-data-prefix that `aws s3 ls --recursive s3://{job.s3_bucket}` shows.",
        )
    elif archived := archived_sentence(listing, url):
        yield error("data-archived", archived)
    else:
        yield from _dataset(job, listing, splits, url)
        if splits["train"] and MANIFEST_NAME in listing:
            key = f"{prefix}{MANIFEST_NAME}"
            answer = account.client("s3").get_object(Bucket=job.s3_bucket, Key=key)
            yield from _manifest(answer["Body"].read(), config, listing, url)
    yield from _starting_points(job, account)


def _dataset(
    job: JobSettings, listing: Mapping[str, ObjectInfo], splits: Counter[str], url: str
) -> Iterator[Finding]:
    """What the names and sizes of the files tell."""
    if not splits["train"]:
        yield error("data-no-train", f"{url} has no data_train.hdf5 in any session: upload them.")
    if not splits["val"]:
        yield warning(
            "data-no-val",
            f"{url} has no data_val.hdf5, so no best model can be chosen: upload validation data, "
            "or set --save_final_model true.",
        )
    if overlooked := not_taken_sentence(listing):
        yield warning("data-not-taken", f"{url}: {overlooked}.")
    size = sum(info.size for info in listing.values())
    if job.data_channel == "file" and size > 0.9 * job.volume_gb * 1e9:
        yield error(
            "volume-too-small",
            f"The dataset has {size / 1e9:.0f} GB and --volume-gb is {job.volume_gb}: use "
            f"--volume-gb {int(1.3 * size / 1e9) + 10}, or --data-channel stream, which copies "
            "nothing.",
        )
    if MANIFEST_NAME not in listing:
        yield warning(
            "manifest-missing",
            f"{url} has no {MANIFEST_NAME}, so the job must index {splits.total()} files while "
            f"you pay: run {dataset_command('index', url)} once.",
        )


def _manifest(
    content: bytes, config: TrainingConfig, listing: Mapping[str, ObjectInfo], url: str
) -> Iterator[Finding]:
    """What the trainer would refuse in manifest and configuration, before the job is paid for."""
    try:
        manifest = TrialManifest.from_bytes(content, url)
        doubtful = manifest.check_fresh(listing, url)
    except BrainToTextError as problem:
        yield error("manifest-stale", str(problem))
        return
    if doubtful:
        yield warning(
            "manifest-doubtful",
            f"S3 cannot tell whether {len(doubtful)} files ({shortened(doubtful)}) are those that "
            "were indexed: the job reads their labels when it starts, and ends if they are others; "
            f"if you changed them, run {dataset_command('index', url)} first.",
        )
    yield from against_config(manifest, config)


def _starting_points(job: JobSettings, account: AwsAccount) -> Iterator[Finding]:
    states = f"{job.checkpoints_of(str(job.resume_from))}/"
    if job.resume_from and not any(account.objects(*split_s3_url(states))):
        yield error(
            "resume-nothing",
            f"Job {job.resume_from} left no checkpoint under {states}: check its name (--list); "
            "where it went on from another job itself, give that one's.",
        )
    model = job.init_from_checkpoint
    if model and not any(account.objects(*split_s3_url(model))):
        yield error(
            "init-nothing",
            f"There is nothing at {model}: give the s3:// URL of a model.tar.gz or a "
            "best_checkpoint.",
        )


def _listing(entries: Iterable[dict[str, Any]], prefix: str) -> dict[str, ObjectInfo]:
    """Objects by their key relative to a prefix, as the store lists them."""
    found = {}
    for entry in entries:
        key = entry["Key"].removeprefix(prefix)
        kind = "STANDARD" if _restored(entry) else entry.get("StorageClass", "")
        found[key] = ObjectInfo(key, int(entry["Size"]), entry.get("ETag", "").strip('"'), kind)
    return found


def _restored(entry: dict[str, Any]) -> bool:
    """Whether an archived object has a copy that can be read now."""
    status = entry.get("RestoreStatus", {})
    return "RestoreExpiryDate" in status and not status.get("IsRestoreInProgress")
