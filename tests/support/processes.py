"""Runs a program of tests/support in several processes: `python FILE RANK SIZE FOLDER`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run(program: str, size: int, folder: Path) -> None:
    """All of them at once; fails with what they printed where one of them fails."""
    processes = [
        subprocess.Popen(
            [sys.executable, program, str(rank), str(size), str(folder)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    ends = [(each.communicate(timeout=600)[1], each.returncode) for each in processes]
    assert all(code == 0 for _, code in ends), "\n".join(text[-2000:] for text, _ in ends)
