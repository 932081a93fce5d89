"""What each part of the tests needs of a machine, and the reason to skip where it is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest

# Set before Triton is imported, for a whole process.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETER, PLAIN = "Triton's interpreter", "a process without Triton's interpreter"
COMFYUI, NODE, TSC = "ComfyUI", "node", "TypeScript's checker"
# Folder or file below tests/ -> what its tests need to be collected; a file's own line counts
# beside its folder's.
NEEDS = {
    "attention": ("torch", "safetensors", "hypothesis"),
    "browser": (COMFYUI, "torch", "safetensors", "PIL", "comfy_cli", "playwright"),
    "house/test_benchmarks.py": ("torch", "safetensors"),
    "house/test_package.py": ("pathspec",),
    "kernels": ("torch", *(("triton",) if INTERPRET else ())),
    "kernels/test_additive.py": (PLAIN,),
    "kernels/test_types.py": (PLAIN,),
    "kernels/test_compiled.py": ("triton", PLAIN),
    "kernels/test_custom_ops.py": (PLAIN,),
    "kernels/test_dispatch.py": (PLAIN,),
    "kernels/test_interpreter.py": ("triton", INTERPRETER),
    "kernels/test_without_a_gpu.py": ("triton", PLAIN),
    "nodes": (COMFYUI, "torch", "safetensors", "hypothesis", "psutil", "pathspec"),
    "nodes/test_texts.py": ("cogapp",),
    "training": ("torch", "safetensors"),
    "web": ("torch",),
    "workflows": ("jsonschema",),
}
REMEDIES = {
    COMFYUI: "run `python dev.py test tests/nodes`, or name a ComfyUI's folder in COMFYUI_PATH",
    INTERPRETER: "run `python dev.py kernels`",
    PLAIN: "unset TRITON_INTERPRET",
    NODE: "install Node.js and put it on the PATH",
    TSC: "install npm, and run `python dev.py test tests/web`, which fetches it and sets ROPESLR_TSC",
    "triton": "run `python dev.py kernels`, which fetches it on Linux",
    "playwright": "run `python dev.py browser`, which installs it",
}


def is_here(name: str) -> bool:
    """Whether this process has it: one of the names above, or a Python package."""
    answers = {
        COMFYUI: bool(os.environ.get("COMFYUI_PATH")),
        TSC: bool(os.environ.get("ROPESLR_TSC")),
        INTERPRETER: INTERPRET,
        PLAIN: not INTERPRET,
    }
    if name in answers:
        return answers[name]
    return bool(shutil.which(name) if name == NODE else importlib.util.find_spec(name))


def why_not(*names: str) -> str | None:
    """The first of these that is missing, with what to do; None where all are here."""
    for name in names:
        if not is_here(name):
            return (
                f"needs {name}: {REMEDIES.get(name, 'run `python dev.py test`, which installs it')}"
            )
    return None


def why_not_collected(place: str) -> str | None:
    """The same for a file, by its path below tests/ with forward slashes."""
    return why_not(*NEEDS.get(place.partition("/")[0], ()), *NEEDS.get(place, ()))


def need(*names: str) -> None:
    """Skip the test that asks, with the reason, where one of these is missing."""
    reason = why_not(*names)
    if reason:
        pytest.skip(reason)
