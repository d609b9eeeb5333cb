"""A server that answers S3 requests as a script says, whether that makes sense or not."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PIECE = 128 << 10


@dataclass(frozen=True)
class Request:
    """What was asked.

    Attributes:
        target: as it was sent; `path` and `query` are what it means.
        path: /bucket/key.
        kind: "list", "head", "get", "put" or "other".
    """

    method: str
    target: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    kind: str
    body: bytes = field(repr=False)

    @property
    def span(self) -> tuple[int, int] | None:
        """First and last byte of a ranged GET."""
        text = self.headers.get("range", "")
        if not text.startswith("bytes="):
            return None
        first, _, last = text.removeprefix("bytes=").partition("-")
        return int(first), int(last)


@dataclass
class Answer:
    """What the server sends, and how.

    Attributes:
        body: sent as it is.
        silent: seconds before anything is sent.
        pace: seconds before each single byte.
        rate: bytes per second; 0 for no limit.
        drop: after so many bytes of the body nothing more is sent, by default never.
        then: what follows a drop: the connection is closed, reset, or goes on in silence.
    """

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    silent: float = 0.0
    pace: float = 0.0
    rate: float = 0.0
    drop: int | None = None
    then: str = "close"


Script = Callable[[Request, int], Answer]


class Objects:
    """Answers as S3 gives them, for objects by "bucket/key"; what a script falls back on."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects

    def __call__(self, request: Request, number: int = 0) -> Answer:
        bucket, _, key = request.path.lstrip("/").partition("/")
        if request.kind == "list":
            return Answer(200, self.listing(bucket, request.query.get("prefix", "")))
        name = f"{bucket}/{key}"
        if request.kind == "put":
            return Answer(200, b"", {"ETag": '"0123456789abcdef0123456789abcdef"'})
        if name not in self.objects:
            return error(404, "NoSuchKey")
        body = self.objects[name]
        headers = {"ETag": f'"{etag(body)}"', "Content-Type": "binary/octet-stream"}
        if request.span is None or request.method == "HEAD":
            return Answer(200, body, headers)
        first, last = request.span
        headers["Content-Range"] = f"bytes {first}-{min(last, len(body) - 1)}/{len(body)}"
        return Answer(206, body[first : last + 1], headers)

    def listing(self, bucket: str, prefix: str, more: str = "") -> bytes:
        entries = "".join(
            f"<Contents><Key>{escape(name.partition('/')[2])}</Key><Size>{len(body)}</Size>"
            f"<ETag>&quot;{etag(body)}&quot;</ETag></Contents>"
            for name, body in sorted(self.objects.items())
            if name.startswith(f"{bucket}/{prefix}")
        )
        truncated = "true" if more else "false"
        token = f"<NextContinuationToken>{more}</NextContinuationToken>" if more else ""
        return (
            f'<?xml version="1.0"?><ListBucketResult><Name>{bucket}</Name>'
            f"<IsTruncated>{truncated}</IsTruncated>{token}{entries}</ListBucketResult>"
        ).encode()


def etag(body: bytes) -> str:
    return hashlib.md5(body).hexdigest()


def error(status: int, code: str, words: str = "m", **headers: str) -> Answer:
    message = f"<Message>{escape(words)}</Message>"
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code>{message}</Error>"
    return Answer(status, text.encode(), {"Content-Type": "application/xml", **headers})


class ScriptedS3:
    """Serves 127.0.0.1 from `start` to `stop`, each connection on a thread; may start again.

    Args:
        script: gives the answer to each request and its number; called on any thread.
        certificate: (certificate, key) files to speak TLS with.

    Attributes:
        requests: so far.
        connections: how many were made.
    """

    def __init__(self, script: Script, certificate: tuple[Path, Path] | None = None) -> None:
        self._script = script
        self.requests: list[Request] = []
        self.connections = 0
        self._port = 0
        self._open: set[socket.socket] = set()
        self._over = threading.Event()
        self._tls: ssl.SSLContext | None = None
        if certificate is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(*certificate)

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", self._port), backlog=256)
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections and drop the open ones."""
        self._over.set()
        for connection in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = listener.accept()[0]
                self.connections += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        over = self._over
        with contextlib.suppress(OSError, ValueError), contextlib.ExitStack() as closing:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            closing.enter_context(connection)
            self._open.add(connection)
            closing.callback(self._open.discard, connection)
            stream = connection.makefile("rb")
            while not over.is_set() and (request := _received(stream, connection)):
                self.requests.append(request)
                answer = self._script(request, len(self.requests) - 1)
                if not _send(connection, request, answer, over):
                    return


@contextlib.contextmanager
def scripted_s3(script: Script) -> Iterator[tuple[str, list[Request]]]:
    """Serve until the block ends: (endpoint, requests so far)."""
    server = ScriptedS3(script)
    server.start()
    try:
        yield server.url, server.requests
    finally:
        server.stop()


def _received(stream: BinaryIO, connection: socket.socket) -> Request | None:
    """The next request; None where the client has closed the connection."""
    first = stream.readline()
    if not first:
        return None
    headers = {}
    while line := stream.readline().strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    if headers.get("expect"):
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = b""
    if "chunked" in headers.get("transfer-encoding", ""):
        while size := int(stream.readline().split(b";")[0], 16):
            body += stream.read(size)
            stream.readline()
        while stream.readline().strip():
            pass
    else:
        body = stream.read(int(headers.get("content-length", 0)))
    method, target, _ = first.decode("latin-1").split(" ", 2)
    parts = urlsplit(target)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    listing = "list-type" in query or "prefix" in query
    kind = {"HEAD": "head", "PUT": "put", "GET": "list" if listing else "get"}.get(method, "other")
    return Request(method, target, unquote(parts.path), query, headers, kind, body)


def _send(
    connection: socket.socket, request: Request, answer: Answer, over: threading.Event
) -> bool:
    """False when the connection is to be closed."""
    if answer.silent and over.wait(answer.silent):
        return False
    headers = {"Content-Length": str(len(answer.body)), **answer.headers}
    head = f"HTTP/1.1 {answer.status} S\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    start = head.encode("latin-1") + b"\r\n"
    if request.method == "HEAD":
        connection.sendall(start)
        return True
    body = memoryview(answer.body)[: answer.drop]
    size = 1 if answer.pace else PIECE if answer.rate else max(1, len(body))
    began = time.monotonic()
    connection.sendall(start + body[:size])  # at once: one piece more would be one call more
    for sent in range(size, len(body), size):
        due = began + sent / answer.rate if answer.rate else time.monotonic() + answer.pace
        if over.wait(max(0.0, due - time.monotonic())):
            return False
        connection.sendall(body[sent : sent + size])
    if answer.rate:
        over.wait(max(0.0, began + len(body) / answer.rate - time.monotonic()))
    if answer.drop is None:
        return True
    if answer.then == "silence":
        over.wait()
    if answer.then == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return False
