"""Loads the pack as a package under a name of its own, as ComfyUI does; sys.path stays."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
NAME = "ropeslr"


def load(name: str = "") -> ModuleType:
    """The pack, or a module of it such as ".kernels.ops"."""
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        assert spec and spec.loader  # both are there for a path that ends in .py
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NAME])
    return importlib.import_module(NAME + name)
