"""The source checkers' command lines, for `dev.py lint` and tests/house; standard library only."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "web" / "jsconfig.json"


class Check(NamedTuple):
    """A command, to be run in ROOT, and what it wants in its environment."""

    command: list[str]
    env: dict[str, str] = {}


def everything(python: Path, comfyui: Path | None, tsc: Path | None) -> dict[str, Check]:
    """Every check that can run here, by its name."""
    found = {
        "ruff check": ruff(python),
        "ruff format --check": layout(python),
        "types, by basedpyright": types(python, comfyui),
        "scripts, by tsc": scripts(tsc) if tsc else None,
    }
    return {name: check for name, check in found.items() if check}


def ruff(python: Path) -> Check:
    """Style and complexity; the rules stand in pyproject.toml."""
    return Check([str(python), "-m", "ruff", "check", "--no-cache", "."])


def layout(python: Path) -> Check | None:
    """The layout by `ruff format`; nothing until pyproject.toml has a section for it."""
    import tomllib  # not in Python 3.10, to which dev.py only says that it is too old

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if "format" not in project["tool"]["ruff"]:
        return None
    return Check([str(python), "-m", "ruff", "format", "--no-cache", "--check", "."])


def types(python: Path, comfyui: Path | None) -> Check:
    """Types, of what [tool.pyright] in pyproject.toml includes; ComfyUI's come from its tree."""
    command = [str(python), "-m", "basedpyright", "--pythonpath", str(python)]
    return Check(command, {"PYTHONPATH": str(comfyui)} if comfyui else {})


def scripts(tsc: Path) -> Check | None:
    """Types of the panel's scripts, by their comments."""
    return Check([str(tsc), "-p", str(SCRIPTS)]) if SCRIPTS.is_file() else None
