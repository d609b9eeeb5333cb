"""Every S3 call ends in time: with the right bytes, or with one sentence of cause and advice."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import re
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from brain_to_text.dataset.indexing import index_dataset, load_or_build_manifest
from brain_to_text.dataset.manifest import write_manifest
from brain_to_text.errors import BrainToTextError, StorageError
from brain_to_text.storage import s3_store
from brain_to_text.storage.locations import MANIFEST_NAME, ObjectInfo
from brain_to_text.storage.retry import RetryPolicy
from brain_to_text.storage.s3_store import S3Store
from brain_to_text.storage.store import open_store
from brain_to_text.streaming.trial_stream import TrialStream
from support.fuzzing import rounds
from support.local_s3 import LocalS3
from support.scripted_s3 import Answer, Objects, Request, Script, error, etag, scripted_s3
from support.small_data import SESSIONS, write_small_dataset

# as many attempts as a busy machine needs, or three; as long as it needs, or soon given up
PATIENT = RetryPolicy(600, 60, 0.01, 0.05)
ONCE = RetryPolicy(0, 60, 0.01, 0.05)
QUICK = RetryPolicy(0, 0.3, 0.01, 0.05, slowest_bytes_per_second=1e8)
AGAIN = RetryPolicy(600, 1, 0.01, 0.05, slowest_bytes_per_second=1e8)
BODY = bytes(range(256)) * 4
KEY = f"{SESSIONS[0]}/data_train.hdf5"
PORTAL = b"<!DOCTYPE html>\n<html><body>Welcome to Hotel Wi-Fi. <a href='/login'>Log in</a>"
OBJECTS = Objects({"b/p/x": BODY, "b/p/s/data_train.hdf5": b"12", "b/q": b"no"})


class Server:
    """One server and two stores, "s3://b/p", for all tests: making an S3 client takes a second."""

    def __init__(self, endpoint: str, asked: list[Request]) -> None:
        self.environment = LocalS3(endpoint, Path()).environment()
        self.asked = asked
        self.script: Script = OBJECTS
        self.stores: dict[RetryPolicy, S3Store] = {}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with scripted_s3(lambda request, number: found.script(request, number)) as serving:
        found = Server(*serving)
        yield found


@pytest.fixture
def at(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., S3Store]:
    """at(script, policy): the store of a server that answers so, to its first request as no. 0."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)

    def serve(script: Script, policy: RetryPolicy = PATIENT) -> S3Store:
        server.asked.clear()
        server.script = script
        store = server.stores.setdefault(policy, S3Store("s3://b/p", retry=policy))
        store._clients._suitable = None  # obstore may do again
        return store

    return serve


def archived(answer: Answer) -> Answer:
    return error(403, "InvalidObjectState", "The operation is not valid for the storage class")


KMS_KEY = "arn:aws:kms:us-east-1:123456789012:key/1111"
KMS = (
    "User: arn:aws:sts::123456789012:assumed-role/r/s is not authorized to perform: kms:Decrypt on "
    f"resource: {KMS_KEY} because no identity-based policy allows the kms:Decrypt action"
)
# What goes wrong with an answer for long, with the time limit as its only end.
LASTING: dict[str, Callable[[Answer], Answer]] = {
    "a stalled answer": lambda a: Answer(a.status, a.body, a.headers, silent=600),
    "one byte a second": lambda a: Answer(a.status, a.body, a.headers, pace=0.1),
    "a dropped connection": lambda a: Answer(a.status, a.body, a.headers, drop=0),
    "a cut body": lambda a: Answer(a.status, a.body, a.headers, drop=len(a.body) // 2),
    "slow down": lambda a: error(503, "SlowDown"),
    "a portal's redirect": lambda a: Answer(302, PORTAL, {"Location": "http://127.0.0.1:9/login"}),
}
# An answer that is final when it comes often enough; what is said of it, then the advice.
FINAL: dict[str, tuple[Callable[[Answer], Answer], str, str]] = {
    "an expired token": (lambda a: error(400, "ExpiredToken"), "ExpiredToken", "aws sso login"),
    "a wrong clock": (lambda a: error(403, "RequestTimeTooSkewed"), "Skewed", "timedatectl"),
    "a wrong secret": (
        lambda a: error(403, "SignatureDoesNotMatch"),
        "SignatureDoesNotMatch",
        "the secret key does not belong to the access key",
    ),
    "no permission": (
        lambda a: error(403, "AccessDenied", "No"),
        "access denied (HTTP 403 AccessDenied: No)",
        "allow s3:GetObject and s3:ListBucket for these credentials; test with 'aws s3 ls s3://b/p",
    ),
    "no bucket": (lambda a: error(404, "NoSuchBucket"), "there is no bucket 'b'", "aws s3 ls"),
    "no KMS": (lambda a: error(403, "AccessDenied", KMS), KMS, f"allow kms:Decrypt on {KMS_KEY}"),
    "an archive": (archived, "is not valid for the storage class", "aws s3api restore-object"),
    "a captive portal": (
        lambda a: Answer(200, PORTAL, {"Content-Type": "text/html"}),
        "web page instead of S3's answer",
        "log in there",
    ),
}


def test_without_faults_the_answer_is_right(at, monkeypatch) -> None:
    monkeypatch.setattr(s3_store, "PART_BYTES", 300)
    store = at(OBJECTS)
    assert store.list() == {
        "x": ObjectInfo("x", len(BODY), etag(BODY)),
        "s/data_train.hdf5": ObjectInfo("s/data_train.hdf5", 2, etag(b"12")),
    }
    assert store.read("x") == BODY, "in parts"
    assert store.read("x", 100, 200) == BODY[100:300]
    assert store.exists("x") and not store.exists("y")


@pytest.mark.parametrize("fault", LASTING)
def test_a_fault_that_lasts_is_one_sentence_after_three_attempts_and_one_that_passes_is_not_seen(
    fault: str, at
) -> None:
    store = at(lambda request, number: LASTING[fault](OBJECTS(request)), QUICK)
    for call in (store.list, lambda: store.read("x", 0, len(BODY))):
        with pytest.raises(StorageError, match=r"Cannot (list|read) s3://b/p.*after 3 attem") as it:
            call()
        assert "\n" not in str(it.value) and str(it.value).endswith(".")
    policy = AGAIN if fault in ("a stalled answer", "one byte a second") else PATIENT

    def once(request: Request, number: int) -> Answer:
        answer = OBJECTS(request)
        return answer if number else LASTING[fault](answer)

    assert at(once, policy).read("x", 0, len(BODY)) == BODY
    assert len(at(once, policy).list()) == 2


@pytest.mark.parametrize("fault", FINAL)
def test_an_answer_that_is_final_is_said_soon_in_the_services_own_words(
    fault: str, at, server
) -> None:
    change, cause, advice = FINAL[fault]
    store = at(lambda request, number: change(OBJECTS(request)))
    calls = [lambda: store.read("x", 0, len(BODY))]  # by obstore
    if fault not in ("an archive", "no KMS"):
        calls.append(store.list)  # by s3fs
    for call in calls:
        server.asked.clear()
        with pytest.raises(StorageError) as raised:
            call()
        message = str(raised.value)
        assert message.startswith("Cannot ") and cause in message and advice in message
        # obstore refuses a range with status 200, whatever it holds: s3fs reads it again
        by_both = fault == "a captive portal" and "Cannot read" in message
        assert len(server.asked) == (1 if fault == "an archive" else 4 if by_both else 3)


def test_a_server_that_nobody_runs_is_said(at, monkeypatch) -> None:
    at(OBJECTS)
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    store = S3Store("s3://b/p", retry=ONCE)
    for call in (store.list, lambda: store.read("x", 0, 1)):
        with pytest.raises(StorageError, match=r"ConnectionRefused|endpoint cannot be reached"):
            call()


def test_a_read_of_unknown_size_says_why_although_head_cannot(at) -> None:
    def denied(request: Request, number: int) -> Answer:
        return Answer(403) if request.kind == "head" else error(403, "AccessDenied", KMS)

    with pytest.raises(StorageError, match="kms:Decrypt"):
        at(denied).read("x")


def test_a_listing_of_many_pages_ends_or_is_an_error(at, monkeypatch) -> None:
    def pages(request: Request, number: int) -> Answer:
        token = int(request.query.get("continuation-token", 0))
        objects = Objects({f"b/p/{token}-{i}": b"1" for i in range(3)})
        return Answer(200, objects.listing("b", "p/", str(token + 1) if token < 4 else ""))

    store = at(pages)
    assert len(store.list()) == 15
    monkeypatch.setattr(s3_store, "_MOST_PAGES", 4)
    with pytest.raises(StorageError, match=r"does not end after 4 pages; give the prefix"):
        store.list()


def test_a_listing_without_etags_is_taken(at) -> None:
    def bare(request: Request, number: int) -> Answer:
        return Answer(200, re.sub(rb"<ETag>.*?</ETag>", b"", OBJECTS(request).body))

    assert at(bare).list()["x"] == ObjectInfo("x", len(BODY), "")


def test_an_answer_of_another_kind_is_no_empty_listing(at) -> None:
    for body in (b"<html><head/><body>Log in</body></html>", b"{}", b"<a/>", b""):
        store = at(lambda request, number, body=body: Answer(200, body), ONCE)
        with pytest.raises(StorageError, match=r"instead of S3's answer|not S3's|HTTP 500"):
            store.list()


def test_what_is_archived_and_not_restored_is_known_from_the_listing(at) -> None:
    def glacier(request: Request, number: int) -> Answer:
        assert request.headers["x-amz-optional-object-attributes"] == "RestoreStatus"
        restored = (
            "<RestoreStatus><IsRestoreInProgress>false</IsRestoreInProgress><RestoreExpiryDate>"
            "2026-12-24T00:00:00Z</RestoreExpiryDate></RestoreStatus>"
        )
        body = OBJECTS(request).body.replace(
            b"</Size>", b"</Size><StorageClass>GLACIER</StorageClass>"
        )
        return Answer(
            200, body.replace(b"</StorageClass>", f"</StorageClass>{restored}".encode(), 1)
        )

    listing = at(glacier).list()
    assert {key: info.storage_class for key, info in listing.items()} == {
        "s/data_train.hdf5": "STANDARD",
        "x": "GLACIER",
    }


def test_an_object_that_is_replaced_while_it_is_read_is_not_mixed(at, monkeypatch) -> None:
    monkeypatch.setattr(s3_store, "PART_BYTES", 100)

    def replaced(request: Request, number: int) -> Answer:
        answer = OBJECTS(request)
        answer.headers["ETag"] = f'"{number}"'
        return answer

    with pytest.raises(StorageError, match="was replaced while it was read; try again"):
        at(replaced).read("x", 0, len(BODY))


def parts(request: Request, number: int) -> Answer:
    """Takes an upload in parts."""
    if request.method == "POST" and "uploadId" not in request.query:
        text = "<InitiateMultipartUploadResult><UploadId>7</UploadId>"
        return Answer(200, f"{text}</InitiateMultipartUploadResult>".encode())
    if request.method == "POST":
        return Answer(200, b"<CompleteMultipartUploadResult/>")
    return Answer(204) if request.method == "DELETE" else OBJECTS(request)


def test_a_large_object_is_written_in_parts_and_half_of_one_is_given_up(
    at, server, monkeypatch
) -> None:
    monkeypatch.setattr(s3_store, "PART_BYTES", 100)

    def refused(request: Request, number: int) -> Answer:
        if request.method == "PUT" and request.query.get("partNumber") == "3":
            return error(403, "AccessDenied")
        return parts(request, number)

    store = at(refused)
    with pytest.raises(StorageError, match=r"Cannot write .*allow s3:PutObject"):
        store.write("x", BODY)
    methods = {request.method for request in server.asked}  # a part may still arrive after it
    assert "DELETE" in methods, "what was uploaded of it costs money until then"


def test_writes_carry_the_encryption_header_and_a_policy_that_demands_it_is_named(
    at, server, monkeypatch
) -> None:
    def demanding(request: Request, number: int) -> Answer:
        begins = request.kind == "put" or "uploadId" not in request.query
        if begins and "x-amz-server-side-encryption" not in request.headers:
            words = "not authorized to perform: s3:PutObject with an explicit deny in a policy"
            return error(403, "AccessDenied", words)
        return parts(request, number)

    with pytest.raises(StorageError, match=r"explicit deny.*or set S3_KMS_KEY_ID to the ARN"):
        at(demanding).write("x", BODY)
    monkeypatch.setenv("S3_KMS_KEY_ID", KMS_KEY)
    encrypting = S3Store("s3://b/p", retry=PATIENT)
    encrypting.write("x", BODY)
    header = server.asked[-1].headers
    assert header["x-amz-server-side-encryption"] == "aws:kms"
    assert header["x-amz-server-side-encryption-aws-kms-key-id"] == KMS_KEY
    monkeypatch.setattr(s3_store, "PART_BYTES", 100)
    at(parts)
    encrypting.write("x", BODY)
    assert [r.headers.get("x-amz-server-side-encryption") for r in server.asked] == [
        "aws:kms",
        *[None] * (len(server.asked) - 1),
    ]


# --- trials ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ü%20#?&+= b", "x~!@$^()[]{}'日本"])
def test_sessions_of_any_name_are_listed_indexed_and_read(name: str, at, tmp_path) -> None:
    write_small_dataset(tmp_path)
    os.rename(tmp_path / SESSIONS[0], tmp_path / name)  # noqa: PTH104
    objects = {f"b/p/{p.relative_to(tmp_path)}": p.read_bytes() for p in tmp_path.rglob("*.hdf5")}
    store = at(Objects(objects))
    assert {key.split("/")[0] for key in store.list()} == {name, SESSIONS[1]}
    manifest = index_dataset(open_store(tmp_path))
    key = f"{name}/data_train.hdf5"
    assert store.read(key) == objects[f"b/p/{key}"]
    record = manifest.trials[0]
    span = objects[f"b/p/{record.key}"][record.offset : record.offset + record.length]
    with TrialStream(store, manifest) as stream:
        assert bytes(stream.fetch([0])[0].tobytes()) == span


def sockets() -> int:
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found += str(entry.readlink()).startswith("socket:")
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts sockets as Linux shows them")
def test_closed_streams_and_stores_leave_no_clients_and_no_sockets(at, tmp_path) -> None:
    write_small_dataset(tmp_path)
    manifest = index_dataset(open_store(tmp_path))
    objects = {f"b/p/{p.relative_to(tmp_path)}": p.read_bytes() for p in tmp_path.rglob("*.hdf5")}
    at(Objects(objects))

    clients = weakref.WeakSet()

    def use() -> None:
        store = S3Store("s3://b/p")
        with TrialStream(store, manifest) as stream:
            stream.fetch(range(8))
        unclosed = S3Store("s3://b/p")
        unclosed.list()
        clients.update((store._clients, unclosed._clients))

    use()
    gc.collect()
    before = sockets()
    use()
    gc.collect()
    assert not clients
    while sockets() > before:
        time.sleep(0.05)


# --- whatever a server answers --------------------------------------------------------------------


def test_fuzz_of_what_a_server_answers_ends_in_bytes_or_a_sentence(at, tmp_path) -> None:
    write_small_dataset(tmp_path)
    local = open_store(tmp_path)
    write_manifest(local, index_dataset(local))
    expected = local.read(MANIFEST_NAME)
    objects = Objects(
        {
            f"b/p/{p.relative_to(tmp_path)}": p.read_bytes()
            for p in tmp_path.rglob("*.*")
            if p.is_file()
        }
    )
    chance = random.Random(0)

    def script(request: Request, number: int) -> Answer:
        answer = objects(request)
        return mutated(answer, chance) if chance.random() < 0.7 else answer

    store = at(script, RetryPolicy(0, 0.5, 0.01, 0.02))
    ended = {"right": 0, "sentence": 0}
    for number in rounds(25):
        chance.seed(number)
        try:
            manifest = load_or_build_manifest(store, lambda line: None)
        except BrainToTextError as fault:
            assert "\n" not in str(fault), number
            ended["sentence"] += 1
        else:
            assert manifest.to_bytes() == expected, number
            ended["right"] += 1
    assert ended["right"] and ended["sentence"], ended


def mutated(answer: Answer, chance: random.Random) -> Answer:
    """An answer with something wrong about it."""
    body = bytearray(answer.body)
    kind = chance.randrange(9)
    if kind == 0:
        return error(chance.choice([200, 301, 302, 400, 403, 404, 412, 416, 500, 503]), "Odd")
    if kind == 1:
        return Answer(answer.status, answer.body, {})
    if kind == 2:
        return Answer(answer.status, answer.body, answer.headers, drop=chance.randrange(50))
    if kind == 3:
        return Answer(answer.status, answer.body, answer.headers, silent=2)
    if kind == 4:
        return Answer(chance.choice([200, 206, 204, 304]), bytes(body), answer.headers)
    if kind == 5:
        return Answer(200, PORTAL, {"Content-Type": "text/html"})
    if kind == 6 and body:
        del body[chance.randrange(len(body)) :]
    elif kind == 7 and body:
        body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
    else:
        body += chance.randbytes(20)
    return Answer(answer.status, bytes(body), answer.headers)
