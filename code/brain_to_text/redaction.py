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
    r"|(?<=://)[^/\s@]+(?=@)"  # user and password inside a URL
    r"|(?i:(?<=[?&])(?:X-Amz-(?:Signature|Credential|Security-Token)|Signature|AWSAccessKeyId)"
    r"=[^&\s'\"]+)"  # what signs a presigned URL
)


def redact(text: str) -> str:
    """`text` with this process's credentials, and anything shaped like some, masked."""
    for name in _SECRET_VARIABLES:
        secret = os.environ.get(name)
        if secret and len(secret) > 7:
            text = text.replace(secret, "***")
    return _SECRET_PATTERN.sub("***", text)


def one_line(text: str) -> str:
    """`text` without secrets and without control characters, which could fake a line of the log."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in redact(text))
