"""botocore's S3 client through s3fs, one attempt per call.

Credentials, region and endpoint come from the standard provider chain of the AWS SDK (environment,
profile, container or instance role), which also renews them; nothing here copies a key.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import botocore.credentials
import botocore.exceptions
import botocore.parsers
import fsspec.asyn
import s3fs

from .locations import split_s3_url
from .retry import CredentialsRejectedError, PersistentError
from .s3_errors import AWS_LOGIN, CALL_ERRORS, PROVIDER_ERRORS, SETTINGS, fault_of, named_cause

T = TypeVar("T")


class S3Client:
    """One client of this process, made on first use, on fsspec's event loop.

    Args:
        url: s3://bucket/prefix.
        connections: kept at once.
        silence_seconds: of the server, after which an attempt fails.

    Raises:
        StorageError: the URL names no place.
    """

    def __init__(self, url: str, connections: int, silence_seconds: float) -> None:
        self.bucket, prefix = split_s3_url(url)
        self.root = f"{prefix}/" if prefix else ""
        self.loop: asyncio.AbstractEventLoop = fsspec.asyn.get_loop()
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        self._file_system = s3fs.S3FileSystem(
            asynchronous=True,
            loop=self.loop,
            skip_instance_cache=True,
            use_listings_cache=False,
            config_kwargs={
                "retries": {"mode": "standard", "total_max_attempts": 1},
                "max_pool_connections": connections,
                "connect_timeout": silence_seconds,
                "read_timeout": silence_seconds,
                # S3 has no checksum of a part of an object; ours is the manifest's CRC.
                "response_checksum_validation": "when_required",
                # servers other than S3 are rarely reachable as BUCKET.HOST
                **({"s3": {"addressing_style": "path"}} if endpoint else {}),
            },
        )
        # the one in use last; before it the one that requests in flight may still be using
        self._clients: list[Any] = []
        # a client that nobody closes would keep its sockets
        weakref.finalize(self, _release, self.loop, self._clients)

    async def connect(self) -> Any:
        """aiobotocore's client."""
        client = await self._file_system.set_session()
        if not self._clients or self._clients[-1] is not client:
            self._clients.append(client)
        return client

    async def call(self, request: Callable[[Any], Awaitable[T]]) -> T:
        """`request(client)`, once.

        Raises:
            ReadError, ObjectReplacedError: what went wrong, and what to do about it.
        """
        try:
            client = await self.connect()
        except CALL_ERRORS as error:
            if isinstance(error, ValueError):  # of an endpoint or a profile
                raise PersistentError(named_cause(error), SETTINGS) from error
            raise fault_of(error) from error
        try:
            return await request(client)
        except CALL_ERRORS as error:
            raise fault_of(error) from error

    async def renew_credentials(self) -> bool:
        """Make a client anew, so that the providers are asked again.

        Returns:
            False where it is no use: the same credentials, and they come from no provider that
            renews them.

        Raises:
            CredentialsRejectedError: it has none to give.
        """
        try:
            before = await _keys_of(self._clients[-1]) if self._clients else None
            await self._file_system.set_session(refresh=True)
            after = await _keys_of(await self.connect())
        except PROVIDER_ERRORS as error:
            cause = f"credentials cannot be renewed ({named_cause(error)})"
            raise CredentialsRejectedError(cause, AWS_LOGIN) from error
        while len(self._clients) > 2:
            await self._clients.pop(0).close()
        return after is None or after != before

    async def close(self) -> None:
        """Close connections; a later call would open them anew."""
        self._file_system._s3 = None
        await _close(self._clients)


async def _close(clients: list[Any]) -> None:
    while clients:
        await clients.pop().close()


def _release(loop: asyncio.AbstractEventLoop, clients: list[Any]) -> None:
    if clients and loop.is_running():
        asyncio.run_coroutine_threadsafe(_close(clients), loop)


async def _keys_of(client: Any) -> Any:
    """The credentials that a client signs with, None where their provider renews them."""
    credentials = client._request_signer._credentials
    if isinstance(credentials, botocore.credentials.RefreshableCredentials):
        return None
    return await credentials.get_frozen_credentials()


async def read_at_most(body: Any, length: int) -> bytearray:
    """The body, cut off one byte after `length`: a server that ignores the range sends it all."""
    span = bytearray(length)
    view = memoryview(span)
    filled = 0
    while chunk := await body.read(length - filled or 1):
        if filled == length:
            return span + chunk
        view[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    view.release()
    del span[filled:]
    return span
