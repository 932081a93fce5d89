"""What routing costs with smaller key blocks: `python -m benchmarks.routing [--out FILE.json]`.

Scores and selection at a large video's size, on this machine's CPU or GPU, for key blocks of 64, 32
and 16; and "64, then 16": the best blocks of 64 first, then units of 16 inside twice as many of
them as are kept. Times are medians of interleaved runs, per head and as shares of the dense
attention that routing stands before. Recall is the share of the softmax mass of some queries that
is kept, on waves with noise, where neighbours are alike as they are in a video.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
from collections.abc import Callable

import torch
from torch import Tensor

from . import commit, load_pack
from .cpu import interleaved

attention = load_pack(".attention")
ops = load_pack(".kernels.ops")

GRIDS = {8192: (8, 32, 32), 32760: (21, 30, 52), 75600: (21, 45, 80)}
WIDTH, DENSITY, QUERIES, BLOCK = 128, 0.1, 256, 64
SIZES = (64, 32, 16)
WIDER = 2  # times as many coarse blocks as are kept are looked into


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, choices=sorted(GRIDS), default=75600)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="write the measurements to this JSON file")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k = waves(GRIDS[options.tokens], options.heads, device)
    layouts = {
        size: attention.TokenLayout(GRIDS[options.tokens]).blocks(device=device, key_block=size)
        for size in SIZES
    }
    finest = layouts[min(SIZES)]
    kept: dict[str, Tensor] = {}
    candidates: dict[str, Callable] = {
        str(size): lambda size=size: select(q, k, layouts[size]) for size in SIZES
    }
    candidates["64, then 16"] = lambda: coarse_to_fine(q, k, layouts[64], finest)
    scored = {str(size): layouts[size].kv_blocks.num_blocks for size in SIZES}
    scored["64, then 16"] = scored["64"] + WIDER * round(DENSITY * finest.num_ranked)
    seconds = interleaved(candidates, options.repeats)
    rows = []
    for name, choose in candidates.items():
        kept[name] = choose()
        blocks = layouts[int(name)] if name in map(str, SIZES) else finest
        rows.append(
            {
                "key_block": name,
                "ms_per_head": round(1e3 * seconds[name] / options.heads, 2),
                "score_gflop_per_head": round(
                    2e-9 * blocks.q_blocks.num_blocks * scored[name] * WIDTH, 3
                ),
                "list_bytes_per_head": kept[name].numel() // options.heads * 2,
                "recall": round(recall(q, k, blocks, kept[name]), 4),
            }
        )
        print(rows[-1])
    if options.out:
        record = {
            "benchmark": "routing",
            "date": datetime.date.today().isoformat(),
            "machine": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "commit": commit(),
            "tokens": options.tokens,
            "heads": options.heads,
            "head_dim": WIDTH,
            "density": DENSITY,
            "rows": rows,
        }
        with open(options.out, "w", encoding="utf-8") as file:
            file.write(json.dumps(record, indent=1) + "\n")


def waves(grid: tuple[int, int, int], heads: int, device: str) -> tuple[Tensor, Tensor]:
    """q and k `(1, H, L, D)`: sums of plane waves over the grid, and noise."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.meshgrid(*(torch.arange(float(side)) for side in grid), indexing="ij")
    places = torch.stack(axes, -1).view(-1, 3)
    found = []
    for _ in range(2):
        pace = (
            torch.randn(heads, 3, 24, generator=generator)
            * torch.tensor([0.4, 0.15, 0.15])[:, None]
        )
        phase = 2 * math.pi * torch.rand(heads, 1, 24, generator=generator)
        mix = torch.randn(heads, 24, WIDTH, generator=generator) / 5
        own = torch.sin(places @ pace + phase) @ mix
        found.append(own + 0.3 * torch.randn(own.shape, generator=generator))
    q, k = (1.5 * x[None].to(device) for x in found)
    return q, k


def select(q: Tensor, k: Tensor, blocks) -> Tensor:
    """Lists `(1, H, Nq, K)` of the best key blocks."""
    mask, _ = ops.block_select(
        ops.block_pool(q, blocks.q_blocks),
        ops.block_pool(k, blocks.kv_blocks),
        blocks,
        max(1, math.floor(DENSITY * blocks.num_ranked)),
    )
    return mask.kv_indices


def coarse_to_fine(q: Tensor, k: Tensor, coarse, fine) -> Tensor:
    """The same, of units inside the best coarse blocks only."""
    pooled_q, units = ops.block_pool(q, fine.q_blocks), ops.block_pool(k, fine.kv_blocks)
    parts = BLOCK // fine.kv_blocks.block_size
    count = fine.kv_blocks.num_blocks
    keep = max(1, math.floor(DENSITY * fine.num_ranked))
    wide = min(coarse.kv_blocks.num_blocks, WIDER * -(-keep // parts))
    blocks = ops.block_pool(k, coarse.kv_blocks)
    best = (pooled_q @ blocks.mT).topk(wide, dim=-1, sorted=False).indices
    inside = (best[..., None] * parts + torch.arange(parts, device=q.device)).flatten(-2)
    padded = torch.cat((units, units.new_zeros(*units.shape[:2], 1, WIDTH)), dim=2)
    inside = inside.clamp(max=count)
    rows = []
    for head in range(q.shape[1]):  # one at a time: the gathered units are many
        near = padded[0, head][inside[0, head]]
        scores = (near @ pooled_q[0, head][..., None])[..., 0]
        scores = scores.masked_fill(inside[0, head] == count, -torch.inf)
        own = scores.topk(keep, dim=-1, sorted=False).indices
        rows.append(inside[0, head].gather(-1, own).sort(dim=-1).values)
    return torch.stack(rows)[None]


def recall(q: Tensor, k: Tensor, blocks, lists: Tensor) -> float:
    """Mean share of the softmax mass of some queries that their lists keep."""
    tokens = torch.arange(QUERIES, device=q.device) * q.shape[2] // QUERIES
    rows = blocks.q_blocks.block_of_token[tokens].long()
    weights = (q[:, :, tokens] @ k.mT * WIDTH**-0.5).softmax(dim=-1)
    kept = torch.zeros(
        *lists.shape[:2], QUERIES, blocks.kv_blocks.num_blocks + 1, device=q.device
    ).scatter_(-1, lists[:, :, rows].long(), 1.0)
    return float((weights * kept[..., blocks.kv_blocks.block_of_token.long()]).sum(-1).mean())


if __name__ == "__main__":
    main()
