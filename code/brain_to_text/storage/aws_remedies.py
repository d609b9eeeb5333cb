"""What to do about an error code of AWS, whatever service answered; needs no package.

Codes that only one service or one command can explain are where that service is called.
"""

from __future__ import annotations

import re

DENIED = ("AccessDenied", "AccessDeniedException", "AllAccessDisabled", "403")
_LOGIN = "the session token has expired: get a new one with 'aws sso login'"
_CLOCK = "this machine's clock is off: set it, for instance by 'sudo timedatectl set-ntp true'"
_KEY = "there is no such access key (any more): run 'aws configure'"
# The credentials in use are worth renewing at once: the provider still believed in a token, or a
# key was rotated.
REJECTED = {
    "ExpiredToken": _LOGIN,
    "ExpiredTokenException": _LOGIN,
    "TokenRefreshRequired": _LOGIN,
    "InvalidToken": "AWS_SESSION_TOKEN does not belong to the access key: unset it, or get new "
    "credentials with 'aws sso login'",
    "InvalidAccessKeyId": _KEY,
}
_OTHERS = {
    "InvalidClientTokenId": _KEY,
    "UnrecognizedClientException": _KEY,
    "RequestTimeTooSkewed": _CLOCK,
    "RequestExpired": _CLOCK,
    "SignatureDoesNotMatch": "the secret key does not belong to the access key, or a proxy on the "
    "way changes requests: check AWS_SECRET_ACCESS_KEY or run 'aws configure'",
}


def is_about_a_key(code: str, words: str) -> bool:
    """Whether KMS refused, itself or through the service that answered."""
    return code.startswith("KMS.") or (code in DENIED and "kms:" in words)


def remedy(code: str, words: str) -> str:
    """What to do; "" where the code and the service's words do not tell."""
    if is_about_a_key(code, words):
        action = re.search(r"kms:[A-Z]\w+", words)
        key = re.search(r"arn:[\w-]+:kms:[\w:/-]+", words)
        allowed = f"{action[0] if action else 'kms:Decrypt'} on {key[0] if key else 'the key'}"
        return (
            f"allow {allowed} for these credentials, in their policy and in the key's, and see "
            "that the key is enabled (for a job's role: deploy the stack with KmsKeyArn)"
        )
    if code in DENIED and "service control policy" in words:
        return "your organisation forbids it: ask which types, regions and networks it allows"
    return {**REJECTED, **_OTHERS}.get(code, "")
