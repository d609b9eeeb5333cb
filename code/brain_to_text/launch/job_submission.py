"""Send a CreateTrainingJob request through the SageMaker SDK that is installed.

All SDK calls live here. v2 (`Estimator`), v3 (`ModelTrainer`) and plain boto3 send the same
request; the tests compare what each puts on the wire.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from ..errors import JobError
from .account import AwsAccount, explained

Sdk = Literal["v2", "v3", "boto3"]
LOCAL_LABEL = "brain-to-text.job"  # of local mode's containers


def installed_sdk() -> Sdk:
    """The SDK to use: v3 where its ModelTrainer is, v2 where its Estimator is, else boto3 alone."""
    _quiet()
    for sdk, module in (("v3", "sagemaker.train"), ("v2", "sagemaker.estimator")):
        try:
            if importlib.util.find_spec(module) is not None:
                return sdk  # type: ignore[return-value]
        except ModuleNotFoundError:
            continue
    return "boto3"


def submit(request: Mapping[str, Any], account: AwsAccount, sdk: Sdk | None = None) -> str:
    """Create the training job and return its name; does not wait for it.

    Args:
        request: from `sagemaker_job.training_request`.
        account: where the job runs.
        sdk: which SDK sends it; None for the one installed.

    Raises:
        JobError: AWS refused, or could not be reached.
    """
    _quiet()
    name = str(request["TrainingJobName"])
    with explained(f"creating training job {name}"):
        {"v2": _submit_v2, "v3": _submit_v3, "boto3": _submit_boto3}[sdk or installed_sdk()](
            request, account
        )
    return name


def run_locally(request: Mapping[str, Any], account: AwsAccount) -> str:
    """Run the job in Docker on this machine (SageMaker local mode of SDK v2) until it ends.

    Model and outputs go to the same S3 URIs as a real job's. The S3 endpoint is taken from
    AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, for the containers too.

    Raises:
        JobError: SDK v2 is not installed, or the container failed.
    """
    if installed_sdk() != "v2":
        raise JobError("Local mode needs SDK v2: run `pip install 'sagemaker[local]<3'`.")
    from sagemaker.local import LocalSession

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    bucket = request["OutputDataConfig"]["S3OutputPath"].removeprefix("s3://").split("/")[0]
    session = LocalSession(
        boto_session=account.session, s3_endpoint_url=endpoint, default_bucket=bucket
    )
    name = str(request["TrainingJobName"])
    _no_telemetry(session)
    # the default of 64 MB is too small for worker processes' shared memory
    container = {"shm_size": "2gb", "labels": {LOCAL_LABEL: name}}
    session.config = {"local": {"container_config": container}}
    if endpoint:
        environment = {"AWS_ENDPOINT_URL_S3": endpoint, **request.get("Environment", {})}
        request = {**request, "Environment": environment}
    try:
        with explained(f"running {name} locally"), _compose_for_the_sdk():
            _estimator(request, session).fit(_training_inputs(request), job_name=name)
    except (RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise JobError(
            f"The local run {name} failed ({reason}): the container's last lines are above."
        ) from error
    finally:
        _remove_containers(name)
    return name


def _remove_containers(job_name: str) -> None:
    """The SDK leaves stopped containers behind, one per host."""
    docker = shutil.which("docker")
    if docker is None:
        return
    wanted = ["ps", "--all", "--quiet", "--filter", f"label={LOCAL_LABEL}={job_name}"]
    listed = subprocess.run([docker, *wanted], capture_output=True, text=True, check=False)
    if containers := listed.stdout.split():
        remove = [docker, "rm", "--force", "--volumes", *containers]
        subprocess.run(remove, capture_output=True, check=False)


@contextmanager
def _compose_for_the_sdk() -> Iterator[None]:
    """A `docker-compose` for SDK v2, which of Docker's plugins knows version 2 only."""
    before = os.environ.get("PATH", os.defpath)
    plugin = (
        subprocess.run(
            ["docker", "compose", "version"], capture_output=True, text=True, check=False
        )
        if shutil.which("docker")
        else None
    )
    known = shutil.which("docker-compose") or plugin is None or "v2" in plugin.stdout
    with tempfile.TemporaryDirectory() as folder:
        if not known and plugin is not None and plugin.returncode == 0:
            command = Path(folder) / "docker-compose"
            command.write_text('#!/bin/sh\nexec docker compose "$@"\n')
            command.chmod(0o755)
            os.environ["PATH"] = f"{folder}{os.pathsep}{before}"
        try:
            yield
        finally:
            os.environ["PATH"] = before


def _quiet() -> None:
    """Keep the SDK's advertising out of the user's terminal; its warnings stay."""
    os.environ.setdefault("SAGEMAKER_SUPPRESS_V2_WARNING", "1")
    logging.getLogger("sagemaker.config").setLevel(logging.WARNING)


def _no_telemetry(session: Any) -> None:
    """No report of the user's account to the SDK's makers, unless its settings ask for one."""
    settings = session.sagemaker_config
    for name in ("SageMaker", "PythonSDK", "Modules"):
        settings = settings.setdefault(name, {})
    settings.setdefault("TelemetryOptOut", True)


def _submit_boto3(request: Mapping[str, Any], account: AwsAccount) -> None:
    account.client("sagemaker").create_training_job(**request)


def _submit_v2(request: Mapping[str, Any], account: AwsAccount) -> None:
    from sagemaker.session import Session

    session = Session(boto_session=account.session, sagemaker_client=account.client("sagemaker"))
    _no_telemetry(session)
    _estimator(request, session).fit(
        _training_inputs(request), wait=False, job_name=request["TrainingJobName"]
    )


def _estimator(request: Mapping[str, Any], session: Any) -> Any:
    """SDK v2's Estimator for `request`; local sessions refuse spot and checkpoint settings."""
    from sagemaker.debugger import TensorBoardOutputConfig
    from sagemaker.estimator import Estimator

    algorithm, resources = request["AlgorithmSpecification"], request["ResourceConfig"]
    stopping, vpc = request["StoppingCondition"], request.get("VpcConfig", {})
    settings: dict[str, Any] = {
        "image_uri": algorithm["TrainingImage"],
        "role": request["RoleArn"],
        "instance_type": resources["InstanceType"],
        "instance_count": resources["InstanceCount"],
        "volume_size": resources["VolumeSizeInGB"],
        "volume_kms_key": resources.get("VolumeKmsKeyId"),
        "keep_alive_period_in_seconds": resources.get("KeepAlivePeriodInSeconds"),
        "max_run": stopping["MaxRuntimeInSeconds"],
        "input_mode": algorithm["TrainingInputMode"],
        "output_path": request["OutputDataConfig"]["S3OutputPath"],
        "output_kms_key": request["OutputDataConfig"].get("KmsKeyId"),
        "hyperparameters": dict(request["HyperParameters"]),
        "metric_definitions": algorithm["MetricDefinitions"],
        "tags": request["Tags"],
        "subnets": vpc.get("Subnets"),
        "security_group_ids": vpc.get("SecurityGroupIds"),
        "encrypt_inter_container_traffic": request.get("EnableInterContainerTrafficEncryption"),
        "environment": request.get("Environment"),
        "enable_network_isolation": False,
        "disable_profiler": True,
        "debugger_hook_config": False,
        "sagemaker_session": session,
    }
    if not session.local_mode:
        settings |= {
            "use_spot_instances": request.get("EnableManagedSpotTraining", False),
            "max_wait": stopping.get("MaxWaitTimeInSeconds"),
            "checkpoint_s3_uri": request["CheckpointConfig"]["S3Uri"],
            "checkpoint_local_path": request["CheckpointConfig"]["LocalPath"],
            "max_retry_attempts": request.get("RetryStrategy", {}).get("MaximumRetryAttempts"),
        }
        board = request.get("TensorBoardOutputConfig")
        if board:
            settings["tensorboard_output_config"] = TensorBoardOutputConfig(
                s3_output_path=board["S3OutputPath"],
                container_local_output_path=board["LocalPath"],
            )
    return Estimator(**settings)


def _training_inputs(request: Mapping[str, Any]) -> dict[str, Any] | None:
    from sagemaker.inputs import TrainingInput

    return {
        channel["ChannelName"]: TrainingInput(
            channel["DataSource"]["S3DataSource"]["S3Uri"],
            distribution=channel["DataSource"]["S3DataSource"]["S3DataDistributionType"],
            input_mode=channel["InputMode"],
        )
        for channel in request.get("InputDataConfig", [])
    } or None


def _submit_v3(request: Mapping[str, Any], account: AwsAccount) -> None:
    from sagemaker.core.helper.session_helper import Session
    from sagemaker.core.shapes import (
        CheckpointConfig,
        MetricDefinition,
        OutputDataConfig,
        RetryStrategy,
        TensorBoardOutputConfig,
    )
    from sagemaker.core.training.configs import (
        Channel,
        Compute,
        DataSource,
        Networking,
        S3DataSource,
        StoppingCondition,
        Tag,
    )
    from sagemaker.train import ModelTrainer

    algorithm, resources = request["AlgorithmSpecification"], request["ResourceConfig"]
    stopping, vpc = request["StoppingCondition"], request.get("VpcConfig", {})
    session = Session(boto_session=account.session)
    _no_telemetry(session)
    trainer = ModelTrainer(
        training_image=algorithm["TrainingImage"],
        training_input_mode=algorithm["TrainingInputMode"],
        role=request["RoleArn"],
        base_job_name=request["TrainingJobName"][:40].rstrip("-"),
        sagemaker_session=session,
        hyperparameters=dict(request["HyperParameters"]),
        environment=request.get("Environment", {}),
        tags=[Tag(key=tag["Key"], value=tag["Value"]) for tag in request["Tags"]],
        compute=Compute(
            instance_type=resources["InstanceType"],
            instance_count=resources["InstanceCount"],
            volume_size_in_gb=resources["VolumeSizeInGB"],
            volume_kms_key_id=resources.get("VolumeKmsKeyId"),
            keep_alive_period_in_seconds=resources.get("KeepAlivePeriodInSeconds"),
            enable_managed_spot_training=request.get("EnableManagedSpotTraining"),
        ),
        networking=Networking(
            subnets=vpc.get("Subnets"),
            security_group_ids=vpc.get("SecurityGroupIds"),
            enable_inter_container_traffic_encryption=request.get(
                "EnableInterContainerTrafficEncryption"
            ),
        ),
        stopping_condition=StoppingCondition(
            max_runtime_in_seconds=stopping["MaxRuntimeInSeconds"],
            max_wait_time_in_seconds=stopping.get("MaxWaitTimeInSeconds"),
        ),
        output_data_config=OutputDataConfig(
            s3_output_path=request["OutputDataConfig"]["S3OutputPath"],
            kms_key_id=request["OutputDataConfig"].get("KmsKeyId"),
            compression_type="GZIP",
        ),
        checkpoint_config=CheckpointConfig(
            s3_uri=request["CheckpointConfig"]["S3Uri"],
            local_path=request["CheckpointConfig"]["LocalPath"],
        ),
    ).with_metric_definitions(
        [
            MetricDefinition(name=metric["Name"], regex=metric["Regex"])
            for metric in algorithm["MetricDefinitions"]
        ]
    )
    if "RetryStrategy" in request:
        attempts = request["RetryStrategy"]["MaximumRetryAttempts"]
        trainer.with_retry_strategy(RetryStrategy(maximum_retry_attempts=attempts))
    board = request.get("TensorBoardOutputConfig")
    if board:
        trainer.with_tensorboard_output_config(
            TensorBoardOutputConfig(
                s3_output_path=board["S3OutputPath"], local_path=board["LocalPath"]
            )
        )
    channels = [
        Channel(
            channel_name=channel["ChannelName"],
            input_mode=channel["InputMode"],
            data_source=DataSource(
                s3_data_source=S3DataSource(
                    s3_data_type=channel["DataSource"]["S3DataSource"]["S3DataType"],
                    s3_uri=channel["DataSource"]["S3DataSource"]["S3Uri"],
                    s3_data_distribution_type=channel["DataSource"]["S3DataSource"][
                        "S3DataDistributionType"
                    ],
                )
            ),
        )
        for channel in request.get("InputDataConfig", [])
    ]
    with _completed(request, account):
        trainer.train(input_data_config=channels, wait=False, logs=False)


@contextmanager
def _completed(request: Mapping[str, Any], account: AwsAccount) -> Iterator[None]:
    """Add what ModelTrainer has no setting for: the job's name and the profiler switched off.

    It makes up a name of its own, which the output locations would not contain.
    """
    name = request["TrainingJobName"]

    def create(params: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {**params, "TrainingJobName": name, "ProfilerConfig": request["ProfilerConfig"]}

    def describe(params: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {**params, "TrainingJobName": name}

    handlers = {"Create": create, "Describe": describe}
    for call, handler in handlers.items():
        account.session.events.register(
            f"provide-client-params.sagemaker.{call}TrainingJob", handler
        )
    try:
        yield
    finally:
        for call, handler in handlers.items():
            account.session.events.unregister(
                f"provide-client-params.sagemaker.{call}TrainingJob", handler
            )
