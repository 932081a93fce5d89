"""Shipped workflows as prompts: convert the UI format, and put tiny checkpoints and sizes in place of the real ones."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from comfy_cli.workflow_to_api import convert_ui_to_api

ROOT = Path(__file__).resolve().parents[2]

TINY = {
    "wan2.1_t2v_1.3B_fp16.safetensors": "tiny_wan21_t2v.safetensors",
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors": "tiny_clip_l.pt",
    "wan_2.1_vae.safetensors": "tiny_wan_vae.safetensors",
}
BYPASS = 4                                  # a node's mode in the UI format


def load(name: str) -> dict:
    """A shipped workflow in the UI format."""
    return json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


def to_prompt(workflow: dict, object_info: dict, bypass: str | None = None) -> dict:
    """UI format -> API format; `bypass` names a node type that is bypassed first, as Ctrl+B does."""
    workflow = copy.deepcopy(workflow)
    for node in workflow["nodes"]:
        if node["type"] == bypass:
            node["mode"] = BYPASS
    return convert_ui_to_api(workflow, object_info)


def make_tiny(prompt: dict, width: int, height: int, length: int, steps: int) -> dict:
    """The same prompt with tiny checkpoints, and sizes that a CPU can sample."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        inputs = node["inputs"]
        for name, value in inputs.items():
            if isinstance(value, str) and value in TINY:
                inputs[name] = TINY[value]
        if "length" in inputs:
            inputs.update(width=width, height=height, length=length)
        if "steps" in inputs:
            inputs["steps"] = steps
    return prompt


def node_id(prompt: dict, class_type: str) -> str:
    """The id of the only node of a type."""
    (found,) = (id_ for id_, node in prompt.items() if node["class_type"] == class_type)
    return found
