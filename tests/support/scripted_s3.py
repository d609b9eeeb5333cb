"""A server that answers S3 requests as a test says, whether that makes sense or not."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


@dataclass(frozen=True)
class Request:
    """What was asked. kind: "list", "head", "get", "put" or "other"; path: /bucket/key."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    kind: str

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
        pace: seconds before each single byte, then nothing is sent at once.
        silent: seconds before anything is sent.
        drop: close the connection after so many bytes of the body, by default never.
    """

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    pace: float = 0.0
    silent: float = 0.0
    drop: int | None = None


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


def error(status: int, code: str, words: str = "m") -> Answer:
    message = f"<Message>{escape(words)}</Message>"
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code>{message}</Error>"
    return Answer(status, text.encode(), {"Content-Type": "application/xml"})


@contextlib.contextmanager
def scripted_s3(script: Script) -> Iterator[tuple[str, list[Request]]]:
    """Serve until the block ends: (endpoint, requests so far)."""
    requests: list[Request] = []
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    over = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            stream = connection.makefile("rb")
            while not over.is_set() and (first := stream.readline()):
                headers = {}
                while line := stream.readline().strip():
                    name, _, value = line.decode("latin-1").partition(":")
                    headers[name.lower()] = value.strip()
                if headers.get("expect"):
                    connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                _skip_body(stream, headers)
                request = _request(first, headers)
                requests.append(request)
                if not _send(connection, request, script(request, len(requests) - 1), over):
                    return

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", requests
    finally:
        over.set()
        listener.close()


def _skip_body(stream, headers: dict[str, str]) -> None:
    if "chunked" in headers.get("transfer-encoding", ""):
        while size := int(stream.readline().split(b";")[0], 16):
            stream.read(size + 2)
        while stream.readline().strip():
            pass
        return
    stream.read(int(headers.get("content-length", 0)))


def _request(first: bytes, headers: dict[str, str]) -> Request:
    method, target, _ = first.decode("latin-1").split(" ", 2)
    parts = urlsplit(target)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    kind = {"HEAD": "head", "PUT": "put", "GET": "list" if "list-type" in query else "get"}
    return Request(method, unquote(parts.path), query, headers, kind.get(method, "other"))


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
    body = answer.body if answer.drop is None else answer.body[: answer.drop]
    if answer.pace:
        connection.sendall(start)
        for byte in body:
            if over.is_set():
                return False
            time.sleep(answer.pace)
            connection.sendall(bytes([byte]))
    else:
        connection.sendall(start + body)  # at once: two small pieces would wait for each other
    return answer.drop is None
