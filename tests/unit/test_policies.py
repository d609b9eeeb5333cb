"""The emulated account's IAM evaluation, rule by rule of the IAM user guide."""

import pytest
from support.policies import evaluate

ALLOW = {"Effect": "Allow", "Action": "s3:Get*", "Resource": "arn:aws:s3:::bucket/data/*"}
DENY = {"Effect": "Deny", "Action": ["iam:*", "S3:getobjec?"], "Resource": "*"}
OTHERS = {"Effect": "Allow", "NotAction": "iam:*", "NotResource": "arn:aws:s3:::bucket/private/*"}


def when(**condition):
    return {**ALLOW, "Condition": condition}


@pytest.mark.parametrize(
    ("statements", "asked", "decision"),
    [
        ([], {}, "implicitDeny"),
        ([ALLOW], {}, "allowed"),
        ([ALLOW], {"action": "s3:PutObject"}, "implicitDeny"),
        ([ALLOW], {"resource": "*"}, "implicitDeny"),
        ([ALLOW, DENY], {}, "explicitDeny"),
        ([DENY, ALLOW], {}, "explicitDeny"),
        ([OTHERS], {}, "allowed"),
        ([OTHERS], {"action": "iam:PassRole"}, "implicitDeny"),
        ([OTHERS], {"resource": "arn:aws:s3:::bucket/private/x"}, "implicitDeny"),
        ([when(StringEquals={"a:B": ["x", "y"]})], {"key": "y"}, "allowed"),
        ([when(StringEquals={"a:B": "x"})], {"key": "y"}, "implicitDeny"),
        ([when(StringEquals={"a:B": "x"})], {}, "implicitDeny"),
        ([when(StringEqualsIfExists={"a:B": "x"})], {}, "allowed"),
        ([when(StringNotEquals={"a:B": "x"})], {}, "allowed"),
        ([when(StringNotEquals={"a:B": ["x", "y"]})], {"key": "y"}, "implicitDeny"),
        ([when(StringLike={"a:B": "/aws/*"})], {"key": "/aws/logs"}, "allowed"),
        ([when(Bool={"a:B": "false"})], {"key": "False"}, "allowed"),
        ([when(Null={"a:B": "true"})], {}, "allowed"),
        ([when(StringLike={"a:B": "x"}, Bool={"c:D": "true"})], {"key": "x"}, "implicitDeny"),
    ],
)
def test_a_decision(statements, asked, decision):
    action = asked.get("action", "s3:GetObject")
    resource = asked.get("resource", "arn:aws:s3:::bucket/data/x")
    context = {"a:b": asked["key"]} if "key" in asked else {}
    assert evaluate([{"Statement": statements}], action, resource, context) == decision
