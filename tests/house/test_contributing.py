"""What GitHub and pre-commit read: forms that parse and ask for what is needed, equal versions."""

import re
from pathlib import Path

import pytest

from support import needs

ROOT = Path(__file__).resolve().parents[2]
FORMS = ROOT / ".github" / "ISSUE_TEMPLATE"
FILES = [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / ".pre-commit-config.yaml"]


def parsed(path):
    needs.need("yaml")
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_for_github_or_pre_commit_is_yaml(path):
    assert isinstance(parsed(path), dict)


def test_the_bug_form_asks_for_what_a_report_needs_and_says_where_to_find_it():
    form = parsed(FORMS / "bug.yml")
    assert form["name"] and form["description"]
    fields = {each["id"]: each for each in form["body"] if each["type"] != "markdown"}
    words = {
        "doctor": "RoPeSLR Doctor",
        "log": "terminal",
        "comfyui": "About",
        "gpu": "log",
        "workflow": "Export",
    }
    for name, word in words.items():
        assert fields[name]["validations"]["required"] is True, name
        assert word in fields[name]["attributes"]["description"], name
    assert "text of RoPeSLR Doctor" in fields["doctor"]["attributes"]["label"]


def test_the_bug_form_is_one_that_github_takes():
    """Every field has a type of its own, an id that is used once, and a label."""
    body = parsed(FORMS / "bug.yml")["body"]
    assert {each["type"] for each in body} <= {
        "markdown",
        "textarea",
        "input",
        "dropdown",
        "checkboxes",
    }
    names = [each["id"] for each in body if each["type"] != "markdown"]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w-]+", name) for name in names)
    assert all(each["attributes"]["label"] for each in body if each["type"] != "markdown")


def test_pre_commit_runs_the_ruff_of_the_tests():
    wanted = re.search(
        r"^ruff==(\S+)$", (ROOT / "tests" / "requirements.txt").read_text("utf-8"), re.MULTILINE
    )[1]
    (ours,) = (
        each for each in parsed(ROOT / ".pre-commit-config.yaml")["repos"] if "ruff" in each["repo"]
    )
    assert ours["rev"] == f"v{wanted}"
    assert [hook["id"] for hook in ours["hooks"]] == ["ruff-check", "ruff-format"]
