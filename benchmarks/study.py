"""A second model to judge methods by: `python -m benchmarks.study --folder FOLDER [--out FILE]`.

The tiny Wan (train_tiny_wan.py) is one model, with latents, captions and a latent's four frames in
a token. This is a plainer one: the same class and size on three channels of pixels, without
captions. It is trained first, into FOLDER, if it is not there (about 25 minutes of two cores; an
interrupted training goes on), and not committed. Then samples of every method against dense
attention, 20 Euler steps, the attention floor alone. Needs COMFYUI_PATH and ROPESLR_TEST_BASE.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import commit, load_pack
from .moving_shapes import plain_clips
from .quality import KEY_BLOCKS, METHODS, PEAK, psnr
from .train_tiny_wan import (
    GRID,
    MODEL,
    Material,
    Settings,
    Training,
    attend,
    comfy_in_training,
    new_model,
)

attention = load_pack(".attention")

PIXELS = Material(3, ("",), plain_clips, (8, 12, 16), noise=(0.0, 1.0))
TRAINING = Settings(short_steps=900, full_steps=700)
NO_CAPTION = {"": torch.zeros(1, MODEL["text_dim"])}
TOKENS = GRID[0], GRID[1] // 2, GRID[2] // 2
KEPT = (1, 2, 3)  # of 24 blocks
STEPS, SHIFT = 20, 3.0
SEEDS = range(101, 105)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="of the trained model")
    parser.add_argument("--out", type=Path, help="write the measurements to this JSON file")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with comfy_in_training():
        training = Training(TRAINING, PIXELS, NO_CAPTION)
        training.run(options.folder / "study.pt")
        model = new_model(PIXELS.channels, NO_CAPTION).eval().requires_grad_(False)
        model.load_state_dict(training.average.state_dict())
        with torch.inference_mode():
            rows = compare(model)
    if options.out:
        record = {
            "benchmark": "study",
            "date": datetime.date.today().isoformat(),
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "commit": commit(),
            "processor_minutes": round(training.seconds / 60, 1),
            "losses": training.losses[-1],
            "seeds": len(SEEDS),
            "peak": PEAK,
            "rows": rows,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def compare(model: Any) -> list[dict[str, Any]]:
    """Every method at every number of kept blocks."""
    dense = [sample(model, seed, None) for seed in SEEDS]
    rows = []
    cases = [
        (name, size, kept)
        for kept in KEPT
        for name in METHODS
        for size in KEY_BLOCKS
        if (name, size) != ("AdaSpa", "16")
    ]
    for name, key_block, kept in tqdm(cases, unit="case"):
        blocks = attention.TokenLayout(TOKENS).blocks().num_ranked
        settings = dict(METHODS[name], sparsity=1 - kept / blocks, min_tokens=0)
        if name != "AdaSpa":
            settings["key_block"] = key_block
        plan = attention.SparsePlan(**settings).resolve()
        found, densities = [], []
        for seed, expected in zip(SEEDS, dense):
            run = Sparse(plan)
            found.append(psnr(sample(model, seed, run), expected))
            densities.append(statistics.mean(run.densities))
        rows.append(
            {
                "method": name,
                "key_block": "64" if name == "AdaSpa" else key_block,
                "kept": kept,
                "density": round(statistics.mean(densities), 4),
                "psnr": round(statistics.mean(found), 3),
                "spread": round(statistics.stdev(found), 3),
            }
        )
        tqdm.write(str(rows[-1]))
    return rows


class Sparse:
    """The attention override of one sampling run; `step` says which step it is in."""

    def __init__(self, plan: Any) -> None:
        self.run, self.step = attention.AttentionRun(plan), 0
        self.layout = attention.TokenLayout(TOKENS, order=plan.block_order)
        self.densities: list[float] = []

    def __call__(
        self, original: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, **options: Any
    ) -> Tensor:
        if q.shape[1] != k.shape[1]:  # to the caption
            return attend(original, q, k, v, heads)
        heads_apart = [x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
        layer = options["transformer_options"]["block_index"]
        call = attention.AttentionCall(self.layout, layer, self.step, STEPS)
        dense_steps = self.run.plan.dense_first_steps
        if self.step < dense_steps or self.run.dense_reason(self.step, STEPS):
            self.run.observe(*heads_apart, call)
            return attend(original, q, k, v, heads)
        out, cost = self.run.attend(*heads_apart, call)
        self.densities.append(cost.density)
        return out.transpose(1, 2).flatten(2)


def sample(model: Any, seed: int, sparse: Sparse | None) -> Tensor:
    """A clip (3, T, H, W), by Euler's method from sigma 1 to 0, shifted."""
    x = torch.randn(1, PIXELS.channels, *GRID, generator=torch.Generator().manual_seed(seed))
    even = torch.linspace(1, 0, STEPS + 1)
    sigmas = (SHIFT * even / (1 + (SHIFT - 1) * even)).tolist()
    for step, (sigma, following) in enumerate(zip(sigmas, sigmas[1:])):
        if sparse is not None:
            sparse.step = step
        override = {"optimized_attention_override": sparse or attend}
        velocity = model(
            x, torch.tensor([1000 * sigma]), NO_CAPTION[""][None], transformer_options=override
        )
        x = x + (following - sigma) * velocity
    return x[0]


if __name__ == "__main__":
    main()
