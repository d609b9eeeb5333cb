"""An AWS account for tests, over HTTP: moto, plus what it lacks, under the policies of who calls.

Every call is held against the caller's policies and those of buckets and keys (`policies`), as the
account would do; what moto lacks is answered by evaluating the account's own state: policy
simulation by the policies, prices by the filters asked for, image configurations by what was
pushed. A request that breaks the service's model is refused. The command line, SDKs and other
processes reach it by its endpoint.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any
from xml.sax.saxutils import escape

import boto3
import numpy as np
import yaml
from botocore.loaders import create_loader
from brain_to_text.dataset.trial_record import TrialRecord
from brain_to_text.launch.account import AwsAccount
from brain_to_text.launch.image import LABEL, fingerprints
from brain_to_text.launch.request import CODE_FOLDER
from brain_to_text.launch.request_validation import breaches
from brain_to_text.storage.locations import ObjectInfo
from moto.iam.models import iam_backends
from moto.kms.models import Key, kms_backends
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import FakeBucket, s3_backends
from werkzeug import Request, Response
from werkzeug.serving import WSGIRequestHandler, make_server

from .aws_calls import Asked, Call
from .manifests import manifest_of
from .policies import Decision, Document, across_accounts, evaluate, within_account

ACCOUNT = "123456789012"
REGION = "us-east-1"
BUCKET = "speech-data"
PREFIX = "data/hdf5_data_diphone_encoded"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/brain-to-text-training"
REPOSITORY = "brain-to-text-training"
USER = "researcher"
ADMINISTRATOR = "AKIAADMINISTRATOR000"  # may do everything; the tests' own hand
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": ADMINISTRATOR,
    "AWS_SECRET_ACCESS_KEY": "secretsecretsecret",
    "AWS_DEFAULT_REGION": REGION,
}
DOCUMENTS = CODE_FOLDER / "aws"
_shared_loader = functools.cache(create_loader)


@dataclass
class EmulatedAccount:
    """The account's state beyond moto's; tests change it as an administrator would.

    Attributes:
        quotas: by quota name, in `REGION`; what is not named is 0, as in a new account.
        layers: content of pushed image configurations by digest.
        prices: dollars per hour of training by instance type.
        organisation: policies that hold for everybody in the account (their Deny statements).
        foreign_buckets: names of buckets that belong to another account.
        sent: requests of CreateTrainingJob and tuning jobs, as they came over the wire.
    """

    endpoint: str
    region: str = REGION
    account: AwsAccount = field(init=False)
    image_uri: str = ""
    quotas: dict[str, float] = field(default_factory=dict)
    layers: dict[str, bytes] = field(default_factory=dict)
    prices: dict[str, float] = field(default_factory=dict)
    organisation: list[Document] = field(default_factory=list)
    foreign_buckets: set[str] = field(default_factory=set)
    warm_pools: dict[str, str] = field(default_factory=dict)
    sent: list[dict[str, Any]] = field(default_factory=list)

    def client(self, service: str) -> Any:
        """A client of the administrator's."""
        return self._administrator.client(service, endpoint_url=self.endpoint)

    @functools.cached_property
    def _administrator(self) -> boto3.Session:
        secret = CREDENTIALS["AWS_SECRET_ACCESS_KEY"]
        return boto3.Session(ADMINISTRATOR, secret, region_name=self.region)

    @property
    def partition(self) -> str:
        """aws, aws-us-gov or aws-cn."""
        start = self.region.partition("-")[0]
        return {"cn": "aws-cn"}.get(start, "aws-us-gov" if "-gov-" in self.region else "aws")

    @property
    def role(self) -> str:
        """ARN of the stack's role."""
        return ROLE.replace("arn:aws:", f"arn:{self.partition}:")

    @property
    def _iam(self) -> Any:
        return iam_backends[ACCOUNT][self.partition]

    # --- who may what

    def policies_of(self, arn: str) -> list[Document]:
        """The documents attached to a user or role."""
        kind, _, name = arn.split(":", 5)[5].partition("/")
        backend = self._iam
        name = name.rpartition("/")[2]
        owner = backend.get_user(name) if kind == "user" else backend.get_role(name)
        return [_document(str(text)) for text in owner.policies.values()]

    def decision(self, arn: str, action: str, resource: str, context: dict[str, str]) -> Decision:
        """What the caller's own policies and the organisation's say; IAM's simulator stops here."""
        keys = {name.lower(): value for name, value in context.items()}
        for document in self.organisation:
            if evaluate([document], action, resource, keys) == "explicitDeny":
                return "explicitDeny"
        return evaluate(self.policies_of(arn), action, resource, keys)

    def effective(self, arn: str, asked: Asked) -> Decision:
        """What the account does: the caller's policies together with the bucket's or key's."""
        key = self._key(asked.resource) if asked.action.startswith("kms:") else None
        if key is not None:  # it may have been named by an alias
            asked = replace(asked, resource=key.arn)
        mine = self.decision(arn, asked.action, asked.resource, dict(asked.context))
        if key is not None:
            return across_accounts(mine, json.loads(key.policy), arn, asked)
        bucket = self._bucket(asked.resource.split(":::")[-1].partition("/")[0])
        if not asked.action.startswith("s3:") or bucket is None:
            return mine
        combine = across_accounts if bucket.name in self.foreign_buckets else within_account
        return combine(mine, json.loads(bucket.policy or '{"Statement": []}'), arn, asked)

    def refusal(self, call: Call) -> str | None:
        """Why the caller may not do this; None if they may."""
        if call.key == ADMINISTRATOR:
            return None
        user = self._iam.get_user_from_access_key_id(call.key)
        if user is None:
            return f"The access key {call.key} belongs to nobody."
        for asked in (*call.asked(ACCOUNT, self.partition), *self._keys_of_objects(call)):
            found = self.effective(user.arn, asked)
            if found != "allowed":
                why = "with an explicit deny in a service control policy"
                return (
                    f"User: {user.arn} is not authorized to perform: {asked.action} on resource: "
                    f"{asked.resource} {why if found == 'explicitDeny' else ''}".rstrip()
                )
        return None

    def _keys_of_objects(self, call: Call) -> Iterator[Asked]:
        """What reading or writing an encrypted object asks of its key."""
        name, _, key = call.path.strip("/").partition("/")
        bucket = self._bucket(name) if call.service == "s3" and key else None
        through = {"kms:viaservice": f"s3.{self.region}.amazonaws.com"}
        if bucket is None:
            return
        if call.operation == "GetObject" and call.method == "GET" and key in bucket.keys:
            if used := bucket.keys[key].kms_key_id:
                yield Asked("kms:Decrypt", used, through)
        elif call.operation == "PutObject":
            rule = (bucket.encryption or {}).get("Rule", {})
            default = rule.get("ApplyServerSideEncryptionByDefault", {}).get("KMSMasterKeyID")
            if used := call.params.get("kms-key") or default:
                yield Asked("kms:GenerateDataKey", used, through)

    def _bucket(self, name: str) -> FakeBucket | None:
        return s3_backends[ACCOUNT][self.partition].buckets.get(name)

    def _key(self, arn: str) -> Key | None:
        backend = kms_backends[ACCOUNT][self.region]
        name = arn.split(":")[-1]
        key = backend.get_key_id_from_alias(name) if name.startswith("alias/") else name
        return backend.keys.get(str(key).rpartition("/")[2])

    # --- what moto has no service for

    def answer(self, call: Call, request: Request) -> Response | None:
        """Our own answer to a call; None to leave it to moto."""
        handler = getattr(self, f"_{call.service.replace('-', '')}_{call.operation}", None)
        return None if handler is None else handler(call, request)

    def _servicequotas_ListServiceQuotas(self, call: Call, request: Request) -> Response:
        names = sorted(self.quotas)
        start, page = int(call.params.get("NextToken", 0)), 3
        found = [
            {"QuotaName": name, "QuotaCode": _quota_code(name), "Value": self.quotas[name]}
            for name in names[start : start + page]
        ]
        more = {"NextToken": str(start + page)} if start + page < len(names) else {}
        return _json({"Quotas": found, **more})

    def _servicequotas_RequestServiceQuotaIncrease(self, call: Call, request: Request) -> Response:
        (name,) = [n for n in self.quotas if _quota_code(n) == call.params["QuotaCode"]]
        asked = {
            "QuotaName": name,
            "DesiredValue": call.params["DesiredValue"],
            "Status": "PENDING",
        }
        return _json({"RequestedQuota": asked})

    def _pricing_GetProducts(self, call: Call, request: Request) -> Response:
        products: list[dict[str, Any]] = []
        for name, price in self.prices.items():
            for use, factor in (("Host", 2.0), ("Train", 1.0)):
                usage = {"usagetype": f"USE1-{use}:{name}", "component": use}
                attributes = {"regionCode": REGION, "instanceName": name, **usage}
                rate = {"pricePerUnit": {"USD": str(price * factor)}}
                terms = {"OnDemand": {"a": {"priceDimensions": {"b": rate}}}}
                products.append({"product": {"attributes": attributes}, "terms": terms})
        wanted = {f["Field"]: f["Value"] for f in call.params["Filters"]}
        found = [p for p in products if wanted.items() <= p["product"]["attributes"].items()]
        return _json({"PriceList": [json.dumps(product) for product in found]})

    def _iam_SimulatePrincipalPolicy(self, call: Call, request: Request) -> Response:
        form = request.form
        arn = form["PolicySourceArn"]
        if arn.rpartition("/")[2] not in {role.name for role in self._iam.get_roles()}:
            said = "<Code>NoSuchEntity</Code><Message>no such role</Message>"
            return _xml(f"<ErrorResponse><Error>{said}</Error></ErrorResponse>", 404)
        actions = [v for k, v in form.items() if k.startswith("ActionNames.member")]
        resources = [v for k, v in form.items() if k.startswith("ResourceArns.member")] or ["*"]
        entry = re.compile(r"ContextEntries\.member\.(\d+)\.ContextKeyName")
        context = {
            value: form[f"ContextEntries.member.{match[1]}.ContextKeyValues.member.1"]
            for name, value in form.items()
            if (match := entry.fullmatch(name))
        }
        members = "".join(
            f"<member><EvalActionName>{escape(action)}</EvalActionName>"
            f"<EvalResourceName>{escape(resource)}</EvalResourceName>"
            f"<EvalDecision>{self.decision(arn, action, resource, context)}</EvalDecision></member>"
            for action in actions
            for resource in resources
        )
        return _xml(
            "<SimulatePrincipalPolicyResponse><SimulatePrincipalPolicyResult><IsTruncated>false"
            f"</IsTruncated><EvaluationResults>{members}</EvaluationResults>"
            "</SimulatePrincipalPolicyResult></SimulatePrincipalPolicyResponse>"
        )

    def _ecr_GetDownloadUrlForLayer(self, call: Call, request: Request) -> Response:
        digest = call.params["layerDigest"]
        if digest not in self.layers:
            return _json({"__type": "LayersNotFoundException", "message": digest}, 400)
        return _json({"downloadUrl": f"{self.endpoint}/pushed-layers/{digest}"})

    def _sagemaker_CreateTrainingJob(self, call: Call, request: Request) -> Response | None:
        name = call.params["TrainingJobName"]
        if any(sent.get("TrainingJobName") == name for sent in self.sent):
            return _json({"__type": "ResourceInUse", "message": "Names must be unique."}, 400)
        self.sent.append(dict(call.params))
        if call.params["ResourceConfig"].get("KeepAlivePeriodInSeconds"):
            self.warm_pools[name] = "Available"
        return _refused_by_the_model(call)

    def _sagemaker_CreateHyperParameterTuningJob(self, call: Call, request: Request):
        self.sent.append(dict(call.params))
        return _refused_by_the_model(call)

    def _sagemaker_UpdateTrainingJob(self, call: Call, request: Request) -> Response:
        if call.params.get("ResourceConfig") == {"KeepAlivePeriodInSeconds": 0}:
            self.warm_pools[call.params["TrainingJobName"]] = "Terminated"
        return _refused_by_the_model(call) or _json({"TrainingJobArn": "arn:aws:sagemaker:x"})

    def completed(self, call: Call, response: Response) -> Response:
        """moto's answer with what it leaves out."""
        if call.service != "sagemaker" or response.status_code != 200:
            return response
        content = json.loads(response.get_data() or b"{}")
        for job in (
            content,
            *(found.get("TrainingJob", {}) for found in content.get("Results", [])),
        ):
            if job.get("TrainingJobName") in self.warm_pools:
                job["WarmPoolStatus"] = {"Status": self.warm_pools[job["TrainingJobName"]]}
        response.set_data(json.dumps(content))
        return response


def _quota_code(name: str) -> str:
    return "L-" + hashlib.sha256(name.encode()).hexdigest()[:8].upper()


def _refused_by_the_model(call: Call) -> Response | None:
    refused = list(breaches(call.operation, call.params))
    return _json({"__type": "ValidationException", "message": refused[0]}, 400) if refused else None


@functools.cache
def _document(text: str) -> Document:
    """A policy as moto keeps it: as JSON, or, of a stack, as Python writes it, which YAML reads."""
    document = yaml.safe_load(text)
    # moto keeps a stack's AWS::NoValue among the statements, where the service leaves it out
    return {**document, "Statement": [s for s in document["Statement"] if isinstance(s, dict)]}


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(content), status, content_type="application/x-amz-json-1.1")


def _xml(content: str, status: int = 200) -> Response:
    return Response(content, status, content_type="text/xml")


def _denied(call: Call, message: str) -> Response:
    said = f"<Code>AccessDenied</Code><Message>{escape(message)}</Message>"
    if call.service == "s3":
        return _xml(f"<Error>{said}</Error>", 403)
    if call.service in ("iam", "sts", "cloudformation"):
        return _xml(f"<ErrorResponse><Error>{said}</Error></ErrorResponse>", 403)
    return _json({"__type": "AccessDeniedException", "message": message}, 400)


class _Front:
    """The HTTP side: hands calls to the account of the test that runs, then to moto."""

    def __init__(self) -> None:
        self.moto = DomainDispatcherApplication(create_backend_app)
        self.emulated: EmulatedAccount | None = None

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        request = Request(environ)
        if request.path.startswith("/pushed-layers/") and self.emulated:
            content = self.emulated.layers[request.path.rpartition("/")[2]]
            return Response(content)(environ, start_response)
        call = Call.of(request) if request.path != "/moto-api/reset" else None
        if call is None or self.emulated is None:
            return self._from_moto(request)(environ, start_response)
        refusal = self.emulated.refusal(call)
        if refusal is not None:
            return _denied(call, refusal)(environ, start_response)
        own = self.emulated.answer(call, request)
        answer = own or self.emulated.completed(call, self._from_moto(request))
        return answer(environ, start_response)

    def _from_moto(self, request: Request) -> Response:
        body = request.get_data()
        environ = {**request.environ, "CONTENT_LENGTH": str(len(body))}
        environ["wsgi.input"] = io.BytesIO(body)
        environ["wsgi.input_terminated"] = True
        return Response.from_app(self.moto, environ, buffered=True)


class _Silent(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        pass


@functools.cache
def _front() -> tuple[_Front, str]:
    """One server for all tests of this process, and its endpoint."""
    front = _Front()
    server = make_server("127.0.0.1", 0, front, threaded=True, request_handler=_Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return front, f"http://127.0.0.1:{server.server_port}"


@contextmanager
def emulated_aws(monkeypatch: Any, region: str = REGION) -> Iterator[EmulatedAccount]:
    """An empty account in a region, reachable by the standard provider chain."""
    front, endpoint = _front()
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name in ("SAGEMAKER_ROLE", "SAGEMAKER_ROLE_ARN", "BRAIN_TO_TEXT_IMAGE_URI"):
        monkeypatch.delenv(name, raising=False)
    place = {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": region}
    for name, value in {**CREDENTIALS, **place}.items():
        monkeypatch.setenv(name, value)
    # reading the service models again for every test's session takes most of its time
    monkeypatch.setattr("botocore.session.create_loader", _shared_loader)
    front.emulated = None
    reset = urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")
    for _ in range(3):  # a request of the test before may still be under way, and break this one
        with suppress(ConnectionError):
            urllib.request.urlopen(reset).read()
            break
    else:
        raise AssertionError(f"the emulation at {endpoint} does not answer")
    emulated = front.emulated = EmulatedAccount(endpoint, region)
    emulated.quotas = {
        f"{kind} for {use}": 2.0
        for kind in ("ml.g5.2xlarge", "ml.g4dn.xlarge", "ml.g5.12xlarge")
        for use in ("training job usage", "spot training job usage")
    }
    emulated.prices = {"ml.g5.2xlarge": 1.5}
    emulated.account = AwsAccount(region)
    try:
        yield emulated
    finally:
        front.emulated = None


def ready_to_train(emulated: EmulatedAccount, monkeypatch: Any) -> None:
    """Fill the account: bucket, dataset, role and repository of the stack, image of this code; and
    log in as somebody who holds the launcher's policy."""
    emulated.client("s3").create_bucket(Bucket=BUCKET)
    put_dataset(emulated)
    deploy_stack(emulated)
    emulated.image_uri = put_image(emulated, {LABEL: json.dumps(fingerprints())})
    log_in(emulated, monkeypatch, launcher_policy())


def deploy_stack(emulated: EmulatedAccount, **parameters: str) -> None:
    """code/aws/stack.yaml, as `aws cloudformation deploy` would."""
    given = {"DataBucket": BUCKET, **parameters}
    template = (DOCUMENTS / "stack.yaml").read_text()
    emulated.client("cloudformation").create_stack(
        StackName="brain-to-text",
        # moto knows one partition
        TemplateBody=template.replace("${AWS::Partition}", emulated.partition),
        Capabilities=["CAPABILITY_NAMED_IAM"],
        Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in given.items()],
    )


def launcher_policy(without: str | None = None) -> dict[str, Any]:
    """code/aws/launcher_policy.json for this account, perhaps without one action."""
    return policy_document("launcher_policy.json", without)


def policy_document(name: str, without: str | None = None) -> dict[str, Any]:
    """A document of code/aws for this account, perhaps without one action."""
    text = (DOCUMENTS / name).read_text()
    blanks = {"YOUR-BUCKET": BUCKET, "YOUR-REGION": REGION, "YOUR-ACCOUNT": ACCOUNT}
    for blank, value in blanks.items():
        text = text.replace(blank, value)
    policy: dict[str, Any] = json.loads(text)
    for statement in policy["Statement"] if without else ():
        actions = statement["Action"]
        listed = [actions] if isinstance(actions, str) else actions
        statement["Action"] = [action for action in listed if action != without]
    policy["Statement"] = [statement for statement in policy["Statement"] if statement["Action"]]
    return policy


def log_in(emulated: EmulatedAccount, monkeypatch: Any, policy: Document) -> None:
    """Become a user with this policy: in the environment, and in `emulated.account`."""
    iam = emulated.client("iam")
    if not [u for u in iam.list_users()["Users"] if u["UserName"] == USER]:
        iam.create_user(UserName=USER)
        key = iam.create_access_key(UserName=USER)["AccessKey"]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        emulated.account = AwsAccount(emulated.region)
    iam.put_user_policy(UserName=USER, PolicyName="launcher", PolicyDocument=json.dumps(policy))


def assert_no_credentials(printed: str) -> None:
    """None of the credentials in use stands in what a command printed."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        if secret := os.environ.get(name):
            assert secret not in printed, name


def make_key(emulated: EmulatedAccount, policy: Document | None = None) -> str:
    """Make a customer's key; its ARN. Without a policy IAM's policies decide, as in KMS."""
    given = {} if policy is None else {"Policy": json.dumps(policy)}
    return str(emulated.client("kms").create_key(**given)["KeyMetadata"]["Arn"])


def archive(emulated: EmulatedAccount, key: str, storage_class: str = "GLACIER") -> None:
    """Move an object to another storage class, as a lifecycle rule does."""
    emulated.client("s3").copy_object(
        Bucket=BUCKET, Key=key, CopySource=f"{BUCKET}/{key}", StorageClass=storage_class
    )


def allow_role(emulated: EmulatedAccount, policy: Document) -> None:
    """Replace what the stack lets the job's role do."""
    emulated.client("iam").put_role_policy(
        RoleName=ROLE.rpartition("/")[2],
        PolicyName="training-job",
        PolicyDocument=json.dumps(policy),
    )


def put_image(
    emulated: EmulatedAccount,
    labels: dict[str, str] | None = None,
    architecture: str = "amd64",
    tag: str | None = None,
    index: bool = False,
) -> str:
    """Push an image as build_and_push.sh does, or an index of one image; returns its digest URI."""
    config = {"architecture": architecture, "config": {"Labels": labels or {}}}
    content = json.dumps(config).encode()
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    emulated.layers[digest] = content
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    held = {"mediaType": kind, "digest": digest, "size": len(content)}
    manifest: dict[str, Any] = {"schemaVersion": 2, "mediaType": kind}
    if index:
        manifest["mediaType"] = "application/vnd.oci.image.index.v1+json"
        manifest["manifests"] = [
            {**held, "platform": {"architecture": architecture, "os": "linux"}}
        ]
    else:
        image = "application/vnd.docker.container.image.v1+json"
        manifest |= {"config": {**held, "mediaType": image}, "layers": []}
    text = json.dumps(manifest)
    own = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    emulated.client("ecr").put_image(
        repositoryName=REPOSITORY, imageManifest=text, imageTag=tag or own[7:15], imageDigest=own
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
            content = f"{key} of {n_features}".encode().ljust(60 * n_features * 4)
            etag = s3.put_object(Bucket=BUCKET, Key=f"{prefix}/{key}", Body=content)["ETag"]
            files[key] = ObjectInfo(key, len(content), etag.strip('"'))
            trials.append(
                TrialRecord(
                    session=session,
                    split=split,
                    key=key,
                    trial="trial_0000",
                    n_time_steps=60,
                    n_features=n_features,
                    dtype="<f4",
                    offset=0,
                    length=60 * n_features * 4,
                    crc32=0,
                    class_ids=np.array([42] if n_classes == 1681 else [1], np.int32),
                    phoneme_ids=np.array([1], np.int32),
                )
            )
    form = "self_loop" if n_classes == 1681 else "phoneme"
    manifest = manifest_of(trials, files, n_features, form)
    s3.put_object(Bucket=BUCKET, Key=f"{prefix}/trial_manifest.json.gz", Body=manifest.to_bytes())
