"""Attention by several processes, on gloo: `python ranks.py RANK SIZE FOLDER`; each saves what it has.

Every process makes the same inputs, and hands its tokens to yunchang's own layer, which exchanges
them for heads, or its heads to ours.
"""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "tools")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from pack_loader import load  # noqa: E402
from support.data.adapters import (  # noqa: E402
    layer_x,
    rola_adapter,
    ropeslr_adapter,
    sla_adapter,
)
from support.data.fields import rope_angles, smooth_qkv  # noqa: E402

attention = load(".attention")
parallel = load(".attention.parallel")

GRID, HEADS, WIDTH, TEXT, STEPS = (4, 8, 9), 4, 16, 13, 4
CASES = {
    "ropeslr": (dict(sparsity=0.6), None),
    "ropeslr, error": (dict(sparsity=0.6, target="error", error=0.1), None),
    "ropeslr with weights": (dict(sparsity=0.6, calibrate="refine"), ropeslr_adapter),
    "rola": (dict(sparsity=0.6), rola_adapter),
    "rola, lower rank": (dict(sparsity=0.6, rank=4), rola_adapter),
    "sla": (dict(sparsity=0.6), sla_adapter),
    "adaspa": (dict(sparsity=0.6, method="adaspa"), None),
    "top-k": (dict(sparsity=0.6, method="top-k"), None),
}


def inputs(name: str, step: int):
    """The plan, q, k, v of all heads and tokens, and the call."""
    settings, make = CASES[name]
    plan = attention.SparsePlan(**settings).resolve(make and make(1, HEADS, WIDTH))
    q, k, v = smooth_qkv(GRID, heads=HEADS, width=WIDTH, seed=3 + step)
    generator = torch.Generator().manual_seed(step)
    text = torch.randn(3, 1, HEADS, TEXT, WIDTH, generator=generator)
    qkv = [torch.cat(pair, dim=2) for pair in zip(text, (q, k, v))]
    angles = rope_angles(GRID, WIDTH)
    rope = attention.RopeTable(angles.cos(), angles.sin())
    x = layer_x(qkv[0].shape[2], HEADS * WIDTH, torch.float32, seed=step)
    layout = attention.TokenLayout(GRID, before=TEXT, order=plan.block_order)
    call = attention.AttentionCall(
        layout, step=step, num_steps=20, sigma=0.5, inputs=attention.LayerInputs(x, rope)
    )
    return plan, qkv, call


def shares(x: torch.Tensor, size: int, dim: int) -> list[torch.Tensor]:
    """Even parts of tokens; zeros fill the last."""
    each = -(-x.shape[dim] // size)
    padding = [0, 0] * (x.ndim - 1 - dim) + [0, each * size - x.shape[dim]]
    return list(torch.nn.functional.pad(x, padding).split(each, dim))


def run(rank: int, size: int, own_exchange: bool) -> dict[str, torch.Tensor]:
    """Outputs `(B, L', H, D)` of one's own tokens by yunchang's exchange; or `(B, L, h, D)`."""
    found = {}
    for name in CASES:
        ours = None
        for step in range(STEPS):
            plan, qkv, call = inputs(name, step)
            ours = ours or parallel.UlyssesAttention(plan)
            tokens = call.layout.tokens
            x = ours.exchange(shares(call.inputs.x, size, 1)[rank], tokens)
            ours.next(
                attention.AttentionCall(**{**vars(call), "inputs": call.inputs._replace(x=x)})
            )
            if own_exchange:
                heads = ours.share.own(HEADS)
                given = [each[:, heads].transpose(1, 2) for each in qkv]
                out, _ = ours(*given)
            else:
                from yunchang import LongContextAttention

                layer = LongContextAttention(attn_type=None, attn_processor=ours)
                given = [shares(each.transpose(1, 2), size, 1)[rank] for each in qkv]
                out = layer(*(each.contiguous() for each in given))
            found[f"{name} {step}"] = out
    return found


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    results = {"ours": run(rank, size, True)}
    try:
        from yunchang import set_seq_parallel_pg
    except ImportError:
        pass
    else:
        set_seq_parallel_pg(size, 1, rank, size)
        results["yunchang"] = run(rank, size, False)
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
