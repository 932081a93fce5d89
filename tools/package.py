"""What the registry takes of this folder: every file that .comfyignore does not name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pathspec

ROOT = Path(__file__).resolve().parents[1]
NEVER = {".git", "__pycache__", ".ruff_cache", ".hypothesis"}  # what git does not keep either


def files() -> list[str]:
    """Paths from the root, with forward slashes."""
    ignored = pathspec.PathSpec.from_lines(
        "gitwildmatch", (ROOT / ".comfyignore").read_text().splitlines()
    )
    paths = (
        path
        for path in ROOT.rglob("*")
        if path.is_file() and not NEVER & set(path.relative_to(ROOT).parts)
    )
    names = (path.relative_to(ROOT).as_posix() for path in paths)
    return sorted(name for name in names if not ignored.match_file(name))


def copy(target: Path) -> None:
    """Install the pack into a folder, which is emptied first."""
    shutil.rmtree(target, ignore_errors=True)
    for name in files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
