"""What all tests have in common: how much is tried, and what is skipped where a piece is missing.

How much is one option, `--effort quick|normal|thorough`, normal by default, and one mark:

    @pytest.mark.slow     not when quick, which is how older ComfyUIs and newer Tritons are tested
    @pytest.mark.slow("thorough")   when thorough only: one variant more of what is tried already

Where both stand at one test, the stronger counts. A test that chooses a cross-section by itself
takes the fixture `thorough`. `python dev.py test --thorough` hands `--effort thorough` to every
suite. What a part of the tests needs of a machine stands in support/needs.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from machine import cache_folder, is_comfyui
from support import needs

HERE = Path(__file__).parent
EFFORTS = ("quick", "normal", "thorough")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--effort",
        choices=EFFORTS,
        default="normal",
        help="quick leaves out slow tests, thorough tries every variant (default: normal)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", 'slow(least="normal"): the least --effort that tries it; see tests/conftest.py'
    )
    tree = os.environ.get("COMFYUI_PATH")
    if tree and not is_comfyui(Path(tree)):
        raise pytest.UsageError(
            f"COMFYUI_PATH is {tree}, but there is no main.py with a comfy folder beside it."
        )
    if tree:  # where its models, inputs and outputs are kept
        os.environ.setdefault("ROPESLR_TEST_BASE", str(cache_folder() / "base" / "pytest"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    effort = EFFORTS.index(config.getoption("--effort"))
    for item in items:
        least = max(
            (EFFORTS.index(least_effort(mark)) for mark in item.iter_markers("slow")), default=0
        )
        if least > effort:
            item.add_marker(pytest.mark.skip(reason=f"`--effort {EFFORTS[least]}` tries this"))


def least_effort(mark: pytest.Mark) -> str:
    """The effort that a slow mark asks for."""
    least = mark.args[0] if mark.args else "normal"
    if least not in EFFORTS or mark.kwargs or len(mark.args) > 1:
        raise pytest.UsageError(
            f'slow takes one of {EFFORTS}; found {mark}. Write @pytest.mark.slow("thorough").'
        )
    return least


class NotHere(pytest.Module):
    """A file of tests that this machine cannot run: not imported, skipped whole with the reason."""

    def collect(self):
        pytest.skip(needs.why_not_collected(place_of(self.path)), allow_module_level=True)


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    return (
        NotHere.from_parent(parent, path=module_path)
        if needs.why_not_collected(place_of(module_path))
        else None
    )


def place_of(path: Path) -> str:
    return path.relative_to(HERE).as_posix()


@pytest.fixture(scope="session")
def thorough(pytestconfig: pytest.Config) -> bool:
    """Whether everything is tried instead of a cross-section."""
    return pytestconfig.getoption("--effort") == "thorough"
