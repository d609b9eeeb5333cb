"""A training job as data: settings in, the exact CreateTrainingJob request out.

Nothing here talks to AWS. Lengths, patterns and choices are those of the service's own model; what
is checked by hand are rules between settings, which no model holds.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ..config import TrainingConfig, changed
from ..config_reader import SCHEMA_DEFAULTS, load_config
from ..errors import JobError
from ..log_lines import METRIC_DEFINITIONS
from ..redaction import looks_secret, redact
from ..storage.locations import DEFAULT_PREFIX, KMS_KEY_VARIABLE, s3_url
from .request_validation import breaches

CODE_FOLDER = Path(__file__).resolve().parents[2]
DEFAULT_CONFIG = "rnn_args_diphone_sagemaker.yaml"
OUTPUT_PREFIX = "sagemaker-outputs"
CHANNEL_FOLDER = "/opt/ml/input/data/training"
CHECKPOINT_FOLDER = "/opt/ml/checkpoints"

_MLFLOW_SERVER = re.compile(
    r"https?://\S+|arn:[\w-]+:sagemaker:[a-z0-9-]+:[0-9]{12}:mlflow-(tracking-server|app)/[\w.-]+"
)
PROJECT_TAG = {"project": "brain-to-text"}  # by which `jobs.list_jobs` finds what we launched


def option(default: Any, help: str, **more: Any) -> Any:
    """A dataclass field that carries its command-line help, and argparse details in `more`."""
    metadata = {"help": help, **more}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """Everything a user may decide about a job; each field is a launcher option of that name."""

    s3_bucket: str = field(metadata={"help": "bucket with the dataset; outputs go there too"})
    s3_data_prefix: str = option(DEFAULT_PREFIX, "prefix of the dataset in the bucket")
    config_file: str = option(DEFAULT_CONFIG, "training configuration, one in code/ or your own")
    num_training_batches: int | None = option(None, "training steps, instead of the config's")
    batch_size: int | None = option(None, "trials per step, instead of the config's")
    overrides: Mapping[str, Any] = option({}, "config values by dotted key", flag=None)

    job_name: str | None = option(None, "name of the job; made from config and time by default")
    image_uri: str | None = option(
        None, "image in ECR; default: BRAIN_TO_TEXT_IMAGE_URI, or the last build_and_push.sh"
    )
    role: str | None = option(
        None, "execution role, ARN or name; default: SAGEMAKER_ROLE_ARN, or the stack's role"
    )
    instance_type: str = option("ml.g5.2xlarge", "SageMaker instance type")
    instance_count: int = option(1, "instances; the batch is shared among all their GPUs")
    volume_gb: int = option(30, "storage volume; the stream needs little")
    max_run_hours: float = option(48.0, "SageMaker stops the job after this many hours")

    spot: bool = option(False, "use spot capacity; interrupted jobs go on from their checkpoint")
    max_wait_hours: float | None = option(
        None, "run and waiting time together with --spot; default: max run + 24"
    )
    resume_from: str | None = option(None, "name of an earlier job to go on from")
    accept_changes: bool = option(
        False, "resume although configuration, data or code differ from the checkpoint's"
    )
    init_from_checkpoint: str | None = option(
        None, "s3:// URL of a model whose weights to start from"
    )
    accept_code_difference: bool = option(
        False, "launch although code/ here is not the code in the image"
    )
    retries: int = option(1, "restarts by SageMaker after its own internal errors, 0 to 30")
    keep_alive_minutes: int = option(0, "keep the instance warm for the next job, up to 360")
    debug_shell: bool = option(
        False, "let yourself into the running container by `aws ssm start-session`"
    )

    data_channel: Literal["stream", "fastfile", "file"] = option(
        "stream", "how trials reach the job: our stream from S3, or a SageMaker channel"
    )
    output_prefix: str = option(OUTPUT_PREFIX, "prefix of all outputs in the bucket")
    subnets: tuple[str, ...] = option((), "VPC subnets, with --security-group-ids")
    security_group_ids: tuple[str, ...] = option((), "VPC security groups, with --subnets")
    encrypt_traffic: bool = option(False, "encrypt traffic between instances")
    output_kms_key: str | None = option(None, "KMS key for model and outputs")
    volume_kms_key: str | None = option(None, "KMS key for the storage volume")
    tags: Mapping[str, str] = option({}, "tag, as KEY=VALUE; may be repeated", flag="--tag")
    environment: Mapping[str, str] = option(
        {}, "environment variable of the job, as NAME=VALUE; may be repeated", flag="--env"
    )
    mlflow_tracking_uri: str | None = option(
        None, "MLflow server: ARN of SageMaker's, or an http(s):// address; needs a --mlflow image"
    )

    def output_uri(self, job_name: str) -> str:
        """s3:// folder that holds everything one job leaves."""
        return s3_url(self.s3_bucket, self.output_prefix, job_name)

    def checkpoints_of(self, job_name: str) -> str:
        """s3:// folder with the states that a job resumes from."""
        return f"{self.output_uri(job_name)}/checkpoints"


def new_job_name(config_file: str) -> str:
    """A name that is valid, sorts by time and is not taken: b2t-diphone-20260131-101500-3f2a81."""
    stem = Path(config_file).stem.removeprefix("rnn_args_").removesuffix("_sagemaker")
    kind = re.sub(r"[^a-zA-Z0-9]+", "-", stem).strip("-")[:30].rstrip("-") or "training"
    return f"b2t-{kind}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def job_config(settings: JobSettings) -> TrainingConfig:
    """What the job trains with: the file, then the overrides, then the short options.

    Raises:
        ConfigError: the file or an override is wrong.
    """
    path = Path(settings.config_file)
    if not path.is_file() and len(path.parts) == 1:
        path = CODE_FOLDER / path.name
    model = settings.init_from_checkpoint
    options = {
        "num-training-batches": settings.num_training_batches,
        "batch-size": settings.batch_size,
        "init-from-checkpoint": None if model is None else True,
        "init-checkpoint-path": model,
    }
    given = {name: value for name, value in options.items() if value is not None}
    return load_config(path, {**settings.overrides, **given})


def training_request(settings: JobSettings, config: TrainingConfig) -> dict[str, Any]:
    """The CreateTrainingJob request, checked against the service's own model.

    Args:
        settings: with role, image and name filled in; text in "<…>" stands for what is not known.
        config: of these settings (`job_config`).

    Raises:
        JobError: a value breaks a limit of the API.
    """
    job_name = str(settings.job_name)
    output_uri = settings.output_uri(job_name)
    request: dict[str, Any] = {
        "TrainingJobName": settings.job_name,
        "RoleArn": settings.role,
        "AlgorithmSpecification": {
            "TrainingImage": settings.image_uri,
            "TrainingInputMode": "FastFile" if settings.data_channel == "fastfile" else "File",
            "MetricDefinitions": [dict(metric) for metric in METRIC_DEFINITIONS],
        },
        "HyperParameters": _hyperparameters(settings, config, output_uri),
        "OutputDataConfig": {"S3OutputPath": output_uri.rsplit("/", 1)[0]},
        "ResourceConfig": {
            "InstanceType": settings.instance_type,
            "InstanceCount": settings.instance_count,
            "VolumeSizeInGB": settings.volume_gb,
        },
        "StoppingCondition": {"MaxRuntimeInSeconds": round(settings.max_run_hours * 3600)},
        "CheckpointConfig": {
            "S3Uri": settings.checkpoints_of(settings.resume_from or job_name),
            "LocalPath": CHECKPOINT_FOLDER,
        },
        "Tags": [
            {"Key": key, "Value": value} for key, value in {**PROJECT_TAG, **settings.tags}.items()
        ],
        "ProfilerConfig": {"DisableProfiler": True},
    }
    if settings.data_channel != "stream":
        request["InputDataConfig"] = [_data_channel(settings)]
    if settings.output_kms_key:
        request["OutputDataConfig"]["KmsKeyId"] = settings.output_kms_key
    if settings.volume_kms_key:
        request["ResourceConfig"]["VolumeKmsKeyId"] = settings.volume_kms_key
    if settings.keep_alive_minutes:
        request["ResourceConfig"]["KeepAlivePeriodInSeconds"] = settings.keep_alive_minutes * 60
    if settings.subnets:
        request["VpcConfig"] = {
            "SecurityGroupIds": list(settings.security_group_ids),
            "Subnets": list(settings.subnets),
        }
    if settings.encrypt_traffic:
        request["EnableInterContainerTrafficEncryption"] = True
    if settings.spot:
        wait = settings.max_wait_hours or settings.max_run_hours + 24
        request["EnableManagedSpotTraining"] = True
        request["StoppingCondition"]["MaxWaitTimeInSeconds"] = round(wait * 3600)
    if settings.retries:
        request["RetryStrategy"] = {"MaximumRetryAttempts": settings.retries}
    if settings.debug_shell:
        request["RemoteDebugConfig"] = {"EnableRemoteDebug": True}
    if environment := _environment(settings, job_name):
        request["Environment"] = environment
    if refused := list(breaches("CreateTrainingJob", request)):
        raise JobError(" ".join(refused))
    return request


def hyperparameter_text(value: Any) -> str:
    """`value` as text that reaches the program unchanged through the toolkit's JSON decoding.

    Text that JSON would read as something else ("007", "true") is quoted. The toolkit rewrites
    mappings as k=v lists, so they travel as quoted text, which the program reads as YAML.
    """
    if isinstance(value, Mapping):
        value = json.dumps(value)
    if not isinstance(value, str):
        return json.dumps(value, separators=(",", ":"))
    try:
        json.loads(value)
    except ValueError:
        return value
    return json.dumps(value)


def _hyperparameters(
    settings: JobSettings, config: TrainingConfig, output_uri: str
) -> dict[str, str]:
    """Where the data is, and every value of the configuration that is not the schema's default."""
    differences = changed(TrainingConfig().to_dict(), config.to_dict())
    values: dict[str, Any] = {
        "s3-bucket": settings.s3_bucket,
        "s3-data-prefix": settings.s3_data_prefix.strip("/"),
        "config-file": SCHEMA_DEFAULTS,
        "output-s3-uri": output_uri,
        **{key: value for key, (_, value) in differences.items()},
    }
    if settings.accept_changes:
        values["accept-changes"] = True
    if settings.data_channel != "stream":
        values["data-dir"] = CHANNEL_FOLDER
    return {name: hyperparameter_text(value) for name, value in values.items()}


def _environment(settings: JobSettings, job_name: str) -> dict[str, str]:
    """The job's variables; what was given by --env stays."""
    ours = {KMS_KEY_VARIABLE: settings.output_kms_key} if settings.output_kms_key else {}
    if settings.mlflow_tracking_uri:
        ours["MLFLOW_TRACKING_URI"] = settings.mlflow_tracking_uri
        ours["MLFLOW_EXPERIMENT_NAME"] = "brain-to-text"
        ours["MLFLOW_RUN_NAME"] = job_name
    return {**ours, **settings.environment}


def _data_channel(settings: JobSettings) -> dict[str, Any]:
    return {
        "ChannelName": "training",
        "InputMode": "FastFile" if settings.data_channel == "fastfile" else "File",
        "DataSource": {
            "S3DataSource": {
                "S3DataType": "S3Prefix",
                "S3Uri": f"{s3_url(settings.s3_bucket, settings.s3_data_prefix)}/",
                "S3DataDistributionType": "FullyReplicated",
            }
        },
    }


def check_settings(settings: JobSettings) -> None:
    """What the service's model does not hold: rules between settings, and no secrets.

    Raises:
        JobError: names the option, and what to type instead.
    """

    def refuse(what: str) -> None:
        raise JobError(what)

    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", settings.s3_bucket):
        refuse(
            f"Bucket name '{settings.s3_bucket}' is not valid: "
            "give your bucket's, lower-case letters, digits, dots and dashes alone, without s3://."
        )
    for name in ("instance_count", "volume_gb", "max_run_hours", "max_wait_hours"):
        number = getattr(settings, name)
        if number is not None and not 0 < number < math.inf:
            refuse(f"--{name.replace('_', '-')} is {number:g}: give a number above 0.")
    if settings.data_channel not in ("stream", "fastfile", "file"):
        refuse(f"--data-channel is '{settings.data_channel}': choose stream, fastfile or file.")
    if settings.max_wait_hours is not None:
        if not settings.spot:
            refuse("--max-wait-hours only means something together with --spot.")
        if settings.max_wait_hours < settings.max_run_hours:
            refuse(
                f"--max-wait-hours ({settings.max_wait_hours:g}) counts waiting and running, so it "
                f"cannot be less than --max-run-hours ({settings.max_run_hours:g})."
            )
    if bool(settings.subnets) != bool(settings.security_group_ids):
        refuse("A VPC needs both --subnets and --security-group-ids.")
    model = settings.init_from_checkpoint
    if model is not None and not re.match(r"s3://[^/]+/.+", model):
        refuse(f"--init-from-checkpoint is '{model}': give an s3://BUCKET/KEY URL.")
    if settings.spot and settings.keep_alive_minutes:
        refuse("Spot jobs cannot keep instances warm: drop --keep-alive-minutes or --spot.")
    if taken := PROJECT_TAG.keys() & settings.tags.keys():
        refuse(f"The tag '{taken.pop()}' is how --list finds our jobs: give yours another name.")
    for kind, values in (
        ("variable", settings.environment),
        ("setting", settings.overrides),
        ("tag", settings.tags),
    ):
        for name, value in values.items():
            if looks_secret(name, str(value)):
                refuse(
                    f"The {kind} '{name}' looks like a secret, and everybody who may describe the "
                    "job can read its request: give the job's role access instead."
                )
    if server := settings.mlflow_tracking_uri:
        if redact(server) != server:
            refuse("--mlflow-tracking-uri contains a password: use a server that trusts the role.")
        if not _MLFLOW_SERVER.fullmatch(server):
            refuse(
                f"--mlflow-tracking-uri is '{server}': give an http(s):// "
                "address, or the ARN of an mlflow-tracking-server or mlflow-app."
            )
