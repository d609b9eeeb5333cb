"""Which IAM actions a call over the wire asks for, on which resources, with which condition keys.

From the Service Authorization Reference, for the calls that our commands make. A call that is not
listed asks for `service:Operation` on `*`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from werkzeug import Request

PREFIXES = {"monitoring": "cloudwatch"}  # signing name -> prefix of actions, where they differ


@dataclass(frozen=True)
class Asked:
    """One question to IAM; condition keys in lower case."""

    action: str
    resource: str
    context: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """A request to AWS: who, where, which service and operation, and with what parameters."""

    key: str
    region: str
    service: str
    operation: str
    params: Mapping[str, Any]
    path: str
    method: str

    @classmethod
    def of(cls, request: Request) -> Call | None:
        """The call in an HTTP request; None for one that is not signed."""
        scope = re.search(
            r"Credential=([^/]+)/\d+/([\w-]+)/([\w-]+)/", request.headers.get("Authorization", "")
        )
        if scope is None:
            return None
        key, region, service = scope.groups()
        body = request.get_data()  # first: reading the form would leave nothing
        params: Mapping[str, Any] = {}
        if target := request.headers.get("X-Amz-Target"):
            operation = target.rpartition(".")[2]
            params = json.loads(body or b"{}")
        elif service == "s3":
            operation = _s3_operation(request)
            params = {
                "prefix": request.args.get("prefix", ""),
                "kms-key": request.headers.get("x-amz-server-side-encryption-aws-kms-key-id"),
            }
        else:
            params = request.form.to_dict() or request.args.to_dict()
            operation = params.get("Action", "")
        return cls(key, region, service, operation, params, request.path, request.method)

    def asked(self, account: str, partition: str = "aws") -> Iterator[Asked]:
        """Every action that must be allowed for this call."""
        prefix = PREFIXES.get(self.service, self.service)
        make = {"s3": _s3, "sagemaker": _sagemaker, "ecr": _ecr, "logs": _logs, "iam": _iam}
        make["kms"] = _kms
        if (self.service, self.operation) == ("sts", "GetCallerIdentity"):
            return
        if self.service not in make:
            yield Asked(f"{prefix}:{self.operation}", "*")
            return
        for asked in make[self.service](self, account):
            place = asked.resource.replace("arn:aws:", f"arn:{partition}:", 1)
            yield replace(asked, resource=place)


def _s3_operation(request: Request) -> str:
    key = request.path.strip("/").partition("/")[2]
    if key:
        return {"GET": "GetObject", "HEAD": "GetObject", "DELETE": "DeleteObject"}.get(
            request.method, "PutObject"
        )
    if request.method == "GET" and "location" in request.args:
        return "GetBucketLocation"
    if request.method == "GET" and "encryption" in request.args:
        return "GetEncryptionConfiguration"
    return {"PUT": "CreateBucket", "DELETE": "DeleteBucket"}.get(request.method, "ListBucket")


def _s3(call: Call, account: str) -> Iterator[Asked]:
    prefix = {"s3:prefix": call.params["prefix"]} if call.operation == "ListBucket" else {}
    yield Asked(f"s3:{call.operation}", f"arn:aws:s3:::{call.path.lstrip('/')}".rstrip("/"), prefix)


def _kms(call: Call, account: str) -> Iterator[Asked]:
    given = str(call.params.get("KeyId", "*"))
    place = f"arn:aws:kms:{call.region}:{account}"
    key = (
        given
        if given.startswith("arn:")
        else f"{place}:{given if '/' in given else f'key/{given}'}"
    )
    yield Asked(f"kms:{call.operation}", key)


def _sagemaker(call: Call, account: str) -> Iterator[Asked]:
    place = f"arn:aws:sagemaker:{call.region}:{account}"
    name, operation = call.params.get("TrainingJobName"), call.operation
    tuning = call.params.get("HyperParameterTuningJobName")
    resource = "*"
    if name:
        resource = f"{place}:training-job/{name.lower()}"
    elif tuning:
        resource = f"{place}:hyper-parameter-tuning-job/{tuning.lower()}"
    yield Asked(f"sagemaker:{operation}", resource, dict(_keys(call.params)))
    if call.params.get("Tags"):
        yield Asked("sagemaker:AddTags", resource)
    role = call.params.get("RoleArn") or call.params.get("TrainingJobDefinition", {}).get("RoleArn")
    if role:
        yield Asked("iam:PassRole", role, {"iam:passedtoservice": "sagemaker.amazonaws.com"})


def _keys(params: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The condition keys that SageMaker fills in for CreateTrainingJob, as far as anyone asks."""
    if kind := params.get("ResourceConfig", {}).get("InstanceType"):
        yield "sagemaker:instancetypes", kind
        isolated = params.get("EnableNetworkIsolation", False)
        yield "sagemaker:networkisolation", str(isolated).lower()


def _ecr(call: Call, account: str) -> Iterator[Asked]:
    names = call.params.get("repositoryNames") or [call.params.get("repositoryName")]
    for name in names:
        place = f"arn:aws:ecr:{call.region}:{account}:repository/{name}" if name else "*"
        yield Asked(f"ecr:{call.operation}", place)


def _logs(call: Call, account: str) -> Iterator[Asked]:
    group = call.params.get("logGroupName", "")
    stream = call.params.get("logStreamName", "")
    place = f"arn:aws:logs:{call.region}:{account}:log-group:{group}:log-stream:{stream}"
    yield Asked(f"logs:{call.operation}", place)


def _iam(call: Call, account: str) -> Iterator[Asked]:
    name, source = call.params.get("RoleName"), call.params.get("PolicySourceArn")
    resource = source or (f"arn:aws:iam::{account}:role/{name}" if name else "*")
    yield Asked(f"iam:{call.operation}", resource)
