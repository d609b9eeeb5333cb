"""The two clients of S3: obstore for ranged GETs, s3fs for everything else and where obstore can't.

obstore's transport needs neither the interpreter nor its lock (tests/benchmarks/RESULTS.md). s3fs
reads what only botocore knows: redirects to another region, access points, endpoints of a profile,
FIPS and dual stack; and servers that answer a range with status 200. Credentials, region and
endpoint come from the standard provider chain of the AWS SDK (environment, profile, container or
instance role), which also renews them. The clients' own retries are off.
"""

from __future__ import annotations

import datetime
import html
import logging
import os
import re
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import botocore.credentials
import botocore.exceptions
import botocore.session
import s3fs

from .aws_errors import AWS_LOGIN, answer_fault, explained, fault_of
from .locations import split_s3_url
from .retry import CredentialsRejectedError, RequestError, RetryPolicy

if TYPE_CHECKING:
    from obstore.store import S3Store as ObstoreClient

log = logging.getLogger("brain_to_text")

_CONNECTIONS = 64  # of each client
_RENEWAL_INTERVAL_SECONDS = 2.0
_SWITCHES = ("use_fips_endpoint", "use_dualstack_endpoint", "ignore_configured_endpoint_urls")
# what obstore's text says, and why s3fs has to read then
_UNSUITABLE = {
    "non-partial response": "the server answers a byte range with status 200",
    "InvalidCertificate": "the server's certificate is not one for obstore",
    "ETag Header missing": "the server sends no ETag",
    **dict.fromkeys(
        (
            "redirect without LOCATION",
            "<Code>PermanentRedirect</Code>",
            "<Code>TemporaryRedirect</Code>",
            "<Code>AuthorizationHeaderMalformed</Code>",
            "status code: 301",
            "status code: 307",
        ),
        "the bucket is in another region than AWS_REGION",
    ),
}


class S3Clients:
    """The clients of one prefix, made on first use, for all threads of a process.

    Args:
        url: s3://bucket/prefix.
        retry: how long an attempt may take.
    """

    def __init__(self, url: str, retry: RetryPolicy) -> None:
        self._url, self._retry = url, retry
        self._lock = threading.Lock()
        self._credentials = Credentials()
        self._s3fs: dict[tuple[int, int], s3fs.S3FileSystem] = {}
        self._obstore: ObstoreClient | None = None
        self._longest = 4 << 20  # bytes that obstore's time limit is made for
        self._suitable: bool | None = None  # obstore, as far as is known
        self.renew = self._credentials.renew

    def s3fs_client(self, retries: int = 1) -> s3fs.S3FileSystem:
        """The client that makes up to `retries` attempts at each request itself.

        Raises:
            RequestError: profile, region or endpoint make no sense, or there are no credentials.
        """
        kind = (retries, self._credentials.renewals)
        with self._lock, explained("reach", self._url):
            if kind not in self._s3fs:
                # s3fs closes an earlier client once nobody reads through it any more
                self._s3fs = {k: c for k, c in self._s3fs.items() if k[1] == kind[1]}
                self._s3fs[kind] = self._new_s3fs(retries)
            return self._s3fs[kind]

    def read_range(
        self, key: str, offset: int, length: int, etag: str | None
    ) -> tuple[str, bytes | memoryview]:
        """One attempt at one ranged GET.

        Args:
            key: below the prefix.
            etag: of the object; another one is an error where obstore reads.

        Returns:
            The object's ETag, "" where s3fs reads, which shows none; and what arrived.

        Raises:
            RequestError: the attempt failed.
        """
        client = self._obstore_for(length)
        if client is None:
            span = {"start": offset, "end": offset + length}
            limit = self._retry.attempt_seconds(length)
            with explained("read", f"{self._url}/{key}"):
                path = f"{self._url.removeprefix('s3://')}/{key}"
                return "", self.s3fs_client().cat_file(path, timeout=limit, **span)
        import obstore

        options: Any = {"range": (offset, offset + length)}
        if etag:
            options["if_match"] = f'"{etag}"'
        try:
            answer = obstore.get(client, key, options=options)
            return (answer.meta.get("e_tag") or "").strip('"'), memoryview(answer.bytes())
        except (obstore.exceptions.BaseError, OSError) as error:
            text = str(error)
            reason = next((_UNSUITABLE[sign] for sign in _UNSUITABLE if sign in text), None)
            if reason is None:
                raise _fault(text, f"{self._url}/{key}") from error
            with self._lock:
                if self._suitable:  # the first of several reads to find out
                    log.info("Reading through s3fs: %s", reason)
                self._suitable, self._obstore = False, None
            raise RequestError(reason) from error

    def close(self) -> None:
        """Close connections; a later call opens them anew."""
        with self._lock:
            self._s3fs, self._obstore = {}, None

    def _new_s3fs(self, retries: int) -> s3fs.S3FileSystem:
        client = s3fs.S3FileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            config_kwargs={
                "retries": {"mode": "standard", "total_max_attempts": 1},
                "max_pool_connections": _CONNECTIONS,
                "connect_timeout": self._retry.read_timeout_seconds,
                "read_timeout": self._retry.read_timeout_seconds,
                # S3 has no checksum of a part of an object; ours is the manifest's CRC.
                "response_checksum_validation": "when_required",
                # servers other than S3 are rarely reachable as BUCKET.HOST
                **({"s3": {"addressing_style": "path"}} if _endpoint() else {}),
            },
        )
        client.retries = retries
        client.connect()
        return client

    def _obstore_for(self, length: int) -> ObstoreClient | None:
        with self._lock, explained("reach", self._url):
            if length > self._longest:
                self._longest, self._obstore = 2 * length, None
            if self._suitable is None:
                self._suitable = _obstore_will_do(split_s3_url(self._url)[0])
            if self._obstore is None and self._suitable:
                self._credentials.find()
                self._obstore = self._new_obstore()
            return self._obstore

    def _new_obstore(self) -> ObstoreClient:
        from obstore.store import S3Store

        bucket, prefix = split_s3_url(self._url)
        session = botocore.session.Session()
        endpoint = _endpoint()
        silence = datetime.timedelta(seconds=self._retry.read_timeout_seconds)
        options: dict[str, Any] = {
            "connect_timeout": silence,
            "read_timeout": silence,
            "timeout": datetime.timedelta(seconds=self._retry.attempt_seconds(self._longest)),
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
            credential_provider=self._credentials,
            **({"endpoint": endpoint} if endpoint else {}),  # type: ignore[arg-type]
        )


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _obstore_will_do(bucket: str) -> bool:
    """obstore knows plain buckets at plain endpoints; what else a profile can ask is botocore's."""
    if find_spec("obstore") is None or bucket.startswith("arn:") or bucket.endswith("--x-s3"):
        return False
    profile = botocore.session.Session().get_scoped_config()
    asked = any(os.environ.get(f"AWS_{name.upper()}", "").lower() == "true" for name in _SWITCHES)
    return not (asked or profile.keys() & {"endpoint_url", "services", "s3", *_SWITCHES})


def _fault(text: str, url: str) -> RequestError:
    """What a failed attempt of obstore means; it has one error type and much text."""
    status = re.search(r"status code: (\d{3})", text)
    if status:
        code = re.search(r"<Code>([\w.]+)</Code>", text)
        words = re.search(r"<Message>(.*?)</Message>", text, re.DOTALL)
        return answer_fault(
            "read",
            url,
            status[1],
            code[1] if code else status[1],
            html.unescape(words[1]).replace("\\n", " ") if words else "",
            html=re.search(r"<(!doctype )?html", text, re.IGNORECASE) is not None,
        )
    summary = " ".join(text.split("Debug source")[0].split())
    detail = re.search(r"TimedOut|ConnectionRefused|ConnectionReset|UnexpectedEof|dns error", text)
    return RequestError(summary[:250] + (f" ({detail[0]})" if detail else ""))


class Credentials:
    """What botocore's provider chain gives, for all threads together; never kept elsewhere.

    Attributes:
        renewals: how often the chain was asked anew.
    """

    def __init__(self) -> None:
        self.renewals = 0
        self._lock = threading.Lock()
        self._asked = -_RENEWAL_INTERVAL_SECONDS
        self._renewed: bool | RequestError = False
        self._current: botocore.credentials.Credentials | None = None

    def find(self) -> None:
        """Ask the chain.

        Raises:
            BotoCoreError, ValueError: there are none, or the settings make no sense.
        """
        current = botocore.session.Session().get_credentials()
        if current is None:
            raise botocore.exceptions.NoCredentialsError
        self._current = current

    def __call__(self) -> Any:
        """What obstore signs with; it asks again for nearly every request."""
        assert self._current is not None
        frozen = self._current.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=30),
        }

    def renew(self) -> bool:
        """Ask the chain anew, at most once in a few seconds; in between its last answer stands.

        Returns:
            False where it is no use: the same credentials, and they come from no provider that
            renews them.

        Raises:
            CredentialsRejectedError: they have none to give.
        """
        with self._lock:
            if time.monotonic() - self._asked > _RENEWAL_INTERVAL_SECONDS:
                before = self._current
                self.renewals += 1
                try:
                    self.find()
                    self._renewed = _may_differ(self._current, before)
                except Exception as error:  # noqa: BLE001 (providers have no common class of errors)
                    self._renewed = fault_of(error, "renew", "credentials")
                self._asked = time.monotonic()
            if isinstance(self._renewed, bool):
                return self._renewed
            cause = f"credentials cannot be renewed ({self._renewed})"
            raise CredentialsRejectedError(cause, self._renewed.advice or AWS_LOGIN)


def _may_differ(now: Any, before: Any) -> bool:
    """Whether credentials are others than before, or will be at some time."""
    if isinstance(now, botocore.credentials.RefreshableCredentials):
        return True
    return before is not None and (before.get_frozen_credentials() != now.get_frozen_credentials())
