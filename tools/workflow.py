"""Shipped workflows as prompts: UI format converted, tiny checkpoints and sizes put in."""

from __future__ import annotations

import copy
import json
import uuid
from pathlib import Path

from comfy_cli.workflow_to_api import convert_ui_to_api

from graph_file import widget_names

ROOT = Path(__file__).resolve().parents[1]

TINY = {
    "wan2.1_t2v_1.3B_fp16.safetensors": "tiny_wan21_t2v.safetensors",
    "wan2.1_i2v_480p_14B_fp8_scaled.safetensors": "tiny_wan21_i2v.safetensors",
    "wan2.1_vace_1.3B_fp16.safetensors": "tiny_wan21_vace.safetensors",
    "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors": "tiny_wan22_t2v_high_noise.safetensors",
    "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors": "tiny_wan22_t2v_low_noise.safetensors",
    "wan2.2_ti2v_5B_fp16.safetensors": "tiny_wan22_ti2v_5b.safetensors",
    "hunyuan_video_t2v_720p_bf16.safetensors": "tiny_hunyuan_t2v.safetensors",
    "hunyuanvideo1.5_720p_t2v_fp16.safetensors": "tiny_hunyuan15_t2v.safetensors",
    "SparkWan2.1-T2V-1.3B-480P-0.90Sparsity.pth": "tiny_sparkwan.safetensors",
    "clip_vision_h.safetensors": "tiny_clip_vision_h.pt",
    "wan_2.1_vae.safetensors": "tiny_wan_vae.safetensors",
    "wan2.2_vae.safetensors": "tiny_taew22.safetensors",
    "hunyuan_video_vae_bf16.safetensors": "tiny_taehv_hunyuan.safetensors",
    "hunyuanvideo15_vae_fp16.safetensors": "tiny_lighttae_hv15.safetensors",
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors": "tiny_clip_l.pt",
    "minimax_h3_fl2va_pruned_int8_convrot.safetensors": "tiny_minimax_h3.safetensors",
    "qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors": "tiny_clip_l.pt",
    "minimax_h3_fl2v_turbo_4step_v0.1_768p_sla_comfyui_bf16.safetensors": (
        "tiny_minimax_h3_lora.safetensors"
    ),
    "ltx-2.3-22b-dev-fp8.safetensors": "tiny_ltx2.safetensors",
    "ltx_2.3_22b_distilled_1.1_lora_dynamic_fro09_avg_rank_111_bf16.safetensors": (
        "tiny_ltx2_lora.safetensors"
    ),
    "ltx-2.3-spatial-upscaler-x2-1.1.safetensors": "tiny_ltx2_spatial_x2.safetensors",
    "kandinsky5lite_t2v_sft_5s.safetensors": "tiny_kandinsky5.safetensors",
}
TINY_TRAINING = {"samples": 2, "batch_size": 1}
# The trained tiny Wan, whose latents need a decoder of their own; and what it understands.
TRAINED = ROOT / "benchmarks" / "data" / "tiny_wan.safetensors"
TRAINED_VAE = "unfolding.safetensors"
TRAINED_SIZE = dict(width=256, height=192, length=29)
TRAINED_PROMPT, TRAINED_CFG = "red discs on white", 2.5
# One tiny text encoder takes the place of two.
ONE_CLIP = "CLIPLoader", {"clip_name": "tiny_clip_l.pt", "type": "wan", "device": "default"}
# Loaders of what ComfyUI knows in one size only; those of stand_ins.py.
STAND_INS = {
    ("DualCLIPLoader", "kandinsky5"): ("TinyTextEncoder", {"width": 3584}),
    ("DualCLIPLoader", "hunyuan_video"): ONE_CLIP,
    ("DualCLIPLoader", "hunyuan_video_15"): ONE_CLIP,
    ("LTXAVTextEncoderLoader", "ltx-2.3-22b-dev-fp8.safetensors"): ONE_CLIP,
    ("VAELoader", "minimax_h3_video_vae_int8_convrot.safetensors"): ("TinyMiniMaxH3VAE", {}),
    ("VAELoader", "minimax_h3_audio_vae_fp32.safetensors"): ("TinyMiniMaxH3VAE", {}),
}
SEED = 42  # in every shipped workflow
LORA = "sparse_lora"  # what the training workflow names its files
BYPASS = 4  # a node's mode in the UI format


def load(name: str) -> dict:
    """A shipped workflow in the UI format."""
    return json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


def to_prompt(workflow: dict, object_info: dict, bypass: str | None = None) -> dict:
    """UI format -> API format.

    `bypass` names a node type that is bypassed first, as Ctrl+B does.
    """
    workflow = copy.deepcopy(workflow)
    for node in workflow["nodes"]:
        if node["type"] == bypass:
            node["mode"] = BYPASS
    return convert_ui_to_api(workflow, object_info)


def make_tiny(prompt: dict, width: int, height: int, length: int, steps: int) -> dict:
    """The same prompt with tiny checkpoints, and sizes that a CPU can sample."""
    prompt = copy.deepcopy(prompt)
    given = [node["inputs"]["length"] for node in prompt.values() if "length" in node["inputs"]]
    lengths = {source[0] for source in given if isinstance(source, list)}
    for key, node in prompt.items():
        node["class_type"], inputs = _stand_in(node["class_type"], node["inputs"])
        sizes = dict(width=width, height=height, length=length) if "length" in inputs else {}
        if key in lengths:
            sizes = dict(value=length)
        node["inputs"] = {
            name: value if isinstance(value, list) else _tiny(name, value, sizes, steps)
            for name, value in inputs.items()
        }
    return prompt


def tiny_workflow(
    workflow: dict, object_info: dict, width: int, height: int, length: int, steps: int
) -> dict:
    """The same for the UI format, so that a browser can run it."""
    workflow = copy.deepcopy(workflow)
    sources = {link[0]: link[1] for link in workflow["links"]}
    lengths = {
        sources.get(each["link"])
        for node in workflow["nodes"]
        for each in node["inputs"]
        if each["name"] == "length"
    }
    for node in workflow["nodes"]:
        if node["type"] not in object_info:
            continue  # notes
        node["properties"].pop("models", None)
        names = widget_names(object_info[node["type"]])
        # An older ComfyUI may lack the last of them.
        held = dict(zip(names, node["widgets_values"]))
        node["type"], held = _stand_in(node["type"], held)
        node["properties"]["Node name for S&R"] = node["type"]
        sizes = dict(width=width, height=height, length=length) if "length" in held else {}
        if node["id"] in lengths:
            sizes = dict(value=length)
        node["widgets_values"] = [_tiny(name, value, sizes, steps) for name, value in held.items()]
    return workflow


def _stand_in(type_: str, inputs: dict) -> tuple[str, dict]:
    """A node of another type with inputs of its own for a loader of what cannot be tiny."""
    for value in inputs.values():
        if isinstance(value, str) and (type_, value) in STAND_INS:
            return STAND_INS[type_, value]
    return type_, inputs


def use_trained(workflow: dict) -> dict:
    """A tiny workflow of Wan 2.1 text to video with the trained model, its decoder and a prompt."""
    workflow = copy.deepcopy(workflow)
    prompts = iter((TRAINED_PROMPT, ""))  # positive, negative
    files = {"tiny_wan21_t2v.safetensors": TRAINED.name, "tiny_wan_vae.safetensors": TRAINED_VAE}
    for node in workflow["nodes"]:
        widgets = node["widgets_values"]
        if node["type"] == "CLIPTextEncode":
            node["widgets_values"] = [next(prompts)]
        elif node["type"] == "KSampler":
            widgets[3] = TRAINED_CFG
        else:
            node["widgets_values"] = [files.get(str(each), each) for each in widgets]
    return workflow


def fresh(workflow: dict) -> dict:
    """The same with an id of its own and another seed, or ComfyUI answers from what it has kept.

    A training gets another name, or it goes on with one that is finished.
    """
    workflow = copy.deepcopy(workflow) | {"id": str(uuid.uuid4())}
    for node in workflow["nodes"]:
        node["widgets_values"] = [_another(value) for value in node["widgets_values"]]
    return workflow


def _another(value):
    if value == LORA:
        return f"{LORA}_{uuid.uuid4().hex[:8]}"
    return uuid.uuid4().int % 2**40 if value == SEED else value


def _tiny(name: str, value, sizes: dict[str, int], steps: int):
    """A small widget value: file names, video size, steps, the border between two samplers.

    Of a training also how many videos it makes to learn from, and how many examples a step has.
    """
    if isinstance(value, str):
        return TINY.get(value, value)
    if name in ("start_at_step", "end_at_step"):
        return steps // 2 if value == 10 else value
    if name == "min_tokens":
        return 64
    if name == "steps":
        return steps
    if name in TINY_TRAINING:
        return TINY_TRAINING[name]
    return sizes.get(name, value)


def node_id(prompt: dict, class_type: str) -> str:
    """The id of the only node of a type."""
    (found,) = (id_ for id_, node in prompt.items() if node["class_type"] == class_type)
    return found
