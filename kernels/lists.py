"""Block lists turned around: from the keys that each query block keeps to the query blocks that keep each key block."""

from __future__ import annotations

import torch
from torch import Tensor


def transpose_lists(indices: Tensor, counts: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """indices `(B, H, Nq, K)`, counts `(B, H, Nq)` -> entries `(B*H, Nq*K)` int32, starts `(B*H, blocks + 1)` int64.

    The query blocks that keep key block j of head h are entries[h, starts[h, j] : starts[h, j + 1]], ascending: one
    stable sort, so the same on every run.
    """
    width = indices.shape[-1]
    used = torch.arange(width, device=indices.device) < counts[..., None]
    flat = torch.where(used, indices, blocks).flatten(2).flatten(0, 1)
    ordered, order = flat.sort(dim=-1, stable=True)
    edges = torch.arange(blocks + 1, device=indices.device, dtype=ordered.dtype).expand(flat.shape[0], -1)
    starts = torch.searchsorted(ordered, edges.contiguous())
    return (order // width).int(), starts
