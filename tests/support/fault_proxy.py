"""An HTTP proxy between a client and an S3 server: slow, faulty and counted as a test asks.

It stands where the endpoint stands, passes every request on unchanged (signatures stay valid) and
corrects what the local server does unlike S3: ranged GETs answer 206, If-Match is honoured. Faults
hit ranged GETs only, and are chosen by a hash of (object, range, how often it was asked
before), so that they do not depend on the order in which requests arrive.

In tests it runs in threads (`run_proxy`); benchmarks run it as a process of its own:

    python tests/support/fault_proxy.py --upstream http://127.0.0.1:9000 --latency 0.03
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import http.client
import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.scripted_s3 import Answer, Request, ScriptedS3, error

CONTROL = "/_proxy/"
CREDENTIALS = CONTROL + "credentials"
_FAULTS = ("slow_down", "reset", "truncate", "short_body", "flip", "stall", "trickle")


@dataclass
class Faults:
    """Shares of ranged GETs that go wrong, and what the network is like.

    Attributes:
        slow_down: 503 SlowDown.
        reset: connection reset in the middle of the body.
        truncate: body ends early, Content-Length says otherwise.
        short_body: body ends early and Content-Length agrees.
        flip: one byte of the body is another one.
        stall: nothing more after half of the body.
        trickle: a byte now and then, never silent for long.
        latency_seconds: before the first byte of an answer.
        bytes_per_second: per connection; 0 for no limit.
        rejected_tokens: session tokens answered with ExpiredToken.
        no_credentials: so many requests for new credentials are answered with 500.
        hide_etag: leave ETag out of answers and ignore If-Match, as some servers do.
        bucket_region: where the buckets are; what is signed for another region is answered as S3
            does, 301 PermanentRedirect without a Location.
    """

    slow_down: float = 0.0
    reset: float = 0.0
    truncate: float = 0.0
    short_body: float = 0.0
    flip: float = 0.0
    stall: float = 0.0
    trickle: float = 0.0
    latency_seconds: float = 0.0
    bytes_per_second: float = 0.0
    rejected_tokens: tuple[str, ...] = ()
    no_credentials: int = 0
    hide_etag: bool = False
    bucket_region: str = ""


@dataclass
class Counts:
    """What went through since the last reset."""

    connections: int = 0
    requests: int = 0
    ranged_gets: int = 0
    lists: int = 0
    body_bytes: int = 0
    faults: Counter[str] = field(default_factory=Counter)


class FaultProxy:
    """The proxy; change `faults` and read `counts` at any time from any thread.

    Args:
        upstream: "http://HOST:PORT".
        certificate: (certificate, key) files to speak TLS with.

    Attributes:
        token_seconds: life of the credentials that `credentials_url` gives out.
    """

    def __init__(self, upstream: str, certificate: tuple[Path, Path] | None = None) -> None:
        self._upstream = urlsplit(upstream).netloc
        self.server = ScriptedS3(self._answer, certificate)
        self.faults = Faults()
        self.tokens: list[str] = []
        self.token_seconds = 3600.0
        self._lock = threading.Lock()
        self._local = threading.local()
        self.reset_counts()

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def credentials_url(self) -> str:
        """For AWS_CONTAINER_CREDENTIALS_FULL_URI: new session tokens for the local key pair."""
        return self.url + CREDENTIALS

    @property
    def counts(self) -> Counts:
        self._counts.connections = self.server.connections - self._before
        return self._counts

    def reset_counts(self) -> None:
        self._counts, self._asked = Counts(), Counter[str]()
        self._before = self.server.connections

    def go_away(self, seconds: float) -> None:
        """Refuse connections and drop the open ones for a while; returns at once."""
        self.server.stop()
        threading.Timer(seconds, self.server.start).start()

    def _answer(self, request: Request, number: int) -> Answer:
        if request.path.startswith(CONTROL):
            return self._control(request.path)
        faults = self.faults
        with self._lock:
            ranged = request.kind == "get" and request.span is not None
            self._counts.requests += 1
            self._counts.ranged_gets += ranged
            self._counts.lists += request.kind == "list"
            fault = self._choose(faults, request)
        answer = self._refusal(faults, request, fault) or self._passed_on(request)
        if ranged and answer.status == 200:
            answer.status = 206
        etag = answer.headers.get("Etag")
        wanted = request.headers.get("if-match")
        if faults.hide_etag:
            answer.headers.pop("Etag", None)
        elif wanted and etag and wanted != etag:
            answer = error(412, "PreconditionFailed")
        answer.silent, answer.rate = faults.latency_seconds, faults.bytes_per_second
        return self._spoilt(answer, fault)

    def _choose(self, faults: Faults, request: Request) -> str:
        """The fault of this request, "" for none."""
        if request.kind != "get" or request.span is None:
            return ""
        key = request.path.split("/", 2)[-1]  # tests have buckets of their own
        name = f"{key} {request.span}"
        self._asked[name] += 1
        digest = hashlib.sha256(f"0 {name} {self._asked[name]}".encode()).digest()
        point = int.from_bytes(digest[:8], "big") / 2**64
        for fault in _FAULTS:
            share = getattr(faults, fault)
            if point < share:
                self._counts.faults[fault] += 1
                return fault
            point -= share
        return ""

    def _refusal(self, faults: Faults, request: Request, fault: str) -> Answer | None:
        if request.headers.get("x-amz-security-token") in faults.rejected_tokens:
            self._counts.faults["expired"] += 1
            return error(400, "ExpiredToken")
        region = faults.bucket_region
        if region and f"/{region}/s3/" not in request.headers.get("authorization", ""):
            self._counts.faults["redirect"] += 1
            return error(301, "PermanentRedirect", **{"x-amz-bucket-region": region})
        return error(503, "SlowDown") if fault == "slow_down" else None

    def _passed_on(self, request: Request) -> Answer:
        """The answer of the real server."""
        headers = {k: v for k, v in request.headers.items() if k not in ("expect", "connection")}
        for last in (False, True):
            upstream = getattr(self._local, "connection", None)
            if upstream is None:
                upstream = self._local.connection = http.client.HTTPConnection(self._upstream)
            try:
                upstream.request(request.method, request.target, request.body, headers)
                answer = upstream.getresponse()
                body = answer.read()
                break
            except (OSError, http.client.HTTPException):  # kept open for too long
                self._local.connection = None
                if last:
                    raise
        passed = {name.title(): value for name, value in answer.getheaders()}
        if request.method != "HEAD":
            passed.pop("Content-Length", None)
        passed.pop("Transfer-Encoding", None)
        return Answer(answer.status, body, passed)

    def _spoilt(self, answer: Answer, fault: str) -> Answer:
        """With the fault that was chosen, and counted."""
        body, half = answer.body, len(answer.body) // 2
        if fault == "short_body":
            answer.body = body[:half]
            answer.headers.pop("Content-Range", None)
        elif fault == "flip":
            at = self._counts.body_bytes % len(body)  # the network never damages alike twice
            answer.body = body[:at] + bytes([body[at] ^ 0x40]) + body[at + 1 :]
        elif fault == "trickle":
            answer.pace, answer.rate = 0.05, 0.0
        elif fault in ("reset", "truncate", "stall"):
            then = {"reset": "reset", "truncate": "close", "stall": "silence"}[fault]
            answer = dataclasses.replace(answer, drop=half, then=then)
        with self._lock:
            self._counts.body_bytes += len(answer.body[: answer.drop])
        return answer

    def _control(self, path: str) -> Answer:
        """Credentials and counts for clients in other processes."""
        content: object = {}
        if path == CREDENTIALS:
            with self._lock:
                if self._counts.faults["no_credentials"] < self.faults.no_credentials:
                    self._counts.faults["no_credentials"] += 1
                    return error(500, "InternalError")
                content = self._new_credentials()
        elif path == CONTROL + "counts":
            content = asdict(self.counts)
        elif path == CONTROL + "reset":
            self.reset_counts()
        return Answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _new_credentials(self) -> dict[str, str]:
        token = f"token-{len(self.tokens)}"
        self.tokens.append(token)
        end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=self.token_seconds)
        return {
            "AccessKeyId": "AKIDEXAMPLE",
            "SecretAccessKey": "secretsecretsecret",
            "Token": token,
            "Expiration": end.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }


@contextlib.contextmanager
def run_proxy(upstream: str, certificate: tuple[Path, Path] | None = None) -> Iterator[FaultProxy]:
    """A proxy in threads of this process, until the block ends."""
    proxy = FaultProxy(upstream, certificate)
    proxy.server.start()
    try:
        yield proxy
    finally:
        proxy.server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description="S3 fault proxy as a process of its own")
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds to first byte")
    parser.add_argument("--rate", type=float, default=0.0, help="bytes per second per connection")
    parser.add_argument("--certificate", type=Path, nargs=2, help="certificate and key for TLS")
    options = parser.parse_args()
    proxy = FaultProxy(options.upstream, options.certificate)
    proxy.faults = Faults(latency_seconds=options.latency, bytes_per_second=options.rate)
    proxy.server.start()
    print(proxy.url, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
