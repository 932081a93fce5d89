"""Commands that measure, run from the pack's folder: `python -m benchmarks.cpu`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))

from pack_loader import load as load_pack  # noqa: E402

__all__ = ["ROOT", "commit", "load_pack"]


def commit() -> str:
    """The commit of this tree, "unknown" where there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
        )
    except OSError:  # no git at all
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
