"""Commands that measure, run from the pack's folder: `python -m benchmarks.cpu`."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def load_pack(name: str = "") -> ModuleType:
    """A module of the pack, such as ".attention", from the pack loaded under a name of its own."""
    pack = "ropeslr_benchmarked"
    if pack not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            pack, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        sys.modules[pack] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[pack])
    return importlib.import_module(pack + name)


def commit() -> str:
    """The commit of this tree, "unknown" where there is no git."""
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
