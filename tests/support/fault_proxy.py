"""An HTTP proxy between a client and an S3 server: slow, faulty and counted as a test asks.

It stands where the endpoint stands, passes every request on unchanged (signatures stay valid) and
corrects what the local server does unlike S3: ranged GETs answer 206, If-Match is honoured. Faults
hit ranged GETs only, and are chosen by a hash of (object, range, how often it was asked
before), so that they do not depend on the order in which requests arrive.

In tests it runs in a thread (`run_proxy`); benchmarks run it as a process of its own:

    python tests/support/fault_proxy.py --upstream http://127.0.0.1:9000 --latency 0.03
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import hashlib
import json
import re
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

CONTROL = "/_proxy/"
CREDENTIALS = CONTROL + "credentials"
PIECE = 128 << 10
_RANGE = re.compile(rb"(?im)^range: *bytes=(\d+)-(\d+)\r?$")
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
    other_gets: int = 0
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

    def __init__(
        self,
        upstream: str,
        certificate: tuple[Path, Path] | None = None,
    ) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname, parts.port)
        self.faults = Faults()
        self.counts = Counts()
        self.tokens: list[str] = []
        self.token_seconds = 3600.0
        self._asked: Counter[str] = Counter()
        self._open: set[asyncio.Task[None]] = set()
        self._port = 0
        self._tls: ssl.SSLContext | None = None
        if certificate is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(*certificate)

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._port}"

    @property
    def credentials_url(self) -> str:
        """For AWS_CONTAINER_CREDENTIALS_FULL_URI: new session tokens for the local key pair."""
        return self.url + CREDENTIALS

    def reset_counts(self) -> None:
        self.counts = Counts()
        self._asked = Counter()

    def go_away(self, seconds: float) -> None:
        """Refuse connections and drop the open ones for a while; returns at once."""
        asyncio.run_coroutine_threadsafe(self._go_away(seconds), self.loop)

    # --- serving ----------------------------------------------------------------------------------

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", self._port, ssl=self._tls, limit=1 << 20
        )
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Refuse connections and drop the open ones."""
        self._server.close()
        tasks = list(self._open)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _go_away(self, seconds: float) -> None:
        await self.stop()
        await asyncio.sleep(seconds)
        await self.start()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.counts.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.split(b" ", 2)[1].startswith(CONTROL.encode()):
                    await self._control(head, reader, writer)
                    continue
                if upstream is None:
                    upstream = await asyncio.open_connection(*self._upstream, limit=1 << 20)
                if not await self._exchange(head, reader, writer, *upstream):
                    return
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError, asyncio.CancelledError):
            return
        finally:
            self._open.discard(task)
            writer.transport.abort() if task.cancelling() else writer.close()
            if upstream is not None:
                upstream[1].close()

    async def _exchange(
        self,
        head: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
    ) -> bool:
        """One request and its answer; False when the connection must not be used again."""
        faults = self.faults
        method, target, _ = head.split(b" ", 2)
        span = _RANGE.search(head) if method == b"GET" else None
        self._count(method, target, span is not None)
        fault = self._choose(faults, target, span) if span else ""

        token = _header(head, b"x-amz-security-token")
        if token and token.decode() in faults.rejected_tokens:
            await _swallow(head, reader)
            await _refuse(writer, 400, "Bad Request", "ExpiredToken", method)
            self.counts.faults["expired"] += 1
            return True
        if faults.bucket_region and b"/%s/s3/" % faults.bucket_region.encode() not in head:
            await _swallow(head, reader)
            await _redirect(writer, faults.bucket_region, method)
            self.counts.faults["redirect"] += 1
            return True
        if fault == "slow_down":
            await asyncio.sleep(faults.latency_seconds)
            await _refuse(writer, 503, "Slow Down", "SlowDown", method)
            return True

        up_writer.write(head)
        if b"100-continue" in head.lower():
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await _pass_body(head, reader, up_writer)
        answer = await up_reader.readuntil(b"\r\n\r\n")
        while answer.startswith(b"HTTP/1.1 100"):
            answer = await up_reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(faults.latency_seconds)
        return await self._answer(head, answer, fault, writer, up_reader, span is not None)

    async def _answer(
        self,
        head: bytes,
        answer: bytes,
        fault: str,
        writer: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader,
        ranged: bool,
    ) -> bool:
        """Send the answer, with the fault chosen for it."""
        if ranged and answer.startswith(b"HTTP/1.1 200"):
            answer = answer.replace(b"200 OK", b"206 Partial Content", 1)
        wanted, etag = _header(head, b"if-match"), _header(answer, b"etag")
        if self.faults.hide_etag:
            answer = re.sub(rb"(?im)^etag:.*\r\n", b"", answer)
        bodyless = head.startswith(b"HEAD") or b" 204 " in answer[:16] or b" 304 " in answer[:16]
        if bodyless:
            writer.write(answer)
            await writer.drain()
            return True
        if b"chunked" in (_header(answer, b"transfer-encoding") or b""):
            body = await _read_chunks(up_reader)
            answer = re.sub(
                rb"(?im)^transfer-encoding:.*\r\n", b"Content-Length: %d\r\n" % len(body), answer
            )
            writer.write(answer + body)
            await writer.drain()
            return True
        length = int(_header(answer, b"content-length") or 0)
        if wanted and etag and wanted != etag and not self.faults.hide_etag:
            await up_reader.readexactly(length)
            await _refuse(writer, 412, "Precondition Failed", "PreconditionFailed", head[:4])
            return True
        if fault == "short_body":
            body = await up_reader.readexactly(length)
            keep = length // 2
            answer = re.sub(
                rb"(?im)^content-length:.*\r\n", b"Content-Length: %d\r\n" % keep, answer
            )
            answer = re.sub(rb"(?im)^content-range:.*\r\n", b"", answer)
            writer.write(answer + body[:keep])
            await writer.drain()
            return True
        writer.write(answer)
        return await self._relay(length, fault, writer, up_reader)

    async def _relay(
        self, length: int, fault: str, writer: asyncio.StreamWriter, up_reader: asyncio.StreamReader
    ) -> bool:
        """Pass a body on at the connection's speed; stop where a fault wants it."""
        rate = self.faults.bytes_per_second
        started = time.monotonic()
        sent = 0
        while sent < length:
            if fault in ("reset", "truncate", "stall") and sent >= length // 2:
                if fault == "stall":
                    await asyncio.sleep(3600)
                if fault == "reset":
                    writer.transport.abort()
                return False
            most = 1 if fault == "trickle" else max(1, length // 2)
            piece = await up_reader.read(min(PIECE, length - sent, most))
            if not piece:
                return False
            if fault == "flip" and sent == 0:
                at = self.counts.body_bytes % len(piece)  # the network never damages alike twice
                piece = piece[:at] + bytes([piece[at] ^ 0x40]) + piece[at + 1 :]
            writer.write(piece)
            sent += len(piece)
            self.counts.body_bytes += len(piece)
            if fault == "trickle":
                await asyncio.sleep(0.05)
            if rate:
                await asyncio.sleep(started + sent / rate - time.monotonic())
            await writer.drain()
        return True

    def _choose(self, faults: Faults, target: bytes, span: re.Match[bytes]) -> str:
        key = target.split(b"?")[0].split(b"/", 2)[-1]  # tests have buckets of their own
        name = f"{key!r} {span[1]!r} {span[2]!r}"
        self._asked[name] += 1
        digest = hashlib.sha256(f"0 {name} {self._asked[name]}".encode()).digest()
        point = int.from_bytes(digest[:8], "big") / 2**64
        for fault in _FAULTS:
            share = getattr(faults, fault)
            if point < share:
                self.counts.faults[fault] += 1
                return fault
            point -= share
        return ""

    def _count(self, method: bytes, target: bytes, ranged: bool) -> None:
        self.counts.requests += 1
        if method == b"GET" and (b"list-type=" in target or b"?prefix" in target):
            self.counts.lists += 1
        elif method == b"GET" and ranged:
            self.counts.ranged_gets += 1
        elif method == b"GET":
            self.counts.other_gets += 1

    async def _control(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Credentials, counts and settings for clients in other processes."""
        target = head.split(b" ", 2)[1].decode()
        answer: object = {}
        if target == CREDENTIALS and self._provider_fails():
            await _refuse(writer, 500, "Internal Server Error", "InternalError", b"GET")
            return
        if target == CREDENTIALS:
            answer = self._new_credentials()
        elif target == CONTROL + "counts":
            answer = asdict(self.counts)
        elif target == CONTROL + "reset":
            self.reset_counts()
        text = json.dumps(answer).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n" % len(text))
        writer.write(b"Content-Type: application/json\r\n\r\n" + text)
        await writer.drain()

    def _provider_fails(self) -> bool:
        fails = self.counts.faults["no_credentials"] < self.faults.no_credentials
        self.counts.faults["no_credentials"] += fails
        return fails

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


def _header(head: bytes, name: bytes) -> bytes | None:
    match = re.search(rb"(?im)^" + re.escape(name) + rb": *(.*?)\r$", head)
    return match[1] if match else None


async def _pass_body(
    head: bytes, reader: asyncio.StreamReader, up_writer: asyncio.StreamWriter
) -> None:
    left = int(_header(head, b"content-length") or 0)
    while left:
        piece = await reader.read(min(PIECE, left))
        if not piece:
            raise ConnectionResetError
        up_writer.write(piece)
        await up_writer.drain()
        left -= len(piece)


async def _swallow(head: bytes, reader: asyncio.StreamReader) -> None:
    await reader.readexactly(int(_header(head, b"content-length") or 0))


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int((await reader.readline()).split(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readline()
    await reader.readline()
    return body


async def _refuse(
    writer: asyncio.StreamWriter,
    status: int,
    reason: str,
    code: str,
    method: bytes,
    headers: str = "",
    details: str = "",
) -> None:
    text = f"<Error><Code>{code}</Code><Message>{reason}</Message>{details}</Error>"
    body = b"" if method.startswith(b"HEAD") else f"<?xml version='1.0'?>{text}".encode()
    writer.write(
        f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/xml\r\n{headers}"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    await writer.drain()


async def _redirect(writer: asyncio.StreamWriter, region: str, method: bytes) -> None:
    await _refuse(
        writer,
        301,
        "Moved Permanently",
        "PermanentRedirect",
        method,
        f"x-amz-bucket-region: {region}\r\n",
        f"<Endpoint>s3.{region}.amazonaws.com</Endpoint>",
    )


@contextlib.contextmanager
def run_proxy(upstream: str, certificate: tuple[Path, Path] | None = None) -> Iterator[FaultProxy]:
    """A proxy in a thread of this process, until the block ends."""
    proxy = FaultProxy(upstream, certificate)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="fault-proxy", daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(proxy.start(), loop).result(10)
    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(proxy.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        loop.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="S3 fault proxy as a process of its own")
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds to first byte")
    parser.add_argument("--rate", type=float, default=0.0, help="bytes per second per connection")
    parser.add_argument("--certificate", type=Path, nargs=2, help="certificate and key for TLS")
    options = parser.parse_args()

    async def serve() -> None:
        proxy = FaultProxy(options.upstream, options.certificate)
        proxy.faults = Faults(latency_seconds=options.latency, bytes_per_second=options.rate)
        await proxy.start()
        print(proxy.url, flush=True)
        await asyncio.Event().wait()

    try:  # pip install uvloop: TLS costs the proxy less than half
        import uvloop
    except ImportError:
        asyncio.run(serve())
    else:
        uvloop.run(serve())


if __name__ == "__main__":
    main()
