"""Seconds per step of real model classes with random weights, dense against every method.

`COMFYUI_PATH=... python -m benchmarks.models [--models wan-1.3b wan-14b] [--out FILE.json]
[--device cpu --tiny]`

Needs a ComfyUI. The models are ComfyUI's own classes at their released sizes; random weights take
the same time as trained ones. Every figure is the mean over as many steps as lie between two
calibrations, from the second on, so that one calibrating step is among them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import runpy
import statistics
import sys
import time

import torch

from . import ROOT, load_pack
from .gpu import machine

PERIOD = load_pack(".attention.plan").CALIBRATE_EVERY
METHODS = ("ropeslr", "top-k", "top-k plain")
TEXT_WIDTH = 4096
WAN = ("wan.model", "WanModel")
HUNYUAN = ("hunyuan_video.model", "HunyuanVideo")
HUNYUAN_SETTINGS = dict(
    in_channels=16,
    out_channels=16,
    vec_in_dim=768,
    context_in_dim=TEXT_WIDTH,
    hidden_size=3072,
    mlp_ratio=4.0,
    num_heads=24,
    depth=20,
    depth_single_blocks=40,
    axes_dim=[16, 56, 56],
    theta=256,
    patch_size=[1, 2, 2],
    qkv_bias=True,
    guidance_embed=True,
    byt5=False,
    meanflow=False,
    use_cond_type_embedding=False,
    vision_in_dim=None,
    meanflow_sum=False,
)
# class, its settings, latent (channels, frames, height, width)
MODELS = {
    "wan-1.3b": (WAN, dict(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30), (16, 21, 60, 104)),
    "wan-14b": (WAN, dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40), (16, 21, 90, 160)),
    "hunyuan-13b": (HUNYUAN, HUNYUAN_SETTINGS, (16, 33, 90, 160)),
}
TINY = {
    "wan-tiny": (WAN, dict(dim=256, ffn_dim=512, num_heads=2, num_layers=2), (16, 9, 16, 16)),
    "hunyuan-tiny": (
        HUNYUAN,
        HUNYUAN_SETTINGS | dict(hidden_size=256, num_heads=2, depth=1, depth_single_blocks=1),
        (16, 3, 16, 16),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    parser.add_argument("--sparsity", type=float, default=0.90)
    parser.add_argument(
        "--steps", type=int, default=PERIOD + 1, help="the last period of them is timed"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try this program")
    parser.add_argument("--out", help="write the measurements to this JSON file")
    options = parser.parse_args()
    boot(options.device)
    rows = []
    for name, (kind, settings, latent) in (
        TINY.items() if options.tiny else [(n, MODELS[n]) for n in options.models]
    ):
        rows += measure(name, kind, settings, latent, options.sparsity, options.steps)
    if options.out:
        record = {
            "benchmark": "models",
            **machine(torch.device(options.device)),
            "steps": options.steps,
            "rows": rows,
        }
        with open(options.out, "w", encoding="utf-8") as file:
            file.write(json.dumps(record, indent=1) + "\n")


def boot(device: str) -> None:
    """Make ComfyUI importable, for a CPU or a GPU."""
    tree = os.environ.get("COMFYUI_PATH")
    if not tree:
        raise SystemExit(
            "COMFYUI_PATH must name a ComfyUI folder; `python dev.py test` keeps one in its cache."
        )
    sys.path.insert(0, tree)
    sys.argv[1:] = []
    if device == "cpu":
        runpy.run_path(str(ROOT / "tools" / "cpu_shim" / "sitecustomize.py"))
    import comfy.options  # noqa: F401  argument parsing stays off
    from comfy.cli_args import args

    args.cpu = device == "cpu"


def measure(
    name: str,
    kind: tuple[str, str],
    settings: dict,
    latent: tuple[int, ...],
    sparsity: float,
    steps: int,
) -> list[dict]:
    """Dense and every method on one model."""
    model = random_model(kind, settings)
    patching = load_pack(".nodes.patching")
    plan = load_pack(".attention").SparsePlan
    tokens = latent[1] * latent[2] * latent[3] // 4
    rows = []
    for method in ("dense", *METHODS):
        patched = model
        if method != "dense":
            wanted = plan(method=method, sparsity=sparsity, min_tokens=0, dense_first_steps=0)
            patched = patching.install(model, wanted, None)
        seconds = step_seconds(patched, latent, steps)
        row = {
            "model": name,
            "tokens": tokens,
            "method": method,
            "sparsity": sparsity,
            "seconds_per_step": seconds,
        }
        if method != "dense":
            report = patching.last_report(patched)
            if not report.sparse_calls:
                print(f"{name:>10} is not sparse: {', '.join(report.dense_calls)}", flush=True)
                break
            row |= {
                "times_dense": rows[0]["seconds_per_step"] / seconds,
                "density": report.density,
                "backend": report.backend,
                "sparse_calls": report.sparse_calls,
                "dense_calls": report.dense_calls,
            }
        rows.append(row)
        gain = (
            f"  {row['times_dense']:.2f}x dense, in {row['backend']}"
            if "times_dense" in row
            else ""
        )
        print(
            f"{name:>10} {tokens:>7} tokens  {method:>12}  {seconds:8.3f} s per step{gain}",
            flush=True,
        )
    return rows


def random_model(kind: tuple[str, str], settings: dict):
    """A MODEL of random weights, by ComfyUI's stock loader."""
    import comfy.model_management
    import comfy.ops
    import comfy.sd

    device = comfy.model_management.get_torch_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    folder, name = kind
    extra = dict(model_type="t2v", freq_dim=256, text_dim=TEXT_WIDTH) if kind == WAN else {}
    network = getattr(importlib.import_module(f"comfy.ldm.{folder}"), name)(
        device=device, dtype=dtype, operations=comfy.ops.disable_weight_init, **extra, **settings
    )
    with torch.no_grad():
        for key, weight in network.named_parameters():
            scale = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.02
            weight.normal_(1.0 if "norm" in key and key.endswith("weight") else 0.0, scale)
    weights = {f"model.diffusion_model.{key}": value for key, value in network.state_dict().items()}
    del network
    return comfy.sd.load_diffusion_model_state_dict(weights)


def step_seconds(model, latent: tuple[int, ...], steps: int) -> float:
    """Mean seconds of the last PERIOD Euler steps at CFG 1 (all but the first, if fewer)."""
    import comfy.sample

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, *latent, generator=generator)
    text = [
        [
            torch.randn(1, 512, TEXT_WIDTH, generator=generator),
            {"pooled_output": torch.zeros(1, 768)},
        ]
    ]
    ends = []

    def ended(*_) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    comfy.sample.sample(
        model,
        noise,
        steps,
        1.0,
        "euler",
        "simple",
        text,
        text,
        torch.zeros(1, *latent),
        callback=ended,
        disable_pbar=True,
    )
    last = ends[-PERIOD - 1 :]
    return statistics.mean(after - before for before, after in zip(last, last[1:]))


if __name__ == "__main__":
    main()
