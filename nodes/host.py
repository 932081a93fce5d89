"""Which ComfyUI this is, and whether it is new enough; imports nothing else of it."""

from __future__ import annotations

import sys
from typing import Any

OLDEST = "0.18.2"  # that the tests run on; pyproject.toml has it too


def comfyui_version() -> str:
    """As ComfyUI has it; "unknown" where it is embedded in another program."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return "unknown"
    return __version__


def prompt_server() -> Any:
    """ComfyUI's own server; None where it runs without one."""
    server = sys.modules.get("server")
    return getattr(getattr(server, "PromptServer", None), "instance", None)


def cannot_load() -> str:
    """What to tell a person whose ComfyUI does not load the pack."""
    return (
        f"ComfyUI-RoPeSLR could not be loaded. It needs ComfyUI {OLDEST} or newer; this is "
        f"{comfyui_version()}. Update ComfyUI; if it is new enough, please report this traceback"
    )
