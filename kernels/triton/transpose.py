"""A block mask transposed: from key blocks by query block to query blocks by key block."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import BlockMask


def transposed_lists(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """-> q_indices `(B*H, Nq*K)` int32, q_indptr `(B*H, Nk + 1)` int64.

    The query blocks that keep key block j of head h are
    q_indices[h, q_indptr[h, j] : q_indptr[h, j + 1]], ascending: one stable sort, so the same on
    every run.
    """
    mask = mask.padded()
    blocks, width = mask.kv_blocks.num_blocks, mask.kv_indices.shape[-1]
    flat = mask.fill_unused(blocks).to(mask.kv_indices.dtype).flatten(2).flatten(0, 1)
    ordered, order = flat.sort(dim=-1, stable=True)
    edges = torch.arange(blocks + 1, device=flat.device, dtype=ordered.dtype)
    edges = edges.expand(flat.shape[0], -1).contiguous()
    return (order // max(1, width)).int(), torch.searchsorted(ordered, edges)
