"""The checkers of the source find nothing, and the rules that they keep are configured."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

import checkers
from support import needs

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(sys.executable)
TOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
LINT = TOOLS["ruff"]["lint"]


def run(check):
    return subprocess.run(
        check.command,
        cwd=ROOT,
        env=os.environ | check.env,
        capture_output=True,
        text=True,
        errors="replace",
    )


def test_ruff_has_nothing_to_say():
    needs.need("ruff")
    done = run(checkers.ruff(PYTHON))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_source_is_laid_out_by_ruff_format():
    needs.need("ruff")
    check = checkers.layout(PYTHON)
    if check is None:
        pytest.skip(
            "pyproject.toml has no section [tool.ruff.format] yet; add one, and run `python dev.py "
            "format`"
        )
    done = run(check)
    assert done.returncode == 0, f"run `python dev.py format`\n{done.stdout}{done.stderr}"


def test_types_agree():
    """The type checker, where [tool.pyright] includes.

    Follows ComfyUI's definitions where it is there.
    """
    needs.need("basedpyright")
    tree = os.environ.get("COMFYUI_PATH")
    done = run(checkers.types(PYTHON, Path(tree) if tree else None))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_panels_scripts_agree_with_their_types():
    needs.need(needs.TSC)
    check = checkers.scripts(Path(os.environ["ROPESLR_TSC"]))
    if check is None:
        pytest.skip("web/ has no jsconfig.json, which says which scripts are checked")
    done = run(check)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_counts_branches_and_arguments_and_guards_the_built_in_names():
    assert {"C901", "PLR0913", "A001", "A002", "E", "F", "I", "B", "T20"} <= set(LINT["select"])
    assert LINT["mccabe"] == {"max-complexity": 12} and LINT["pylint"] == {"max-args": 6}
    assert not set(LINT["ignore"]) & {"C901", "PLR0913", "A001", "A002"}


@pytest.mark.parametrize("pattern", LINT["per-file-ignores"])
def test_every_exception_from_the_rules_is_one_of_a_file_that_is_there(pattern):
    assert any(ROOT.glob(pattern)), f"{pattern} is gone; take its line out of pyproject.toml"


def test_the_type_checker_looks_at_files_that_are_there():
    assert TOOLS["pyright"]["typeCheckingMode"] == "basic"
    assert not [name for name in TOOLS["pyright"]["include"] if not (ROOT / name).exists()]
