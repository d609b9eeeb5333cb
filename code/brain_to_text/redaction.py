"""Text without secrets, on one line: what may stand in a log, a message or a request."""

from __future__ import annotations

import os
import re

_SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
_SECRET_PATTERN = re.compile(
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # an access key's id
    r"|\b(?:hf_|gh[pousr]_|github_pat_|xox[abeoprs]-|sk-)[\w-]{16,}"  # tokens of web services
    r"|(?<=://)[^/\s@]+(?=@)"  # user and password inside a URL
    r"|(?i:(?<=[?&])(?:X-Amz-(?:Signature|Credential|Security-Token)|Signature|AWSAccessKeyId)"
    r"=[^&\s'\"]+)"  # what signs a presigned URL
)


_SECRET_NAME = re.compile(
    r"secret|token|passw|credential|private|(?:^|[^a-z])(?:pass|pat|(?:api|access)?key)(?![a-z])",
    re.I,
)


def looks_secret(name: str, value: str) -> bool:
    """Whether a setting's name or value has the form of a secret."""
    return bool(_SECRET_NAME.search(name)) or redact(value) != value


def redact(text: str) -> str:
    """`text` with this process's credentials, and anything shaped like some, masked."""
    for name in _SECRET_VARIABLES:
        secret = os.environ.get(name, "").strip()
        if len(secret) > 7:
            text = text.replace(secret, "***")
    return _SECRET_PATTERN.sub("***", text)


def one_line(text: str) -> str:
    """`text` without secrets and without control characters, which could fake a line of the log."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in redact(text))
