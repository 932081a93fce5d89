"""What each kernel compiles to for each GPU: `python -m benchmarks.compile [--out FILE.json]`.

Runs the library's own launchers on meta tensors under a fake driver (see `static`), and tells
registers, spilled bytes, shared memory, tensor-core use, and how much of the tensor-core work is
useful: the FLOPs that the algorithm needs in a turn of the hottest loop over those that are issued.
Needs torch and triton, and takes some minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
import triton

from . import commit, load_pack
from .loops import hottest_loop, innermost_loops
from .static import TARGETS, capture, report
from .traffic import bytes_per_token

backend = load_pack(".kernels.triton.backend")
split = load_pack(".kernels.triton.split")
types = load_pack(".kernels.types")

MULTIPROCESSORS = 132  # of the GPU for which keys are split
HEADS, TOKENS, RANK, BLOCK, FINE_BLOCK, WIDE_BLOCK = 12, 32_760, 64, 64, 16, 128
# FLOPs of one turn of the hottest loop: products of a 64-row block with a 64-row block, times 2 x
# 64 x 64 x D each.
PRODUCTS = {
    "plain": 2,
    "pooled": 2,
    "mixed": 2,
    "low_rank": 2,
    "linear": 2,
    "dense": 2,
    "split": 2,
    "mass": 1,
    "d_queries": 3,
    "d_keys": 4,
}
FORWARD = ("plain", "pooled", "mixed", "low_rank", "linear", "dense", "split")
FINE = ("plain", "pooled", "mixed", "low_rank", "linear", "pool", "state", "backward")
WIDE = ("plain", "pooled", "mixed", "linear", "backward")
EIGHT_BIT = ("plain", "pooled", "mixed", "linear", "dense", "split")
ALL = (
    *FORWARD,
    *(f"8-bit fine {name}" for name in EIGHT_BIT),
    *(f"8-bit wide {name}" for name in ("plain", "mixed")),
    "fine quantize",
    *(f"fine {name}" for name in FINE),
    *(f"wide {name}" for name in WIDE),
    "pool",
    "state",
    "low_rank_state",
    "linear_state",
    "mapped",
    "rms",
    "select",
    "mass",
    "unpack",
    "backward",
)
FEW = (
    *("plain", "mixed", "pool", "state", "mapped", "select", "backward"),
    *("fine mixed", "wide mixed"),
    *("8-bit fine mixed", "8-bit wide mixed", "fine quantize"),
)
# sm_86 compiles as sm_89 does, and AMD's targets have not been run on by anyone yet: the cases of
# the default method.
CASES = {
    "cuda:86": FEW,
    "hip:gfx942": FEW,
    # Datacentre Blackwell multiplies 8 bits in other formats.
    "cuda:100": tuple(name for name in ALL if not name.startswith("8-bit")),
}


def empty(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor on the meta device."""
    return torch.empty(shape, dtype=of, device="meta")


def layout(tokens: int, key_block: int = BLOCK, query_block: int = BLOCK):
    """Query and key blocks of so many tokens, on the meta device."""
    sizes = query_block, key_block
    tables = (empty(-(-tokens // size), size, of=torch.int32) for size in sizes)
    return types.BlockLayout(*(types.TokenBlocks(table, tokens, tokens) for table in tables))


class Sizes(NamedTuple):
    """Of a layer's call; kept: key blocks that each query block keeps."""

    tokens: int = TOKENS
    heads: int = HEADS
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    kept: int = 51
    rank: int = RANK
    key_block: int = BLOCK
    query_block: int = BLOCK
    values: torch.dtype | None = None  # of keys and values in 8 bits


WAN_LAYER = Sizes()


def all_cases(target: str) -> dict[str, Callable]:
    """Those of a Wan layer.

    "fine ...": small key blocks, four of which make a tile. "wide ...": also large query blocks.
    "8-bit ...": with keys and values in 8 bits, as the target multiplies them.
    """
    sizes = Sizes(kept=204, key_block=FINE_BLOCK)
    wide_sizes = sizes._replace(query_block=WIDE_BLOCK)
    fine, wide = cases(sizes), cases(wide_sizes)
    found = (
        cases()
        | {f"fine {name}": fine[name] for name in (*FINE, "quantize")}
        | {f"wide {name}": wide[name] for name in WIDE}
    )
    fp8 = target in ("cuda:89", "cuda:90", "cuda:120")
    values = torch.float8_e4m3fn if fp8 else torch.int8
    for prefix, each in (("", WAN_LAYER), ("fine ", sizes), ("wide ", wide_sizes)):
        small = cases(each._replace(values=values))
        found |= {f"8-bit {prefix}{name}": small[name] for name in EIGHT_BIT}
    return found


def plain_name(name: str) -> str:
    """A case without the sizes of its blocks and numbers."""
    return name.removeprefix("8-bit ").removeprefix("fine ").removeprefix("wide ")


def cases(sizes: Sizes = WAN_LAYER) -> dict[str, Callable]:
    """Every launcher with tensors of these sizes, on the meta device: name -> call."""
    tokens, heads, head_dim, dtype, kept, rank, key_block, query_block, values = sizes
    blocks = layout(tokens, key_block, query_block)
    count, scale = blocks.q_blocks.num_blocks, head_dim**-0.5
    q = empty(1, tokens, heads, head_dim, of=dtype).transpose(1, 2)
    lists = empty(1, heads, count, kept, of=types.list_dtype(blocks.kv_blocks.num_blocks))
    counts = empty(1, heads, count, of=torch.int32)
    mask = types.BlockMask(blocks.q_blocks, blocks.kv_blocks, lists, counts)
    pooled_q, pooled_k = (
        empty(1, heads, each.num_blocks, head_dim) for each in (blocks.q_blocks, blocks.kv_blocks)
    )
    lse = empty(1, heads, tokens)
    per_head, per_channel = empty(1, heads), empty(1, heads, head_dim)
    square = empty(1, heads, head_dim, head_dim)
    first = types.FirstOrder(per_channel, square, per_channel)
    gate = types.Gate(empty(1, heads, count), per_head, per_head)
    angles, axis_ids = empty(tokens, head_dim // 2), empty(tokens, 3, of=torch.int32)
    learned = empty(heads, 150, rank)
    fmap = types.FeatureMap(
        "softmax", empty(heads, rank, head_dim), angles, angles, learned, axis_ids
    )
    state = types.LinearState(empty(1, heads, rank, head_dim), empty(1, heads, rank))
    mixed = types.Background(gate, first)
    low_rank = types.Background(gate, first, types.LowRank(fmap, state, empty(heads)))
    silu = types.SiluMap(
        empty(heads, rank, head_dim), *[angles] * 2, learned, axis_ids, *[empty(tokens, 16)] * 2
    )
    rms = types.RmsLowRank(silu, silu, 1e-5)
    plain = types.FeatureMap("softmax")
    folded = types.LinearState(empty(1, heads, head_dim, head_dim), per_channel)
    linear = types.LinearBranch(plain, folded, empty(head_dim))
    bits = empty(1, heads, count, -(-blocks.kv_blocks.num_blocks // 32), of=torch.int32)
    sparse, far = (q, q, q, mask), types.PooledKV(pooled_k, pooled_k)
    forward = types.Forward(q, q, q, q, lse, mask, None, scale)
    small: dict = {}
    if values is not None:
        by_block = (1, heads, blocks.kv_blocks.num_blocks)
        small["eight_bit"] = types.EightBit(
            empty(*by_block, key_block, head_dim, of=torch.int8),
            empty(*by_block),
            per_channel,
            empty(*by_block, head_dim, key_block, of=values),
            per_channel,
            per_channel,
        )

    def dense() -> None:
        listed = blocks.kv_blocks if small else None
        backend.dense_attention(q[:, :, :128], q, q, listed, scale, **small)

    def split_over_keys() -> None:
        with mock.patch.object(split, "multiprocessors", lambda device: MULTIPROCESSORS):
            dense()

    return {
        "plain": lambda: backend.block_sparse_attention(*sparse, None, scale, **small),
        "pooled": lambda: backend.block_sparse_attention(*sparse, far, scale, **small),
        "mixed": lambda: backend.block_sparse_mixed(*sparse, mixed, scale, **small),
        "low_rank": lambda: backend.block_sparse_mixed(*sparse, low_rank, scale, **small),
        "linear": lambda: backend.block_sparse_linear(*sparse, linear, scale, **small),
        "dense": dense,
        "split": split_over_keys,
        "quantize": lambda: backend.quantize_kv(
            q, q, blocks.kv_blocks, per_channel, per_channel, values or torch.int8
        ),
        "pool": lambda: backend.block_pool(q, blocks.q_blocks),
        "state": lambda: backend.block_pool_state(q, q, blocks, None),
        "low_rank_state": lambda: backend.low_rank_state(q, q, fmap),
        "linear_state": lambda: backend.low_rank_state(q, q, plain),
        "mapped": lambda: backend.add_mapped(q, square),
        "rms": lambda: backend.add_rms_low_rank(q, q, q, q, lse, rms),
        "select": lambda: backend.block_select(pooled_q, pooled_k, blocks, kept, scale),
        "mass": lambda: backend.block_mass(q, q, lse, blocks, [kept, 20, 70], scale),
        "unpack": lambda: backend.lists_from_bits(bits, blocks.kv_blocks.num_blocks, kept),
        "backward": lambda: backend.block_sparse_attention_backward(q, None, forward),
    }


def compile_case(target: str, name: str, call: Callable, head_dim: int = 128) -> list[dict]:
    """One row per kernel that the case launches."""
    with capture(target) as compiled:
        call()
    rows, seen = [], set()
    for kernel_name, kernel in compiled:
        kernel_name = kernel_name.lstrip("_")
        if kernel_name not in seen:
            seen.add(kernel_name)
            found = report(kernel)
            loop = None
            if target not in ("cuda:100", "hip:gfx942"):
                loop = hottest_loop(kernel)
            plain = plain_name(name)
            products = PRODUCTS.get(kernel_name if plain == "backward" else plain, 0)
            # A program of d_keys has the keys of one block.
            keys = FINE_BLOCK if name != plain and kernel_name == "d_keys" else BLOCK
            # And one of d_queries half of a wide block's rows.
            wide = "wide" in name and kernel_name != "d_queries"
            queries = WIDE_BLOCK if wide else BLOCK
            needed = 2 * queries * keys * head_dim * products
            found["useful_mma"] = round(needed / loop.flops, 3) if loop and needed else None
            found["loop"] = loop.record() if loop and plain in FORWARD else None
            if plain == "select" and target.startswith("cuda"):
                found["passes"] = innermost_loops(kernel)
            rows.append({"target": target, "case": name, "kernel": kernel_name, **found})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--out", help="write the table to this JSON file")
    options = parser.parse_args()
    rows = []
    for target in options.targets:
        calls = all_cases(target)
        for name in CASES.get(target, ALL):
            for row in compile_case(target, name, calls[name]):
                rows.append(row)
                print(
                    f"{target:>10} {name:>15} {row['kernel']:>15}  {row['warps']} warps "
                    f"{row['stages']} stages {row['registers']:>4} regs {row['spilled_bytes']:>5} "
                    f"B spilled {row['shared_bytes']:>7} B shared {row['blocks_per_sm']} per SM  "
                    f"{row['tensor_cores']} useful {row['useful_mma']}",
                    flush=True,
                )
    if options.out:
        record = {
            "benchmark": "compile",
            "date": datetime.date.today().isoformat(),
            "triton": triton.__version__,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "commit": commit(),
            "dtype": "bfloat16",
            "head_dim": 128,
            "block": BLOCK,
            "rank": RANK,
            "bytes_per_token_and_head": bytes_per_token(),
            "rows": rows,
        }
        with open(options.out, "w", encoding="utf-8") as file:
            file.write(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
