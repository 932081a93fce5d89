"""Attention of a few queries over ever more of their best key blocks: what allocation looks at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import pytorch
from ..types import Prefixes, RankedBlocks
from .validate import (
    check_attention,
    check_blocks,
    check_devices,
    check_shape,
    softmax_scale,
    whole_number,
)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranked: RankedBlocks,
    counts: Sequence[int],
    *,
    scale: float | None = None,
) -> Prefixes:
    """Attention of queries `(B, H, R, D)` over the best K of their key blocks, for each K.

    k, v `(B, H, L, D)`. No gradients; plain PyTorch.
    """
    kv_blocks, pooled_q, pooled_k, required, pooled = ranked
    check_attention(q, k, v)
    check_blocks("ranked.blocks", kv_blocks, k)
    blocks = kv_blocks.num_blocks
    check_shape("ranked.pooled_q", pooled_q, q.shape)
    check_shape("ranked.pooled_k", pooled_k, (*q.shape[:2], blocks, q.shape[3]))
    if required is not None:
        check_shape("ranked.required", required, (q.shape[2], blocks))
    if pooled is not None:
        check_shape("ranked.pooled.k", pooled.k, (*q.shape[:2], blocks, q.shape[3]))
    check_devices(q, ranked)
    if not counts:
        raise ValueError("counts must name at least one number of blocks; found none")
    counts = [whole_number("counts", count, 0) for count in counts]
    with torch.no_grad():
        return pytorch.prefix_attention(q, k, v, ranked, counts, softmax_scale(q, scale))
