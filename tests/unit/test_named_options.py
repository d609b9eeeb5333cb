"""Every option and command that an error message or a document names exists."""

import argparse
import ast
import difflib
import re
from pathlib import Path

import evaluate_model
import launch_sagemaker_job
import prepare_dataset
import pytest
import train_model_sagemaker
from brain_to_text.config import config_keys
from brain_to_text.training.container import SageMakerEnvironment

TOP = Path(__file__).parents[2]
CODE = TOP / "code"
DOCUMENTS = sorted(
    path
    for path in [*TOP.glob("*.md"), *CODE.glob("*.md"), *TOP.glob(".github/*.md")]
    if path.name != "CHANGELOG.md"  # it names what went
)
OPTION = re.compile(r"(?<![\w/.`*=-])--([A-Za-z][\w.-]*[\w])")
COMMAND = re.compile(r"\b(prepare_dataset)\.py`? ([a-z][a-z-]+)\b")
# Options of other people's programs, in commands that the documents show.
FOREIGN = {
    *("region", "recursive", "follow", "log-stream-name-prefix", "query", "output", "exclude"),
    *("include", "stack-name", "template-body", "template-file", "capabilities", "parameters"),
    *("parameter-overrides", "policy-document", "role-name", "policy-name", "profile", "gpus"),
    *(
        "target",
        "tracking-server-name",
        "service-code",
        "quota-code",
        "desired-value",
        "instance-arn",
    ),
    *(
        "permission-set-arn",
        "user-name",
        "inline-policy",
        "repository-name",
        "bucket",
        "key",
        "restore-request",
    ),  # of the AWS command line
    *("logdir", "sync-tensorboard"),  # of TensorBoard, of Weights & Biases
    "x-s3",  # how the names of S3's directory buckets end
}


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """Every option of a program and of its commands."""
    found = {flag[2:] for flag in parser._option_string_actions if flag.startswith("--")}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found |= flags_of(command)
    return found


def shell_flags() -> set[str]:
    """Options that the shell scripts and the tests' programs name in their own help or branches."""
    scripts = [
        *TOP.glob("*.sh"),
        TOP / "tests" / "run.sh",
        *TOP.glob("tests/**/*.py"),
        *TOP.glob("docker/*.py"),
    ]
    text = "\n".join(
        path.read_text(encoding="utf-8") for path in scripts if "test_" not in path.name
    )
    return set(re.findall(r"--([a-z][a-z0-9-]*)", text))


@pytest.fixture(scope="module")
def known() -> set[str]:
    captured: list[argparse.ArgumentParser] = []
    real = argparse.ArgumentParser.parse_known_args

    def capture(self, *arguments, **more):
        captured.append(self)
        return real(self, *arguments, **more)

    argparse.ArgumentParser.parse_known_args = capture
    try:
        train_model_sagemaker.parse_arguments([], SageMakerEnvironment.from_variables({}))
    finally:
        argparse.ArgumentParser.parse_known_args = real
    keys = [path for path, _, _ in config_keys()]
    parsers = [
        *captured,
        launch_sagemaker_job.build_parser(),
        evaluate_model.build_parser(),
        prepare_dataset._parser(),
    ]
    return {
        *(flag for parser in parsers for flag in flags_of(parser)),
        *keys,
        *(key.rsplit(".", 1)[-1] for key in keys),
        *(key.rsplit(".", 1)[-1].replace("_", "-") for key in keys),
        *shell_flags(),
        *FOREIGN,
    }


def texts(path: Path) -> list[str]:
    """The string constants of a program, docstrings too; the parser joins split literals."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


EVERYTHING = [*sorted(CODE.rglob("*.py")), *DOCUMENTS]


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda p: p.relative_to(TOP).as_posix())
def test_every_option_and_command_that_is_named_exists(path, known):
    (commands,) = [
        action.choices
        for action in prepare_dataset._parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    text = path.read_text(encoding="utf-8")
    text = "\n".join(texts(path)) if path.suffix == ".py" else text
    missing = {name for name in OPTION.findall(text) if name not in known}
    assert {name: difflib.get_close_matches(name, known, n=1) for name in missing} == {}
    named = {name for _, name in COMMAND.findall(text)}
    assert named <= {*commands, "and", "or", "with", "in", "once", "needs"}, named - set(commands)


def test_an_option_that_does_not_exist_is_found(known):
    (name,) = OPTION.findall("free space there, or raise --volume-size, then start again")
    assert name == "volume-size" and name not in known
