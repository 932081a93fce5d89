"""What a sparse LoRA gives: `python -m benchmarks.lora --out FILE [--plot FILE.svg]`.

Trains one on the trained tiny Wan (benchmarks/data) by the node Train Sparse LoRA, in a real
ComfyUI on this machine's CPU, then samples with and without it beside dense attention, at seeds
that it was not trained on. PSNR of the whole clip. Needs COMFYUI_PATH and ROPESLR_TEST_BASE.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from . import commit
from .quality import SETTINGS, comfyui_version, node, psnr
from .tiny_wan import PROMPTS, Sampling, conditioning, model, sample

TRAINING = dict(
    steps=300,
    batch_size=2,
    rank=16,
    learning_rate=1e-3,
    samples=36,
    seed=1000,  # of the first video that is trained on; those that are judged by have 0, 1, ...
    sparsity=0.90,
    training_dtype="none",
    lora_dtype="fp32",
    gradient_checkpointing=False,
    patience=0,
    name="tiny_wan",
)
# Row of the table -> with the LoRA?, with its adapter?, settings of the sparse node; None: dense.
ROWS: dict[str, tuple[bool, bool, dict[str, Any] | None]] = {
    "no LoRA": (False, False, dict(sparsity=0.90)),
    "LoRA": (True, False, dict(sparsity=0.90)),
    "LoRA with its adapter": (True, True, dict(sparsity=0.90)),
    "no LoRA, at 5 %": (False, False, dict(sparsity=0.95)),
    "LoRA, at 5 %": (True, False, dict(sparsity=0.95)),
    "LoRA, dense": (True, False, None),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, help="write the measurements to this JSON file")
    parser.add_argument("--plot", type=Path, help="draw the record of --out to this SVG, no runs")
    options = parser.parse_args()
    if options.plot:
        plot(json.loads(options.out.read_text(encoding="utf-8")), options.plot)
        return
    base = model()
    started = time.perf_counter()
    lora, losses, steps, adapter = train(base)
    seconds = time.perf_counter() - started
    rows = measure(base, lora, adapter, options.seeds)
    for name, found in rows.items():
        print(f"{name:24} {statistics.mean(found):.2f} dB  {[round(x, 1) for x in found]}")
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "comfyui": comfyui_version(),
        "commit": commit(),
        "training": {**TRAINING, "prompts": len(PROMPTS)},
        "seconds": round(seconds),
        "steps": steps,
        "losses": [round(each, 6) for each in losses["loss"]],
        "held_out": [
            (step, round(error, 4))
            for step, error in zip(losses["held_out_steps"], losses["held_out"])
        ],
        "psnr": {name: [round(each, 2) for each in found] for name, found in rows.items()},
    }
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def train(base: Any) -> tuple[Any, ...]:
    """The node's outputs."""
    import comfy.samplers
    import folder_paths

    import comfy_host

    comfy_host.pack()
    for folder in ("loras", "ropeslr"):  # nothing to go on from
        for path in Path(folder_paths.get_folder_paths(folder)[0]).glob("**/tiny_wan*"):
            path.unlink()
    shutil.rmtree(Path(folder_paths.get_temp_directory()) / "ropeslr_training", ignore_errors=True)
    how = Sampling()
    sampling = base.get_model_object("model_sampling")
    return comfy_host.run_node(
        "RoPeSLRTrainSparseLoRA",
        "latents",
        "positive",
        model=base,
        sampler=comfy.samplers.sampler_object("euler"),
        sigmas=comfy.samplers.calculate_sigmas(sampling, "simple", how.steps),
        cfg=how.cfg,
        latents=[{"samples": torch.zeros(1, 16, *how.grid)}],
        positive=[conditioning(prompt) for prompt in PROMPTS],
        **TRAINING,
    )


def measure(base: Any, lora: Any, adapter: Any, seeds: int) -> dict[str, list[float]]:
    """PSNR to the dense model without the LoRA, by row and seed."""
    import comfy_host

    (learned,) = comfy_host.run_node(
        "LoraModelLoader", model=base, lora=lora, strength_model=1.0, bypass=False
    )
    found: dict[str, list[float]] = {name: [] for name in ROWS}
    for seed in range(seeds):
        how = Sampling(prompt=PROMPTS[seed % len(PROMPTS)], seed=seed)
        dense = sample(base, how)
        for name, (with_lora, with_adapter, settings) in ROWS.items():
            used = learned if with_lora else base
            if settings is not None:
                own = dict(adapter=adapter) if with_adapter else {}
                used = node(used, SETTINGS | settings | own)
            found[name].append(psnr(sample(used, how), dense))
    return found


def plot(record: dict[str, Any], path: Path) -> None:
    """The held-out error over the steps."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ropeslr"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 2.6), layout="constrained")
    steps, errors = zip(*record["held_out"])
    axes.plot(steps, [100 * each for each in errors], marker="o", color="#2a6fdb")
    axes.axhline(100, color="#888888", linewidth=1)
    axes.set(xlabel="step", ylabel="held-out error, % of no LoRA's", ylim=(70, 104))
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
