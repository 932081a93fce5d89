"""The demo: the shipped workflow on a real ComfyUI with tiny checkpoints, sparse and dense."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from comfy_server import ComfyServer, PromptResult
from workflow import load, make_tiny, node_id, to_prompt

NODE = "RoPeSLRSparseAttention"
FILES = (
    "diffusion_models/tiny_wan21_t2v.safetensors",
    "text_encoders/tiny_clip_l.pt",
    "vae/tiny_wan_vae.safetensors",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=448)
    parser.add_argument("--height", type=int, default=448)
    parser.add_argument("--length", type=int, default=9)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument(
        "--min-tokens", type=int, default=2048, help="the node's own default is 4096"
    )
    options = parser.parse_args()
    base, tree = Path(os.environ["ROPESLR_TEST_BASE"]), Path(os.environ["COMFYUI_PATH"])
    base.mkdir(parents=True, exist_ok=True)
    if not all((base / "models" / name).exists() for name in FILES):
        step("making tiny checkpoints with ComfyUI's own classes")
        subprocess.run(
            [
                sys.executable,
                str(Path(__file__).parent / "tiny_models.py"),
                str(base / "models"),
                *FILES,
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    step("starting ComfyUI on 127.0.0.1")
    with ComfyServer(tree, base) as server:
        step(
            f"ComfyUI {server.get('/system_stats')['system']['comfyui_version']} answers at "
            f"{server.url}"
        )
        info = server.get("/object_info")
        results = {}
        for name, bypass in (("dense", NODE), ("sparse", None)):
            prompt = to_prompt(load("wan2.1_t2v"), info, bypass)
            prompt = make_tiny(prompt, options.width, options.height, options.length, options.steps)
            if bypass is None:
                prompt[node_id(prompt, NODE)]["inputs"].update(
                    sparsity=options.sparsity, min_tokens=options.min_tokens
                )
            # Videos are compressed, so frames are compared as they leave the VAE.
            prompt["frames"] = {
                "class_type": "SaveImage",
                "inputs": {
                    "images": [node_id(prompt, "VAEDecode"), 0],
                    "filename_prefix": f"demo/{name}",
                },
            }
            step(f"queueing workflows/wan2.1_t2v.json, {name}")
            results[name] = (prompt, server.run(prompt))
    print_table(results, base / "output", options)


def print_table(
    results: dict[str, tuple[dict, PromptResult]], output: Path, options: argparse.Namespace
) -> None:
    """What happened, side by side."""
    (dense_prompt, dense), (sparse_prompt, sparse) = results["dense"], results["sparse"]
    (report,) = sparse.reports
    reference, frames = (read_frames(result, output) for result in (dense, sparse))
    difference = np.linalg.norm(frames - reference) / np.linalg.norm(reference)
    (video,) = next(iter(sparse.outputs[node_id(sparse_prompt, "SaveVideo")].values()))[:1]
    rows = [
        ("self-attention calls, sparse", report["sparse_calls"]),
        ("self-attention calls, dense", json.dumps(report["dense_calls"]).strip("{}") or 0),
        ("density of the sparse calls", f"{report['density']:.3f}"),
        ("attention FLOPs saved", f"{100 * report['flops_saved']:.1f} %"),
        ("sampler, sparse", f"{sparse.seconds[node_id(sparse_prompt, 'KSampler')]:.1f} s"),
        (
            "sampler, dense",
            f"{dense.seconds[node_id(dense_prompt, 'KSampler')]:.1f} s (the first run; it also "
            "loads)",
        ),
        ("frames, relative difference", f"{difference:.4f}"),
        ("video", output / video["subfolder"] / video["filename"]),
    ]
    size = f"{options.width}x{options.height}, {options.length} frames"
    print(f"\nwan2.1_t2v, tiny random weights, {size}, min_tokens {options.min_tokens}, CPU")
    for name, value in rows:
        print(f"  {name:30} {value}")


def read_frames(result: PromptResult, output: Path) -> np.ndarray:
    """The saved frames as floats from 0 to 1."""
    files = [
        output / image["subfolder"] / image["filename"]
        for image in result.outputs["frames"]["images"]
    ]
    return np.stack([np.asarray(Image.open(file), dtype=np.float32) / 255 for file in files])


def step(text: str) -> None:
    print(f"[demo] {text}", flush=True)


if __name__ == "__main__":
    main()
