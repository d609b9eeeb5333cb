"""The tests' own IAM evaluation, against what the IAM user guide says of each rule."""

import pytest
from support.policies import evaluate

OBJECT = "arn:aws:s3:::bucket/data/x"


def statement(**fields):
    return {"Effect": "Allow", "Action": "s3:GetObject", "Resource": "*", **fields}


def decided(*statements, action="s3:GetObject", resource=OBJECT, **context):
    keys = {name.replace("_", ":"): value for name, value in context.items()}
    return evaluate([{"Statement": list(statements)}], action, resource, keys)


def test_nothing_said_is_denied():
    assert decided() == "implicitDeny"
    assert decided(statement(Action="s3:PutObject")) == "implicitDeny"


def test_an_explicit_deny_wins_wherever_it_stands():
    deny = statement(Effect="Deny", Action="s3:*")
    assert decided(statement(), deny) == decided(deny, statement()) == "explicitDeny"


@pytest.mark.parametrize(
    "pattern, matches",
    [("s3:Get*", True), ("S3:getobject", True), ("s3:GetObjec?", True), ("s3:Put*", False)]
    + [("*", True), ("s3.GetObject", False)],
)
def test_actions_know_wildcards_and_no_case(pattern, matches):
    assert (decided(statement(Action=pattern)) == "allowed") == matches
    assert (decided(statement(Action=["s3:ListBucket", pattern])) == "allowed") == matches


def test_not_action_and_not_resource_are_everything_else():
    other = {"Effect": "Allow", "NotAction": "iam:*", "Resource": "*"}
    assert decided(other) == "allowed"
    assert decided(other, action="iam:PassRole") == "implicitDeny"
    beyond = {"Effect": "Allow", "Action": "s3:*", "NotResource": "arn:aws:s3:::bucket/data/*"}
    assert decided(beyond) == "implicitDeny"
    assert decided(beyond, resource="arn:aws:s3:::bucket/other") == "allowed"


def test_asking_about_everything_matches_only_a_policy_that_says_so():
    narrow = statement(Resource="arn:aws:s3:::bucket/*")
    assert decided(narrow, resource="*") == "implicitDeny"
    assert decided(narrow) == "allowed"
    assert decided(statement(), resource="*") == "allowed"


@pytest.mark.parametrize(
    "condition, asked, holds",
    [
        ({"StringEquals": {"iam:PassedToService": "a"}}, {"iam_passedtoservice": "a"}, True),
        ({"StringEquals": {"iam:PassedToService": "a"}}, {"iam_passedtoservice": "b"}, False),
        ({"StringEquals": {"iam:PassedToService": ["b", "a"]}}, {"iam_passedtoservice": "a"}, True),
        ({"StringEquals": {"iam:PassedToService": "a"}}, {}, False),
        ({"StringEqualsIfExists": {"iam:PassedToService": "a"}}, {}, True),
        ({"StringNotEquals": {"iam:PassedToService": "a"}}, {}, True),
        (
            {"StringNotEquals": {"iam:PassedToService": ["a", "b"]}},
            {"iam_passedtoservice": "b"},
            False,
        ),
        ({"StringLike": {"a:b": "/aws/*"}}, {"a_b": "/aws/sagemaker"}, True),
        ({"Bool": {"a:b": "false"}}, {"a_b": "False"}, True),
        ({"Null": {"a:b": "true"}}, {}, True),
        ({"Null": {"a:b": "false"}}, {}, False),
        ({"StringLike": {"a:b": "x"}, "Bool": {"c:d": "true"}}, {"a_b": "x"}, False),
    ],
)
def test_conditions(condition, asked, holds):
    assert (decided(statement(Condition=condition), **asked) == "allowed") == holds


def test_an_operator_that_nobody_wrote_is_an_error_and_no_answer():
    with pytest.raises(KeyError):
        decided(statement(Condition={"DateLessThan": {"a:b": "x"}}), a_b="y")
