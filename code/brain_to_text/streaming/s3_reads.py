"""Ranged GETs from S3: by obstore where it can, else by s3fs's client.

obstore's transport needs neither the interpreter nor its lock: while the training thread is busy in
Python, cold steps are 1.2 to 1.4 times as fast as through s3fs (tests/benchmarks/RESULTS.md). s3fs
remains for what only botocore knows: redirects to another region, access points, endpoints of a
profile, FIPS and dual stack; and for servers that answer a range with status 200.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import os
import re
import time
from pathlib import Path
from typing import Any

import botocore.credentials
import botocore.exceptions
import botocore.session
import fsspec.asyn
import obstore
from obstore.store import S3Store

from ..errors import StorageError
from ..storage.locations import S3_ETAG, split_s3_url
from ..storage.retry import CredentialsRejectedError, ObjectReplacedError, ReadError
from ..storage.s3_client import S3Client, read_at_most
from ..storage.s3_errors import (
    PROVIDER_ERRORS,
    answer_fault,
    is_web_page,
    named_cause,
    web_page_fault,
)

log = logging.getLogger("brain_to_text")

_SWITCHES = (
    "use_fips_endpoint",
    "use_dualstack_endpoint",
    "ignore_configured_endpoint_urls",
)
_REDIRECTS = {"PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed"}
_OTHER_REGION = "the bucket is in another region than AWS_REGION"
_RENEWAL_INTERVAL_SECONDS = 2.0


class _UnsuitableClientError(Exception):
    """The server asks for something that this client cannot do."""


class S3RangedReader:
    """Ranged GETs; the clients' own retries are turned off.

    Credentials come from botocore's provider chain and are renewed by the provider; they are never
    kept elsewhere. The endpoint is AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL where set.

    Args:
        url: s3://bucket/prefix.
        concurrency: connections kept.
        read_timeout_seconds: silence after which an attempt fails.

    Raises:
        StorageError: no credentials, or profile, region or endpoint make no sense.
    """

    def __init__(self, url: str, concurrency: int, read_timeout_seconds: float) -> None:
        self.loop = fsspec.asyn.get_loop()
        self._seen: dict[str, str] = {}  # first ETag of files whose own one is not S3's
        self._proven = False
        self._first_read = asyncio.Lock()
        self._one_renewal = asyncio.Lock()
        self._asked = -_RENEWAL_INTERVAL_SECONDS
        self._fault: CredentialsRejectedError | None = None
        self._hope = False
        self._s3fs = _S3fsClient(url, concurrency, read_timeout_seconds)
        self._client: _S3fsClient | _ObstoreClient = self._s3fs
        try:
            if _obstore_will_do(self._s3fs.bucket):
                self._client = _ObstoreClient(url, read_timeout_seconds)
            else:
                # making this client takes a good part of a second: not at the first read's expense
                fsspec.asyn.sync(self.loop, self._s3fs.connect)
        except (botocore.exceptions.BotoCoreError, ValueError) as error:
            raise StorageError(
                f"No S3 client for {url}: {error}; check AWS_PROFILE, AWS_REGION and "
                "AWS_ENDPOINT_URL_S3, or run 'aws configure'."
            ) from error

    async def read(self, key: str, offset: int, length: int, etag: str) -> bytearray | memoryview:
        expected = etag if S3_ETAG.fullmatch(etag) else self._seen.get(key)
        answer = None
        if not self._proven:  # alone: the first answer may show that this client is the wrong one
            async with self._first_read:
                if not self._proven:
                    answer = await self._get(key, offset, length, expected)
                    self._proven = True
        found, span = answer or await self._get(key, offset, length, expected)
        if len(span) != length and is_web_page(span):
            raise web_page_fault()
        if found and found != (expected or self._seen.setdefault(key, found)):
            raise ObjectReplacedError(f"its ETag is {found}, no longer {expected}")
        return span

    async def _get(
        self, key: str, offset: int, length: int, etag: str | None
    ) -> tuple[str, bytearray | memoryview]:
        client = self._client
        try:
            return await client.get(key, offset, length, etag)
        except _UnsuitableClientError as error:
            if self._client is client:  # the first of several reads to find out
                log.info("Reading through s3fs: %s", error)
                self._client = self._s3fs
            raise ReadError(str(error)) from error

    async def renew_credentials(self) -> bool:
        """Ask the provider for all reads together; in between its last answer stands, a no too."""
        async with self._one_renewal:
            if time.monotonic() - self._asked > _RENEWAL_INTERVAL_SECONDS:
                try:
                    self._hope, self._fault = await self._client.renew_credentials(), None
                except CredentialsRejectedError as fault:
                    self._fault = fault
                self._asked = time.monotonic()
            if self._fault is not None:
                raise CredentialsRejectedError(str(self._fault), self._fault.advice)
            return self._hope

    async def close(self) -> None:
        self._client = self._s3fs  # the other one's connections end with it
        await self._s3fs.close()


def _obstore_will_do(bucket: str) -> bool:
    """obstore knows plain buckets at plain endpoints; what else a profile can ask is botocore's."""
    if bucket.startswith("arn:") or bucket.endswith("--x-s3"):
        return False
    profile = botocore.session.Session().get_scoped_config()
    switches = {name: os.environ.get(f"AWS_{name.upper()}", "") for name in _SWITCHES}
    asked = any(value.lower() == "true" for value in switches.values())
    return not (asked or profile.keys() & {"endpoint_url", "services", "s3", *_SWITCHES})


class _Credentials:
    """What obstore signs with. It holds this, not the client: nothing sees a circle through it."""

    def __init__(self) -> None:
        self.session = botocore.session.Session()
        self._current = self._find()

    def __call__(self) -> Any:
        """obstore asks again for nearly every request."""
        frozen = self._current.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=30),
        }

    def renew(self) -> bool:
        """As `S3Client.renew_credentials`."""
        before = self._current
        try:
            self.session = botocore.session.Session()
            self._current = self._find()
            after = self._current.get_frozen_credentials()
        except PROVIDER_ERRORS as error:
            raise CredentialsRejectedError(
                f"credentials cannot be renewed ({named_cause(error)})"
            ) from error
        if isinstance(self._current, botocore.credentials.RefreshableCredentials):
            return True
        return before.get_frozen_credentials() != after

    def _find(self) -> botocore.credentials.Credentials:
        credentials = self.session.get_credentials()
        if credentials is None:
            raise botocore.exceptions.NoCredentialsError
        return credentials


class _ObstoreClient:
    def __init__(self, url: str, read_timeout_seconds: float) -> None:
        bucket, prefix = split_s3_url(url)
        self._credentials = _Credentials()
        session = self._credentials.session
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        silence = datetime.timedelta(seconds=read_timeout_seconds)
        options: dict[str, Any] = {
            "connect_timeout": silence,
            "read_timeout": silence,
            "timeout": datetime.timedelta(days=1),  # the budget is our business
            "allow_http": bool(endpoint and endpoint.startswith("http://")),
        }
        bundle = session.get_config_variable("ca_bundle")
        if bundle:
            options["root_certificate"] = Path(bundle).read_bytes()
        self._store = S3Store(
            bucket,
            prefix=prefix or None,
            region=session.get_config_variable("region") or "us-east-1",
            virtual_hosted_style_request=False,
            client_options=options,  # type: ignore[arg-type]
            retry_config={"max_retries": 0},
            credential_provider=self._credentials,
            **({"endpoint": endpoint} if endpoint else {}),  # type: ignore[arg-type]
        )

    async def get(
        self, key: str, offset: int, length: int, etag: str | None
    ) -> tuple[str, memoryview]:
        options: Any = {"range": (offset, offset + length)}
        if etag:
            options["if_match"] = f'"{etag}"'
        try:
            answer = await obstore.get_async(self._store, key, options=options)
            body = await answer.bytes_async()
        except (obstore.exceptions.BaseError, OSError) as error:
            raise _obstore_fault(error) from error
        return (answer.meta.get("e_tag") or "").strip('"'), memoryview(body)

    async def renew_credentials(self) -> bool:
        return await asyncio.to_thread(self._credentials.renew)


def _obstore_fault(error: Exception) -> Exception:
    """What a failed attempt means, in words; obstore has one error type and much text."""
    text = str(error)
    if "non-partial response" in text:
        return _UnsuitableClientError("the server answers a byte range with status 200")
    if "InvalidCertificate" in text:
        return _UnsuitableClientError("the server's certificate is not one for obstore")
    if "ETag Header missing" in text:
        return _UnsuitableClientError("the server sends no ETag")
    if "redirect without LOCATION" in text:  # how S3 answers for a bucket of another region
        return _UnsuitableClientError(_OTHER_REGION)
    status = re.search(r"status code: (\d{3})", text)
    code = re.search(r"<Code>(\w+)</Code>", text)
    if status:
        name = code[1] if code else status[1]
        if name in _REDIRECTS or status[1] in ("301", "307"):
            return _UnsuitableClientError(_OTHER_REGION)
        page = re.search(r"<(!doctype )?html", text, re.IGNORECASE)
        return answer_fault(status[1], name, page[0].encode() if page else b"")
    summary = " ".join(text.split("Debug source")[0].split())
    detail = re.search(r"TimedOut|ConnectionRefused|ConnectionReset|UnexpectedEof|dns error", text)
    return ReadError(summary[:250] + (f" ({detail[0]})" if detail else ""))


class _S3fsClient(S3Client):
    async def get(
        self, key: str, offset: int, length: int, etag: str | None
    ) -> tuple[str, bytearray]:
        conditions = {"IfMatch": f'"{etag}"'} if etag else {}

        async def request(client: Any) -> tuple[str, bytearray]:
            answer = await client.get_object(
                Bucket=self.bucket,
                Key=self.root + key,
                Range=f"bytes={offset}-{offset + length - 1}",
                **conditions,
            )
            body = answer["Body"]
            try:
                return answer.get("ETag", "").strip('"'), await read_at_most(body, length)
            finally:
                body.close()

        return await self.call(request)
