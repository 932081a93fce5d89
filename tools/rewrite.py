"""Writes generated files, and says which of them changed."""

from __future__ import annotations

import logging
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def rewrite(path: Path, text: str) -> bool:
    """Write a text file with `\\n` line ends where it differs; -> whether it did."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    path.write_text(text, encoding="utf-8", newline="\n")
    print(f"wrote {path.relative_to(ROOT)}")
    return True


def quiet() -> None:
    """No warnings of ComfyUI's, which miss its server; errors are still logged."""
    logging.disable(logging.WARNING)
