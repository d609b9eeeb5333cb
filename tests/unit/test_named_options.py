"""Every option and command that an error message or a document names exists."""

import ast
import dataclasses
import difflib
import re
from pathlib import Path

import prepare_dataset
import pytest
from brain_to_text.config import config_keys
from brain_to_text.launch.request import JobSettings

TOP = Path(__file__).parents[2]
CODE = TOP / "code"
DOCUMENTS = sorted(
    path
    for path in [*TOP.glob("*.md"), *CODE.glob("*.md"), *TOP.glob(".github/*.md")]
    if path.name != "CHANGELOG.md"  # it names what went
)
OPTION = re.compile(r"(?<![\w/.`*=-])--([A-Za-z][\w.-]*[\w])")
COMMAND = re.compile(r"\bprepare_dataset\.py`? ([a-z][a-z-]+)\b")
# Options of other people's programs, in commands that the documents show: the AWS command line,
# TensorBoard, Weights & Biases; and how the names of S3's directory buckets end.
FOREIGN = """
    region recursive follow log-stream-name-prefix query output exclude include stack-name
    template-body template-file capabilities parameters parameter-overrides policy-document
    role-name policy-name profile gpus tracking-server-name service-code quota-code desired-value
    instance-arn target
    permission-set-arn user-name inline-policy repository-name bucket key restore-request
    logdir sync-tensorboard x-s3
"""


def text_of(paths) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def known() -> set[str]:
    """What a program declares (its own literal, or a setting), or a script's help shows."""
    declared = re.findall(r'"--([a-z0-9-]+)"', text_of(CODE.glob("*.py")))
    scripts = [*TOP.glob("*.sh"), *TOP.glob("tests/*.sh"), *TOP.glob("docker/*.py")]
    programs = [path for path in TOP.glob("tests/**/*.py") if "test_" not in path.name]
    shown = re.findall(r"--([a-z][a-z0-9-]*)", text_of([*scripts, *programs]))
    settings = [field.name.replace("_", "-") for field in dataclasses.fields(JobSettings)]
    keys = [path for path, _, _ in config_keys()]
    short = [key.rsplit(".", 1)[-1] for key in keys]
    dashed = [key.replace("_", "-") for key in short]
    commands = ["tag", "env", "help"]
    return {*declared, *shown, *settings, *keys, *short, *dashed, *commands, *FOREIGN.split()}


def texts(path: Path) -> str:
    """A document; of a program its string constants, in which the parser joins split literals."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
    return "\n".join(node.value for node in nodes if isinstance(node.value, str))


@pytest.mark.parametrize(
    "paths", [sorted(CODE.rglob("*.py")), DOCUMENTS], ids=["code", "documents"]
)
def test_every_option_and_command_that_is_named_exists(paths):
    options = known()
    assert "volume-size" not in options and "volume-gb" in options
    choices = [action.choices for action in prepare_dataset._parser()._actions]
    (commands,) = (names for names in choices if isinstance(names, dict))
    for path in paths:
        text = texts(path)
        missing = {name for name in OPTION.findall(text) if name not in options}
        close = {name: difflib.get_close_matches(name, options, n=1) for name in missing}
        assert close == {}, path
        named = set(COMMAND.findall(text)) - {"and", "or", "with", "in", "once", "needs"}
        assert named <= set(commands), path
