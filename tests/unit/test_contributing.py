"""What contributors are told exists: commands, files, forms."""

import re
from pathlib import Path

import pytest
import yaml

TOP = Path(__file__).parents[2]
HOME = TOP / ".github"


PAGES = [HOME / "CONTRIBUTING.md", HOME / "SECURITY.md", TOP / "README.md"]
PAGES += TOP.glob("code/*.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_file_that_is_named_exists(page):
    text = page.read_text()
    names = re.findall(r"(?<![/\w])((?:code|docker|tests|\.github|\.ci)/[\w./*-]*\w)", text)
    assert names
    missing = [name for name in names if not list(TOP.glob(name))]
    assert missing == []


def test_every_file_of_others_that_the_notice_names_exists():
    names = re.findall(r"^(brain_to_text/\S+):", (TOP / "code" / "NOTICE").read_text(), re.M)
    assert len(names) == 3
    assert [name for name in names if not (TOP / "code" / name).is_file()] == []


def test_a_fork_checks_what_contributors_check_and_needs_no_secret():
    text = (HOME / "workflows" / "checks.yml").read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert "secrets." not in text
    commands = [step["run"] for step in workflow["jobs"]["checks"]["steps"] if "run" in step]
    assert all(command.split()[0] == "./tests/run.sh" for command in commands)
    assert "--checks" in commands[0] and commands[1].endswith("tests/unit")
    assert commands[2].endswith("tests/integration")
    actions = re.findall(r"uses: \S+@(\S+)", text)
    assert actions and all(re.fullmatch(r"[0-9a-f]{40}", revision) for revision in actions)


def test_hooks_run_what_the_environment_holds():
    (repo,) = yaml.safe_load((TOP / ".pre-commit-config.yaml").read_text())["repos"]
    programs = {hook["entry"].split()[0] for hook in repo["hooks"]}
    assert programs == {".venv/bin/ruff", "./tests/run.sh"}


def test_the_issue_form_asks_for_what_a_failed_job_leaves():
    form = yaml.safe_load((HOME / "ISSUE_TEMPLATE" / "job.yml").read_text())
    assert {"name", "description", "body"} <= set(form)
    asked = {part["id"]: part for part in form["body"] if part["type"] != "markdown"}
    assert {"job", "failure", "configuration"} <= set(asked)
    assert all(part["attributes"]["label"] for part in asked.values())


def test_the_citation_can_be_read():
    citation = yaml.safe_load((HOME / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_the_release_has_one_number():
    citation, changelog, image = (
        re.search(pattern, path.read_text(), re.M)[1]
        for path, pattern in (
            (HOME / "CITATION.cff", r"^version: (\S+)"),
            (HOME / "CHANGELOG.md", r"^## (\S+)"),
            (TOP / "docker" / "Dockerfile", r'image\.version="(\S+)"'),
        )
    )
    assert citation == changelog == image
