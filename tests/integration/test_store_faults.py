"""Every S3 call ends in time: with the right bytes, or with one sentence of cause and advice."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import random
import re
import time
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
from brain_to_text.streaming import s3_reads
from brain_to_text.streaming.trial_stream import TrialStream
from support.fuzzing import rounds
from support.local_s3 import LocalS3
from support.scripted_s3 import Answer, Objects, Request, Script, error, etag, scripted_s3
from support.small_data import SESSIONS, write_small_dataset

QUICK = RetryPolicy(
    budget_seconds=0.8,
    read_timeout_seconds=0.3,
    first_delay_seconds=0.01,
    longest_delay_seconds=0.05,
)
PATIENT = dataclasses.replace(QUICK, budget_seconds=30, read_timeout_seconds=5.0)
WAITING = 4.0  # seconds beyond the budget that a busy machine may add
BODY = bytes(range(256)) * 4
KEY = f"{SESSIONS[0]}/data_train.hdf5"
PORTAL = b"<!DOCTYPE html>\n<html><body>Welcome to Hotel Wi-Fi. <a href='/login'>Log in</a>"


class Server:
    """One server and one store, "s3://b/p", for all tests: making an S3 client takes a second."""

    def __init__(self, endpoint: str, requests: list[Request]) -> None:
        self.endpoint, self.requests = endpoint, requests
        self.script: Script = OBJECTS
        self.store: S3Store


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    def script(request: Request, number: int) -> Answer:
        return found.script(request, number)

    with scripted_s3(script) as (endpoint, requests), pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE"):
            patch.delenv(name, raising=False)
        for name, value in LocalS3(endpoint, Path()).environment().items():
            patch.setenv(name, value)
        found = Server(endpoint, requests)
        found.store = S3Store("s3://b/p", retry=QUICK)
        found.store.list()
        yield found
        found.store.close()


@pytest.fixture
def at(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Script], S3Store]]:
    """at(script): the store of a server that answers so, to its first request as number 0."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in LocalS3(server.endpoint, Path()).environment().items():
        monkeypatch.setenv(name, value)

    def serve(script: Script) -> S3Store:
        server.requests.clear()
        server.script = script
        return server.store

    yield serve
    server.store._retry = QUICK


OBJECTS = Objects({"b/p/x": BODY, "b/p/s/data_train.hdf5": b"12", "b/q": b"no"})
CALLS: dict[str, Callable[[S3Store], object]] = {
    "list": lambda store: store.list(),
    "read": lambda store: store.read("x"),
    "read with its size": lambda store: store.read("x", len(BODY)),
    "write": lambda store: store.write("x", BODY),
    "look": lambda store: store.exists("x"),
}
RIGHT = {
    "list": {
        "x": ObjectInfo("x", len(BODY), etag(BODY)),
        "s/data_train.hdf5": ObjectInfo("s/data_train.hdf5", 2, etag(b"12")),
    },
    "read": BODY,
    "read with its size": BODY,
    "write": None,
    "look": True,
}
LASTING = {
    *("a stalled answer", "one byte a second", "a dropped connection", "a cut body", "slow down"),
    "a portal's redirect",
}
# What goes wrong with an answer; "" where any cause will do, then the advice.
FAULTS: dict[str, tuple[Callable[[Answer], Answer], str, str]] = {
    "a stalled answer": (lambda a: Answer(a.status, a.body, a.headers, silent=60), "", "aws s3 ls"),
    "one byte a second": (
        lambda a: Answer(a.status, a.body, a.headers, pace=0.1),
        "no complete answer within",
        "aws s3 ls",
    ),
    "a dropped connection": (lambda a: Answer(a.status, a.body, a.headers, drop=0), "", "aws"),
    "a cut body": (lambda a: Answer(a.status, a.body, a.headers, drop=len(a.body) // 2), "", "aws"),
    "slow down": (lambda a: error(503, "SlowDown"), "HTTP 503", "aws s3 ls"),
    "an expired token": (lambda a: error(400, "ExpiredToken"), "ExpiredToken", "aws sso login"),
    "a wrong clock": (lambda a: error(403, "RequestTimeTooSkewed"), "Skewed", "timedatectl"),
    "a wrong key": (lambda a: error(403, "InvalidAccessKeyId"), "AccessKeyId", "aws configure"),
    "a wrong secret": (
        lambda a: error(403, "SignatureDoesNotMatch"),
        "SignatureDoesNotMatch",
        "the secret key does not belong to the access key",
    ),
    "no permission": (lambda a: error(403, "AccessDenied"), "access denied", "allow s3:"),
    "no bucket": (lambda a: error(404, "NoSuchBucket"), "there is no bucket 'b'", "aws s3 ls"),
    "a captive portal": (
        lambda a: Answer(200, PORTAL, {"Content-Type": "text/html"}),
        "web page instead of S3's answer",
        "log in there",
    ),
    "a portal's redirect": (
        lambda a: Answer(302, PORTAL, {"Location": "http://127.0.0.1:9/login"}),
        "web page|reached",
        "log in there|AWS_ENDPOINT_URL_S3",
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_without_faults_the_answer_is_right(call: str, at) -> None:
    assert CALLS[call](at(OBJECTS)) == RIGHT[call]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("call", ["list", "read with its size", "write"])
def test_a_fault_that_stays_is_one_sentence_in_time(call: str, fault: str, at, server) -> None:
    change, cause, advice = FAULTS[fault]
    without_body = ("a cut body", "one byte a second", "a captive portal", "a dropped connection")
    if call == "write" and fault in without_body:
        pytest.skip("the answer to a write has no body")
    store = at(lambda request, number: change(OBJECTS(request)))
    store._retry = QUICK if fault in LASTING else PATIENT
    started = time.monotonic()
    with pytest.raises(StorageError) as raised:
        CALLS[call](store)
    assert time.monotonic() - started < store._retry.budget_seconds + WAITING
    assert fault in LASTING or len(server.requests) <= 4, "asking again does not help"
    message = str(raised.value)
    assert "\n" not in message and message.endswith(".")
    assert re.match(r"Cannot (list|read|write) s3://b/p", message)
    assert re.search(cause, message) and re.search(advice, message), message


@pytest.mark.parametrize(
    "fault",
    [name for name in FAULTS if name not in ("no bucket", "no permission", "a portal's redirect")],
)
@pytest.mark.parametrize("call", ["list", "read", "write", "look"])
def test_a_fault_that_passes_is_not_seen(call: str, fault: str, at) -> None:
    change, _, _ = FAULTS[fault]

    def once(request: Request, number: int) -> Answer:
        return change(OBJECTS(request)) if number == 0 else OBJECTS(request)

    store = at(once)
    limit = 1.0 if fault == "one byte a second" else 5.0
    store._retry = dataclasses.replace(PATIENT, read_timeout_seconds=limit)
    assert CALLS[call](store) == RIGHT[call]


def test_a_listing_of_many_pages_ends(at) -> None:
    def pages(request: Request, number: int) -> Answer:
        token = int(request.query.get("continuation-token", 0))
        objects = Objects({f"b/p/{token}-{i}": b"1" for i in range(3)})
        return Answer(200, objects.listing("b", "p/", str(token + 1) if token < 4 else ""))

    assert len(at(pages).list()) == 15


@pytest.mark.parametrize("kind", ["same", "empty", "new"])
def test_pages_without_end_are_an_error(kind: str, at, server, monkeypatch) -> None:
    monkeypatch.setattr(s3_store, "_MOST_OBJECTS", 20)

    def pages(request: Request, number: int) -> Answer:
        names = {"same": ["x"], "empty": [], "new": [f"x{number}-{i}" for i in range(5)]}[kind]
        objects = Objects({f"b/p/{name}": b"1" for name in names})
        return Answer(200, objects.listing("b", "p/", "again" if kind == "same" else str(number)))

    store = at(pages)
    with pytest.raises(
        StorageError, match=r"never comes to the listing's end|more than 20 objects"
    ):
        store.list()
    assert len(server.requests) < 10


def test_a_listing_without_etags_is_taken(at) -> None:
    def bare(request: Request, number: int) -> Answer:
        return Answer(200, re.sub(rb"<ETag>.*?</ETag>", b"", OBJECTS(request).body))

    assert at(bare).list()["x"] == ObjectInfo("x", len(BODY), "")


def test_an_answer_of_another_kind_is_no_empty_listing(at) -> None:
    for body in (b"<html><head/><body>Log in</body></html>", b"{}", b"<a/>", b""):
        store = at(lambda request, number, body=body: Answer(200, body))
        with pytest.raises(StorageError, match=r"instead of S3's answer|not S3's|HTTP 500"):
            store.list()


def test_an_object_that_is_replaced_while_it_is_read_is_not_mixed(at, monkeypatch) -> None:
    monkeypatch.setattr(s3_store, "PART_BYTES", 100)

    def replaced(request: Request, number: int) -> Answer:
        answer = OBJECTS(request)
        answer.headers["ETag"] = f'"{number}"'
        return answer

    store = at(replaced)
    store._retry = PATIENT
    with pytest.raises(StorageError, match="was replaced while it was read"):
        store.read("x", len(BODY))


def test_a_large_object_is_written_in_parts_and_half_of_one_is_given_up(
    at, server, monkeypatch
) -> None:
    monkeypatch.setattr(s3_store, "PART_BYTES", 100)

    def parts(request: Request, number: int) -> Answer:
        if request.method == "POST" and "uploads" in request.query | {"uploads": ""}:
            text = "<InitiateMultipartUploadResult><UploadId>7</UploadId>"
            return Answer(200, f"{text}</InitiateMultipartUploadResult>".encode())
        if request.method == "PUT" and request.query.get("partNumber") == "3":
            return error(403, "AccessDenied")
        return Answer(204) if request.method == "DELETE" else OBJECTS(request)

    store = at(parts)
    store._retry = PATIENT
    with pytest.raises(StorageError, match=r"Cannot write .*allow s3:PutObject"):
        store.write("x", BODY)
    assert server.requests[-1].method == "DELETE", "what was uploaded of it costs money until then"


def test_vain_attempts_are_said_while_they_last(at, monkeypatch, caplog) -> None:
    monkeypatch.setattr("brain_to_text.storage.retry._SILENT_SECONDS", 0.3)
    store = at(lambda request, number: error(503, "SlowDown"))
    with caplog.at_level("WARNING", "brain_to_text"), pytest.raises(StorageError):
        store.list()
    said = [record.message for record in caplog.records]
    assert said and all("Still trying to list s3://b/p: HTTP 503 SlowDown" in line for line in said)


# --- trials ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", ["obstore", "s3fs"])
@pytest.mark.parametrize(
    "fault",
    ["an expired token", "a wrong clock", "a wrong secret", "a captive portal", "no permission"],
)
def test_trials_get_the_same_advice(client: str, fault: str, at, tmp_path, monkeypatch) -> None:
    if client == "s3fs":
        monkeypatch.setattr(s3_reads, "_obstore_will_do", lambda bucket: False)
    write_small_dataset(tmp_path)
    manifest = index_dataset(open_store(tmp_path))
    change, cause, advice = FAULTS[fault]
    store = at(lambda request, number: change(Answer(206)))
    with TrialStream(store, manifest, retry=PATIENT) as stream:
        with pytest.raises(StorageError) as raised:
            stream.fetch([0])
    wanted = "s3:GetObject permission" if fault == "no permission" else advice
    assert re.search(cause, str(raised.value)) and wanted in str(raised.value)


@pytest.mark.parametrize("name", ["a b", "ü%20#?&+=", "x~!@$^()[]{}'", "日本", "a.b..c"])
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
    with TrialStream(store, manifest, retry=PATIENT) as stream:
        reader = stream._reader
        import fsspec.asyn

        got = fsspec.asyn.sync(reader.loop, reader.read, key, 0, 8, "")
        assert bytes(got) == objects[f"b/p/{key}"][:8]
        assert bytes(stream.fetch([0])[0].tobytes()) == span


# --- sockets --------------------------------------------------------------------------------------


def sockets() -> int:
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found += str(entry.readlink()).startswith("socket:")
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts sockets as Linux shows them")
@pytest.mark.parametrize("client", ["obstore", "s3fs"])
def test_closed_streams_and_stores_leave_no_clients_and_no_sockets(
    client: str, at, tmp_path, monkeypatch
) -> None:
    if client == "s3fs":
        monkeypatch.setattr(s3_reads, "_obstore_will_do", lambda bucket: False)
    write_small_dataset(tmp_path)
    manifest = index_dataset(open_store(tmp_path))
    objects = {f"b/p/{p.relative_to(tmp_path)}": p.read_bytes() for p in tmp_path.rglob("*.hdf5")}
    store = at(Objects(objects))

    def alive() -> int:
        kinds = (s3_reads._ObstoreClient, s3_reads._S3fsClient, s3_reads._Credentials)
        gc.collect()
        return sum(isinstance(thing, kinds) for thing in gc.get_objects())

    def use() -> None:
        with TrialStream(store, manifest, retry=PATIENT) as stream:
            stream.fetch(range(8))
        again = S3Store("s3://b/p", retry=PATIENT)
        again.list()
        del again  # nobody closes it

    use()
    store.close()
    before = sockets(), alive()
    for _ in range(2):
        use()
    deadline = time.monotonic() + 10
    while (sockets(), alive()) > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sockets() <= before[0] and alive() <= before[1]


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

    store = at(script)
    impatient = RetryPolicy(0.3, 0.1, 0.01, 0.02)
    store._retry = impatient
    ended = {"right": 0, "sentence": 0}
    for number in rounds(60):
        chance.seed(number)
        started = time.monotonic()
        try:
            manifest = load_or_build_manifest(store, lambda line: None)
        except BrainToTextError as fault:
            assert "\n" not in str(fault), number
            ended["sentence"] += 1
        else:
            assert manifest.to_bytes() == expected, number
            ended["right"] += 1
        assert time.monotonic() - started < 30, number
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
        return Answer(answer.status, answer.body, answer.headers, silent=0.2)
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
