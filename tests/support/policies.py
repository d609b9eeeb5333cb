"""IAM's evaluation of policies, for emulated accounts: documents in, a decision out.

After the IAM user guide, "Policy evaluation logic" and "Condition operators": an explicit deny
wins, then an allow, else it is denied implicitly. A condition whose key is missing from the request
does not hold, unless its operator ends in IfExists, is Null, or says Not (then it does).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from .aws_calls import Asked

Decision = Literal["allowed", "explicitDeny", "implicitDeny"]
Document = Mapping[str, Any]


def evaluate(
    documents: Iterable[Document],
    action: str,
    resource: str,
    context: Mapping[str, str] | None = None,
) -> Decision:
    """What identity policies say to an action on the resource whose ARN (or `*`) is asked about."""
    decision: Decision = "implicitDeny"
    for document in documents:
        for statement in _listed(document["Statement"]):
            if not applies(statement, action, resource, context or {}):
                continue
            if statement["Effect"] == "Deny":
                return "explicitDeny"
            decision = "allowed"
    return decision


def within_account(mine: Decision, resources: Document, arn: str, asked: Asked) -> Decision:
    """A bucket of the caller's account: either policy may allow, either may deny."""
    theirs, _ = _of_resource(resources, arn, asked)
    if "explicitDeny" in (mine, theirs):
        return "explicitDeny"
    return "allowed" if "allowed" in (mine, theirs) else "implicitDeny"


def across_accounts(mine: Decision, resources: Document, arn: str, asked: Asked) -> Decision:
    """A bucket of another account, or a key: its policy must allow, and the caller's own with it
    unless a key's policy names the caller."""
    theirs, by_name = _of_resource(resources, arn, asked)
    if "explicitDeny" in (mine, theirs):
        return "explicitDeny"
    enough = mine == "allowed" or (by_name and asked.action.startswith("kms:"))
    return "allowed" if theirs == "allowed" and enough else "implicitDeny"


def _of_resource(document: Document, arn: str, asked: Asked) -> tuple[Decision, bool]:
    """The decision of a resource's policy, and whether it names the caller and not an account."""
    account = arn.split(":")[4]
    spoken: list[tuple[Mapping[str, Any], bool]] = []
    for statement in _listed(document["Statement"]):
        principal = statement["Principal"]
        names = _listed(principal if principal == "*" else principal.get("AWS", []))
        if any(name in ("*", account, arn) or name.endswith(f"::{account}:root") for name in names):
            # a key's policy has one resource, itself
            spoken.append(({"Resource": "*", **statement}, arn in names))
    decided = evaluate(
        [{"Statement": [s for s, _ in spoken]}], asked.action, asked.resource, asked.context
    )
    named = [s for s, by_name in spoken if by_name]
    alone = evaluate([{"Statement": named}], asked.action, asked.resource, asked.context)
    return decided, alone == "allowed"


def applies(
    statement: Mapping[str, Any], action: str, resource: str, context: Mapping[str, str]
) -> bool:
    """Whether a statement speaks of this request: action, resource and every condition."""
    return (
        _named(statement, "Action", action, ignore_case=True)
        and _named(statement, "Resource", resource, ignore_case=False)
        and all(
            _holds(operator, _listed(values), context.get(key.lower()))
            for operator, keys in statement.get("Condition", {}).items()
            for key, values in keys.items()
        )
    )


def _named(statement: Mapping[str, Any], what: str, value: str, *, ignore_case: bool) -> bool:
    if f"Not{what}" in statement:
        return not _any_like(statement[f"Not{what}"], value, ignore_case)
    return _any_like(statement[what], value, ignore_case)


def _any_like(patterns: Any, value: str, ignore_case: bool) -> bool:
    if ignore_case:
        return any(like(pattern.lower(), value.lower()) for pattern in _listed(patterns))
    return any(like(pattern, value) for pattern in _listed(patterns))


def like(pattern: str, value: str) -> bool:
    """IAM's wildcards, * and ?; a * in what is asked about is an ordinary character."""
    escaped = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    return re.fullmatch(escaped, value, re.DOTALL) is not None


def _holds(operator: str, values: list[Any], asked: str | None) -> bool:
    name = operator.split(":")[-1]
    if name == "Null":
        return (asked is None) == (str(values[0]).lower() == "true")
    if asked is None:
        return name.endswith("IfExists") or name.startswith(("StringNot", "ArnNot"))
    name = name.removesuffix("IfExists")
    found = any(_TESTS[name.replace("Not", "")](str(value), asked) for value in values)
    return found != ("Not" in name)


_TESTS = {
    "StringEquals": lambda value, asked: value == asked,
    "StringEqualsIgnoreCase": lambda value, asked: value.lower() == asked.lower(),
    "StringLike": like,
    "ArnEquals": like,
    "ArnLike": like,
    "Bool": lambda value, asked: value.lower() == asked.lower(),
    "NumericLessThanEquals": lambda value, asked: float(asked) <= float(value),
    "NumericGreaterThanEquals": lambda value, asked: float(asked) >= float(value),
}


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
