"""An AWS account for tests: moto, plus what it lacks, plus a ready-to-train set-up.

Price list, service quotas, policy simulation, MLflow servers and image layers are answered by
handlers on the session's events, so that the code under test makes its real calls.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from botocore.loaders import create_loader
from brain_to_text.dataset.manifest import FileRecord, TrialManifest
from brain_to_text.dataset.trial_record import TrialRecord
from brain_to_text.launch.account import AwsAccount
from moto import mock_aws

ACCOUNT = "123456789012"
REGION = "us-east-1"
BUCKET = "speech-data"
PREFIX = "data/hdf5_data_diphone_encoded"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/brain-to-text-training"
REPOSITORY = "brain-to-text-training"
TRUST = {
    "Version": "2012-10-17",
    "Statement": [
        {
            "Effect": "Allow",
            "Principal": {"Service": "sagemaker.amazonaws.com"},
            "Action": "sts:AssumeRole",
        }
    ],
}
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "secretsecretsecret",
    "AWS_DEFAULT_REGION": REGION,
}


_shared_loader = functools.cache(create_loader)


@dataclass
class EmulatedAccount:
    """The account, and what its emulated extra services answer; tests change the answers.

    Attributes:
        quotas: by quota name. denied: actions that the policy simulation refuses.
        isolation_demanded: it refuses training jobs without network isolation.
        mlflow_servers: "Active" or "Inactive" by name. layers: content by digest.
        prices: dollars per hour by instance type. refused: services that answer AccessDenied.
        sent: the request bodies of CreateTrainingJob, as they went over the wire.
    """

    account: AwsAccount
    image_uri: str = ""
    quotas: dict[str, float] = field(default_factory=dict)
    denied: set[str] = field(default_factory=set)
    isolation_demanded: bool = False
    mlflow_servers: dict[str, str] = field(default_factory=dict)
    layers: dict[str, bytes] = field(default_factory=dict)
    prices: dict[str, float] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    sent: list[dict[str, Any]] = field(default_factory=list)

    def client(self, service: str) -> Any:
        return self.account.client(service)


@contextmanager
def emulated_aws(monkeypatch: Any) -> Iterator[EmulatedAccount]:
    """An empty account in us-east-1, reachable by the standard provider chain."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_REGION", "SAGEMAKER_ROLE", "SAGEMAKER_ROLE_ARN", "BRAIN_TO_TEXT_IMAGE_URI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    # reading the service models again for every test's session takes most of its time
    monkeypatch.setattr("botocore.session.create_loader", _shared_loader)
    with mock_aws():
        emulated = EmulatedAccount(AwsAccount(REGION))
        emulated.quotas = {
            f"{kind} for {use}": 2.0
            for kind in ("ml.g5.2xlarge", "ml.g4dn.xlarge", "ml.g5.12xlarge")
            for use in ("training job usage", "spot training job usage")
        }
        emulated.prices = {"ml.g5.2xlarge": 1.5}
        _answer(emulated)
        yield emulated


def ready_to_train(emulated: EmulatedAccount) -> None:
    """Fill the account: bucket, dataset with a fresh manifest, role, image."""
    emulated.client("s3").create_bucket(Bucket=BUCKET)
    put_dataset(emulated)
    emulated.client("iam").create_role(
        RoleName=ROLE.rsplit("/", 1)[-1], AssumeRolePolicyDocument=json.dumps(TRUST)
    )
    emulated.client("ecr").create_repository(repositoryName=REPOSITORY)
    emulated.image_uri = put_image(emulated, "amd64")


def put_image(emulated: EmulatedAccount, architecture: str) -> str:
    """Push an image index for one architecture; returns its digest URI."""
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [
            {
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": "sha256:" + hashlib.sha256(architecture.encode()).hexdigest(),
                "size": 2,
                "platform": {"architecture": architecture, "os": "linux"},
            }
        ],
    }
    image = emulated.client("ecr").put_image(
        repositoryName=REPOSITORY, imageManifest=json.dumps(manifest), imageTag=architecture
    )["image"]
    host = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com"
    return f"{host}/{REPOSITORY}@{image['imageId']['imageDigest']}"


def put_labelled_image(emulated: EmulatedAccount, labels: dict[str, str]) -> str:
    """Push a plain image, as build_and_push.sh does, with labels; returns its digest URI."""
    config = json.dumps({"architecture": "amd64", "config": {"Labels": labels}}).encode()
    digest = "sha256:" + hashlib.sha256(config).hexdigest()
    emulated.layers[digest] = config
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {
            "mediaType": "application/vnd.docker.container.image.v1+json",
            "digest": digest,
            "size": len(config),
        },
        "layers": [],
    }
    text = json.dumps(manifest)
    own = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    emulated.client("ecr").put_image(
        repositoryName=REPOSITORY, imageManifest=text, imageTag=own[7:15], imageDigest=own
    )
    return f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/{REPOSITORY}@{own}"


def put_dataset(
    emulated: EmulatedAccount,
    prefix: str = PREFIX,
    *,
    sessions: int = 4,
    n_features: int = 512,
    n_classes: int = 1681,
    splits: tuple[str, ...] = ("train", "val"),
) -> None:
    """Objects named like a dataset, and the manifest that fits them."""
    s3 = emulated.client("s3")
    files, trials = {}, []
    for number in range(sessions):
        for split in splits:
            session = f"t15.2023.08.{11 + number}"
            key = f"{session}/data_{split}.hdf5"
            content = f"{key} of {n_features}".encode()
            etag = s3.put_object(Bucket=BUCKET, Key=f"{prefix}/{key}", Body=content)["ETag"]
            files[key] = FileRecord(len(content), etag.strip('"'))
            trials.append(
                TrialRecord(
                    session=session,
                    split=split,
                    key=key,
                    trial="trial_0000",
                    n_time_steps=2,
                    n_features=n_features,
                    dtype="<f4",
                    offset=0,
                    length=2 * n_features * 4,
                    crc32=0,
                    class_ids=np.array([42], np.int32),
                    phoneme_ids=np.array([1], np.int32),
                )
            )
    form = "self_loop" if n_classes == 1681 else "phoneme"
    manifest = TrialManifest(tuple(trials), files, n_features, n_classes, form)
    s3.put_object(Bucket=BUCKET, Key=f"{prefix}/trial_manifest.json.gz", Body=manifest.to_bytes())


def _answer(emulated: EmulatedAccount) -> None:
    """Handlers for what moto does not implement, and a recorder of what is sent."""
    events = emulated.account.session.events

    def parsed(answer: dict[str, Any], status: int = 200) -> tuple[Any, dict[str, Any]]:
        return SimpleNamespace(status_code=status), answer

    def refusable(service: str, answer: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
        def handler(params: dict[str, Any], **_: Any) -> tuple[Any, dict[str, Any]]:
            if service in emulated.refused:
                refusal = {"Code": "AccessDeniedException", "Message": "not authorized"}
                return parsed({"Error": refusal}, 403)
            return parsed(answer(params))

        return handler

    def quotas(_: dict[str, Any]) -> dict[str, Any]:
        return {"Quotas": [{"QuotaName": k, "Value": v} for k, v in emulated.quotas.items()]}

    def simulate(params: dict[str, Any]) -> dict[str, Any]:
        body = params["body"]
        action = next(value for name, value in body.items() if name.startswith("ActionNames"))
        denied = action in emulated.denied
        if action == "sagemaker:CreateTrainingJob" and emulated.isolation_demanded:
            entries = {name: value for name, value in body.items() if "ContextEntries" in name}
            key = next(n for n, v in entries.items() if v == "sagemaker:NetworkIsolation")
            place = key.rsplit(".", 1)[0]
            denied = "true" not in [v for n, v in entries.items() if n.startswith(place)]
        decision = "implicitDeny" if denied else "allowed"
        return {"EvaluationResults": [{"EvalActionName": action, "EvalDecision": decision}]}

    def products(params: dict[str, Any]) -> dict[str, Any]:
        filters = json.loads(params["body"])["Filters"]
        wanted = {entry["Field"]: entry["Value"] for entry in filters}
        name = wanted["instanceName"]
        found = []
        for usage, factor in ((f"USE1-Host:{name}", 2.0), (f"USE1-Train:{name}", 1.0)):
            if name in emulated.prices:
                price = {"pricePerUnit": {"USD": str(emulated.prices[name] * factor)}}
                found.append(
                    json.dumps(
                        {
                            "product": {"attributes": {"usagetype": usage}},
                            "terms": {"OnDemand": {"a": {"priceDimensions": {"b": price}}}},
                        }
                    )
                )
        return {"PriceList": found}

    def mlflow_server(params: dict[str, Any], **_: Any) -> tuple[Any, dict[str, Any]]:
        name = json.loads(params["body"])["TrackingServerName"]
        state = emulated.mlflow_servers.get(name)
        if state is None:
            return parsed({"Error": {"Code": "ResourceNotFound", "Message": name}}, 400)
        status = {"Active": "Started", "Inactive": "Stopped"}[state]
        return parsed({"IsActive": state, "TrackingServerStatus": status})

    def layer(params: dict[str, Any], **_: Any) -> tuple[Any, dict[str, Any]]:
        digest = json.loads(params["body"])["layerDigest"]
        if digest not in emulated.layers:
            return parsed({"Error": {"Code": "LayersNotFoundException", "Message": digest}}, 400)
        content = base64.b64encode(emulated.layers[digest]).decode()
        return parsed({"downloadUrl": f"data:application/json;base64,{content}"})

    def record(params: dict[str, Any], **_: Any) -> None:
        body = params["body"]
        text = gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
        emulated.sent.append(json.loads(text))

    events.register(
        "before-call.service-quotas.ListServiceQuotas", refusable("service-quotas", quotas)
    )
    events.register("before-call.iam.SimulatePrincipalPolicy", refusable("iam", simulate))
    events.register("before-call.pricing.GetProducts", refusable("pricing", products))
    events.register("before-call.sagemaker.DescribeMlflowTrackingServer", mlflow_server)
    events.register("before-call.ecr.GetDownloadUrlForLayer", layer)
    events.register("before-call.sagemaker.CreateTrainingJob", record)
