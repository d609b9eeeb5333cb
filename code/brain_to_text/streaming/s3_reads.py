"""Ranged GETs from S3: by obstore where it can, else by s3fs.

obstore's transport needs neither the interpreter nor its lock (tests/benchmarks/RESULTS.md). s3fs
remains for what only botocore knows: redirects to another region, access points, endpoints of a
profile, FIPS and dual stack; and for servers that answer a range with status 200.
"""

from __future__ import annotations

import datetime
import html
import logging
import os
import re
from pathlib import Path
from typing import Any

import botocore.exceptions
import botocore.session
import obstore
from obstore.store import S3Store

from ..errors import StorageError
from ..storage.locations import S3_ETAG, split_s3_url
from ..storage.retry import ObjectReplacedError, ReadError, RetryPolicy
from ..storage.s3_errors import answer_fault, explained, is_web_page, web_page_fault
from ..storage.s3_store import Credentials, S3Connection, endpoint_url

log = logging.getLogger("brain_to_text")

_SWITCHES = (
    "use_fips_endpoint",
    "use_dualstack_endpoint",
    "ignore_configured_endpoint_urls",
)
_REDIRECTS = {"PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed"}
_OTHER_REGION = "the bucket is in another region than AWS_REGION"


class _UnsuitableClientError(Exception):
    """The server asks for something that obstore cannot do."""


class S3RangedReader:
    """One attempt at a ranged GET per call, from any thread; the clients' own retries are off.

    Credentials come from botocore's provider chain and are renewed by the provider; they are never
    kept elsewhere. The endpoint is AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL where set.

    Args:
        url: s3://bucket/prefix.
        concurrency: connections kept.
        retry: how long an attempt may take.
        longest: bytes of the longest read.

    Raises:
        StorageError: no credentials, or profile, region or endpoint make no sense.
    """

    def __init__(self, url: str, concurrency: int, retry: RetryPolicy, longest: int) -> None:
        bucket, prefix = split_s3_url(url)
        self._root = f"{bucket}/{prefix}/" if prefix else f"{bucket}/"
        self._retry = retry
        self._seen: dict[str, str] = {}  # first ETag of files whose own one is not S3's
        self._s3fs = S3Connection(concurrency, retry.read_timeout_seconds)
        self.renew_credentials = self._s3fs.credentials.renew
        self._obstore: S3Store | None = None
        try:
            if _obstore_will_do(bucket):
                self._s3fs.credentials.find()
                self._obstore = _obstore(url, self._s3fs.credentials, retry, longest)
            else:
                # making this client takes a good part of a second: not at the first read's expense
                self._s3fs.client()
        except (botocore.exceptions.BotoCoreError, ValueError, ReadError) as error:
            raise StorageError(
                f"No S3 client for {url}: {error}; check AWS_PROFILE, AWS_REGION and "
                "AWS_ENDPOINT_URL_S3, or run 'aws configure'."
            ) from error

    def read(self, key: str, offset: int, length: int, etag: str) -> bytes | memoryview:
        """See `RangedReader`. Through s3fs nobody sees an ETag: there the CRC-32 decides alone."""
        store = self._obstore
        if store is None:
            limit = self._retry.attempt_seconds(length)
            with explained():
                span: bytes | memoryview = self._s3fs.client().cat_file(
                    self._root + key, start=offset, end=offset + length, timeout=limit
                )
        else:
            expected = etag if S3_ETAG.fullmatch(etag) else self._seen.get(key)
            found, span = self._get(store, key, offset, length, expected)
            if found and found != (expected or self._seen.setdefault(key, found)):
                raise ObjectReplacedError(f"its ETag is {found}, no longer {expected}")
        if len(span) != length and is_web_page(span):
            raise web_page_fault()
        return span

    def _get(
        self, store: S3Store, key: str, offset: int, length: int, etag: str | None
    ) -> tuple[str, memoryview]:
        options: Any = {"range": (offset, offset + length)}
        if etag:
            options["if_match"] = f'"{etag}"'
        try:
            answer = obstore.get(store, key, options=options)
            return (answer.meta.get("e_tag") or "").strip('"'), memoryview(answer.bytes())
        except (obstore.exceptions.BaseError, OSError) as error:
            fault = _obstore_fault(error)
            if isinstance(fault, _UnsuitableClientError):
                if self._obstore is store:  # the first of several reads to find out
                    self._obstore = None
                    log.info("Reading through s3fs: %s", fault)
                raise ReadError(str(fault)) from error
            raise fault from error

    def close(self) -> None:
        """Close connections; those of reads under way when these end."""
        self._obstore = None
        self._s3fs.close()


def _obstore_will_do(bucket: str) -> bool:
    """obstore knows plain buckets at plain endpoints; what else a profile can ask is botocore's."""
    if bucket.startswith("arn:") or bucket.endswith("--x-s3"):
        return False
    profile = botocore.session.Session().get_scoped_config()
    switches = {name: os.environ.get(f"AWS_{name.upper()}", "") for name in _SWITCHES}
    asked = any(value.lower() == "true" for value in switches.values())
    return not (asked or profile.keys() & {"endpoint_url", "services", "s3", *_SWITCHES})


def _obstore(url: str, credentials: Credentials, retry: RetryPolicy, longest: int) -> S3Store:
    bucket, prefix = split_s3_url(url)
    session = botocore.session.Session()
    endpoint = endpoint_url()
    silence = datetime.timedelta(seconds=retry.read_timeout_seconds)
    options: dict[str, Any] = {
        "connect_timeout": silence,
        "read_timeout": silence,
        "timeout": datetime.timedelta(seconds=retry.attempt_seconds(longest)),
        "allow_http": bool(endpoint and endpoint.startswith("http://")),
    }
    bundle = session.get_config_variable("ca_bundle")
    if bundle:
        options["root_certificate"] = Path(bundle).read_bytes()
    return S3Store(
        bucket,
        prefix=prefix or None,
        region=session.get_config_variable("region") or "us-east-1",
        virtual_hosted_style_request=False,
        client_options=options,  # type: ignore[arg-type]
        retry_config={"max_retries": 0},
        credential_provider=credentials,
        **({"endpoint": endpoint} if endpoint else {}),  # type: ignore[arg-type]
    )


def _obstore_fault(error: Exception) -> ReadError | _UnsuitableClientError:
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
    code = re.search(r"<Code>([\w.]+)</Code>", text)
    words = re.search(r"<Message>(.*?)</Message>", text, re.DOTALL)
    if status:
        name = code[1] if code else status[1]
        if name in _REDIRECTS or status[1] in ("301", "307"):
            return _UnsuitableClientError(_OTHER_REGION)
        page = re.search(r"<(!doctype )?html", text, re.IGNORECASE)
        said = html.unescape(words[1]).replace("\\n", " ") if words else ""
        return answer_fault(status[1], name, said, web_page=page is not None)
    summary = " ".join(text.split("Debug source")[0].split())
    detail = re.search(r"TimedOut|ConnectionRefused|ConnectionReset|UnexpectedEof|dns error", text)
    return ReadError(summary[:250] + (f" ({detail[0]})" if detail else ""))
