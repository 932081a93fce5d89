"""The demo: the shipped workflow on a real ComfyUI, dense and sparse, side by side.

The model is the trained tiny Wan of the benchmarks, which makes moving shapes from captions.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from comfy_server import ComfyServer, PromptResult
from workflow import (
    TRAINED,
    TRAINED_CFG,
    TRAINED_PROMPT,
    TRAINED_SIZE,
    TRAINED_VAE,
    load,
    make_tiny,
    node_id,
    to_prompt,
)

NODE = "RoPeSLRSparseAttention"
MADE = ("text_encoders/tiny_clip_l.pt", f"vae/{TRAINED_VAE}")
GAP = 8  # pixels between the two videos


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", default=TRAINED_PROMPT, help="for example: blue rings on black")
    for side, pixels in TRAINED_SIZE.items():
        parser.add_argument(f"--{side}", type=int, default=pixels)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=TRAINED_CFG)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument(
        "--min-tokens", type=int, default=1024, help="the node's own default is 4096"
    )
    options = parser.parse_args()
    base, tree = Path(os.environ["ROPESLR_TEST_BASE"]), Path(os.environ["COMFYUI_PATH"])
    base.mkdir(parents=True, exist_ok=True)
    trained = base / "models" / "diffusion_models" / TRAINED.name
    trained.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(TRAINED, trained)
    if not all((base / "models" / name).exists() for name in MADE):
        step("making a tiny text encoder and a decoder")
        subprocess.run(
            [
                sys.executable,
                str(Path(__file__).parent / "tiny_models.py"),
                str(base / "models"),
                *MADE,
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
            prompt[node_id(prompt, "UNETLoader")]["inputs"]["unet_name"] = TRAINED.name
            prompt[node_id(prompt, "VAELoader")]["inputs"]["vae_name"] = TRAINED_VAE
            sampler = prompt[node_id(prompt, "KSampler")]["inputs"]
            sampler.update(cfg=options.cfg, seed=options.seed)
            for side, text in (("positive", options.prompt), ("negative", "")):
                prompt[sampler[side][0]]["inputs"]["text"] = text
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
    psnr = 10 * np.log10(1 / max(1e-12, float(np.square(frames - reference).mean())))
    beside = output / "demo" / "dense_and_sparse.webp"
    save_side_by_side(reference, frames, beside)
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
        ("frames, PSNR to dense", f"{psnr:.1f} dB"),
        ("dense left, sparse right", beside),
    ]
    size = f"{options.width}x{options.height}, {options.length} frames"
    print(
        f'\nwan2.1_t2v, the trained tiny Wan, "{options.prompt}", {size}, sparsity '
        f"{options.sparsity}, CPU"
    )
    for name, value in rows:
        print(f"  {name:30} {value}")


def read_frames(result: PromptResult, output: Path) -> np.ndarray:
    """The saved frames as floats from 0 to 1."""
    files = [
        output / image["subfolder"] / image["filename"]
        for image in result.outputs["frames"]["images"]
    ]
    return np.stack([np.asarray(Image.open(file), dtype=np.float32) / 255 for file in files])


def save_side_by_side(left: np.ndarray, right: np.ndarray, path: Path) -> None:
    """Two videos `(F, H, W, 3)` from 0 to 1 as one that moves, the first on the left."""
    count, height, _, _ = left.shape
    gap = np.ones((count, height, GAP, 3), dtype=left.dtype)
    both = np.concatenate((left, gap, right), axis=2)
    first, *others = [Image.fromarray((255 * frame).round().astype(np.uint8)) for frame in both]
    first.save(path, append_images=others, save_all=True, duration=1000 // 12, loop=0, quality=90)


def step(text: str) -> None:
    print(f"[demo] {text}", flush=True)


if __name__ == "__main__":
    main()
