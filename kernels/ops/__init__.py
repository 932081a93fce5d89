"""One public function per operation; arguments are checked here, before anything is launched.

Every function has the contract of the function of the same name in `reference`. backend is "auto"
(Triton where it can run, else plain PyTorch), "triton" (an error where it cannot) or "pytorch".
Errors are ValueErrors that name the argument, what was found and what was expected.

    blocks = TokenBlocks.cut(torch.arange(q.shape[2]), 64)
    layout = BlockLayout(blocks, blocks)
    pooled = [block_pool(x, blocks) for x in (q, k)]
    mask, _ = block_select(*pooled, layout, topk=4)
    out, lse = block_sparse_attention(q, k, v, mask)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Choice, choose
from ..pytorch.common import empty_nhd
from ..triton_support import Operands, TritonNotUsable
from ..tuning import prefers_eight_bit, works
from ..types import (
    Background,
    BlockLayout,
    BlockMask,
    EightBit,
    FeatureMap,
    FirstOrder,
    Gate,
    LinearBranch,
    LinearState,
    LowRank,
    PooledKV,
    Prefixes,
    RankedBlocks,
    RequiredBlocks,
    RmsLowRank,
    SiluMap,
    TokenBlocks,
)
from .additive import (
    add_coarse,
    add_rms_low_rank,
    feature_energy,
    marginal_linear,
    rms_low_rank,
)
from .attention import block_sparse_attention, dense_attention
from .eight_bit import quantize_kv
from .fused import block_sparse_linear, block_sparse_mixed, linear_read, mix_background
from .linear_map import add_mapped
from .pooling import block_pool, block_pool_state, low_rank_state
from .prefix import prefix_attention
from .selection import block_mass, block_select, dropped_mass, mask_from_bits

__all__ = [
    "Background",
    "BlockLayout",
    "BlockMask",
    "Choice",
    "EightBit",
    "FeatureMap",
    "FirstOrder",
    "Gate",
    "LinearBranch",
    "LinearState",
    "LowRank",
    "PooledKV",
    "Prefixes",
    "RankedBlocks",
    "RequiredBlocks",
    "RmsLowRank",
    "SiluMap",
    "TokenBlocks",
    "TritonNotUsable",
    "add_coarse",
    "add_mapped",
    "add_rms_low_rank",
    "backend_for",
    "block_mass",
    "block_pool",
    "block_pool_state",
    "block_select",
    "block_sparse_attention",
    "block_sparse_linear",
    "block_sparse_mixed",
    "dense_attention",
    "dropped_mass",
    "eight_bit_works",
    "empty_nhd",
    "feature_energy",
    "linear_read",
    "low_rank_state",
    "marginal_linear",
    "mask_from_bits",
    "mix_background",
    "prefers_eight_bit",
    "prefix_attention",
    "quantize_kv",
    "rms_low_rank",
    "why_not",
]

MAX_HEAD_DIM = 512


def eight_bit_works(device: torch.device) -> bool:
    """Whether attention in 8 bits has not failed on a device so far."""
    return works("8-bit", device)


def why_not(head_dim: int, num_heads: int, num_kv_heads: int) -> str | None:
    """Why no backend can take such a call, in words; None where one can."""
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        return f"head_dim is {head_dim} (an even number up to {MAX_HEAD_DIM} is needed)"
    if num_heads != num_kv_heads:
        return f"{num_heads} query heads on {num_kv_heads} key heads (equal numbers are needed)"
    return None


def backend_for(q: Tensor, backend: str, block_size: int) -> Choice:
    """Which backend attends for q `(B, H, L, D)` in blocks of so many tokens, and why."""
    return choose(backend, Operands(q.device, q.dtype, q.shape[-1], (block_size,)))
