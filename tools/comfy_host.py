"""A real ComfyUI inside the test process, on the CPU: boots, loads the pack, runs nodes.

COMFYUI_PATH names the ComfyUI tree, ROPESLR_TEST_BASE a folder for its models, inputs and outputs.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import runpy
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


@cache
def boot() -> ModuleType:
    """Import ComfyUI's `nodes` module for a CPU, with the base folder's models in its lists."""
    tree = Path(os.environ["COMFYUI_PATH"])
    runpy.run_path(str(Path(__file__).parent / "cpu_shim" / "sitecustomize.py"))
    sys.path.insert(0, str(tree))
    argv, sys.argv = sys.argv, sys.argv[:1]
    try:
        import comfy.options  # noqa: F401  argument parsing stays off, so pytest's arguments are not ComfyUI's
        from comfy.cli_args import args

        args.cpu = True
        args.base_directory = os.environ["ROPESLR_TEST_BASE"]
        import utils.extra_config  # noqa: F401  before nodes puts comfy/ on the path, where another `utils` lies

        nodes = importlib.import_module("nodes")  # not this pack's folder of that name
    finally:
        sys.argv = argv
    asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    return nodes


@cache
def pack() -> ModuleType:
    """The pack, loaded by ComfyUI's own loader; its nodes are in NODE_CLASS_MAPPINGS afterwards."""
    nodes = boot()
    if not asyncio.run(nodes.load_custom_node(str(ROOT))):
        raise RuntimeError("ComfyUI could not load the pack; its log has the traceback")
    return sys.modules[str(ROOT).replace(".", "_x_")]


def module(name: str) -> ModuleType:
    """A module of the loaded pack, such as ".nodes.patching"."""
    return importlib.import_module(name, pack().__name__)


def run_node(name: str, /, *several: str, **inputs) -> tuple:
    """Execute one node, old or new style, as ComfyUI's executor does: -> its outputs.

    Widgets that are not named keep their defaults. Of a node that takes every input as a list of
    values, those in several are such lists, the others one value.
    """
    import torch

    node = boot().NODE_CLASS_MAPPINGS[name]
    with torch.inference_mode():
        if not hasattr(node, "GET_SCHEMA"):
            return getattr(node(), node.FUNCTION)(**inputs)
        values = widget_defaults(name) | inputs
        if node.GET_SCHEMA().is_input_list:
            values = {key: each if key in several else [each] for key, each in values.items()}
        return node.EXECUTE_NORMALIZED(**values).result


def widget_defaults(name: str) -> dict:
    """What a new-style node's widgets hold when it is dropped."""
    inputs = boot().NODE_CLASS_MAPPINGS[name].GET_SCHEMA().inputs
    values = {each.id: _default(each) for each in inputs if hasattr(each, "default")}
    return {name: value for name, value in values.items() if value is not None}


def _default(widget):
    """What the browser fills in: the default, or a list's first option."""
    options = getattr(widget, "options", None)
    return options[0] if widget.default is None and options else widget.default
