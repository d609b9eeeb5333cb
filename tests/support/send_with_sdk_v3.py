"""Submit the requests on standard input through SDK v3, print what went over the wire.

Runs in a process of its own, because v2 and v3 are both named `sagemaker`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from brain_to_text.launch.job_submission import installed_sdk, submit
from pytest import MonkeyPatch

from support.aws_emulation import emulated_aws


def main() -> None:
    requests: dict[str, dict[str, Any]] = json.load(sys.stdin)
    assert installed_sdk() == "v3"
    sent = {}
    for case, request in requests.items():
        with MonkeyPatch.context() as patch, emulated_aws(patch) as aws:
            submit(request, aws.account)
            (sent[case],) = aws.sent
    print(json.dumps(sent))


if __name__ == "__main__":
    main()
