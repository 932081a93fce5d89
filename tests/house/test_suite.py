"""The tests themselves: what a bare `pytest` runs and skips, and how much each effort tries."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import needs

ROOT = Path(__file__).resolve().parents[2]
FILE = """
import pytest

def test_quick(): pass

@pytest.mark.slow
def test_slow(): pass

@pytest.mark.slow("thorough")
def test_thorough(thorough): assert thorough

@pytest.mark.slow
@pytest.mark.parametrize("x", [1, pytest.param(2, marks=pytest.mark.slow("thorough"))])
def test_both(x): pass
"""


def run_pytest(*arguments, cwd=ROOT, **environment):
    """Pytest in a process of its own, without what this process was told of ComfyUI and Triton."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if name not in ("COMFYUI_PATH", "TRITON_INTERPRET")
    }
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=ours | environment,
    )


def test_without_comfyui_everything_else_is_collected_and_the_rest_says_what_to_do():
    needs.need("torch", "safetensors", "hypothesis")
    done = run_pytest("--co", "-rs")
    assert done.returncode == 0, done.stdout + done.stderr
    for place in (
        "attention/test_plan.py",
        "house/test_floors.py",
        "kernels/test_attention.py",
        "web/test_panel.py",
    ):
        assert f"tests/{place}" in done.stdout
    files = [
        *(ROOT / "tests" / "nodes").glob("test_*.py"),
        *(ROOT / "tests" / "browser").glob("test_*.py"),
    ]
    assert not [path for path in files if f"tests/{path.parent.name}/{path.name}::" in done.stdout]
    (line,) = (line for line in done.stdout.splitlines() if "needs ComfyUI" in line)
    assert (
        line.startswith(f"SKIPPED [{len(files)}]")
        and "run `python dev.py test tests/nodes`" in line
    )


def test_tests_that_need_comfyui_are_skipped_one_by_one_where_others_in_the_file_do_not():
    needs.need("jsonschema")
    done = run_pytest(
        "-rs", "tests/workflows", "-k", "test_the_schema_can_fail or sparkwan_few_step"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "needs ComfyUI: run `python dev.py test" in done.stdout


def test_a_wrong_comfyui_path_is_an_error(tmp_path):
    done = run_pytest("tests/nodes", COMFYUI_PATH=str(tmp_path))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and "there is no main.py" in done.stderr


@pytest.mark.parametrize(
    "effort, passed, skipped", [("quick", 1, 4), ("normal", 3, 2), ("thorough", 5, 0)]
)
def test_an_effort_tries_what_it_says(tmp_path, effort, passed, skipped):
    (tmp_path / "conftest.py").write_text(
        (ROOT / "tests" / "conftest.py").read_text("utf-8"), "utf-8"
    )
    (tmp_path / "test_some.py").write_text(FILE, "utf-8")
    done = run_pytest(
        "-rs",
        "--effort",
        effort,
        str(tmp_path),
        cwd=tmp_path,
        PYTHONPATH=f"{ROOT}/tests{os.pathsep}{ROOT}/tools",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{passed} passed" in done.stdout and (f"{skipped} skipped" in done.stdout) == bool(
        skipped
    )


def test_a_mark_that_nobody_knows_is_an_error(tmp_path):
    (tmp_path / "conftest.py").write_text(
        (ROOT / "tests" / "conftest.py").read_text("utf-8"), "utf-8"
    )
    (tmp_path / "test_some.py").write_text(FILE.replace('"thorough"', '"very"'), "utf-8")
    done = run_pytest(
        str(tmp_path), cwd=tmp_path, PYTHONPATH=f"{ROOT}/tests{os.pathsep}{ROOT}/tools"
    )
    assert (
        done.returncode == pytest.ExitCode.USAGE_ERROR
        and 'Write @pytest.mark.slow("thorough")' in done.stderr
    )
