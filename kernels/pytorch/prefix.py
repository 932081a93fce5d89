"""Attention of a few queries over ever more of their best key blocks, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import Prefixes, RankedBlocks
from .attention import empty_slot_bias
from .common import acc_dtype, gather, per_head


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranked: RankedBlocks,
    counts: Sequence[int],
    scale: float,
) -> Prefixes:
    """See `reference.prefix_attention`. Every weight is computed once, whatever the counts."""
    kv_blocks, block_scores, required, pooled = ranked
    dtype, rows = acc_dtype(q.dtype), q.shape[2]
    bias = empty_slot_bias(kv_blocks, dtype)[:-1].flatten()
    log_sizes = kv_blocks.sizes.to(dtype).log()
    best = block_scores if required is None else block_scores.masked_fill(required, -torch.inf)
    order = best.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, place)

    def attend(b: int, h: int) -> tuple[Tensor, ...]:
        queries = q[b, h].to(dtype)
        keys, values = (gather(x[b, h], kv_blocks, dtype, zero_empty=True) for x in (k, v))
        values = values.flatten(0, 1)
        scores = torch.addmm(bias, queries, keys.flatten(0, 1).T, alpha=scale)
        shift = scores.amax(dim=-1, keepdim=True)
        weights = scores.sub_(shift).exp_()
        exact = _read(weights, values, shift)
        far = None
        if pooled is not None:
            far_k, far_v = (x[b, h].to(dtype) for x in pooled)
            far = (queries @ far_k.T * scale + log_sizes - shift).exp_(), far_v
        weights = weights.view(rows, *kv_blocks.tokens.shape)
        found = []
        for count in counts:
            kept = rank[b, h] < count
            if required is not None:
                kept = kept | required
            near = (weights * kept[..., None]).flatten(1)
            dropped = (block_scores[b, h] + log_sizes).masked_fill(kept, -torch.inf)
            parts = [(near, values)]
            if far is not None:
                parts.append((far[0] * ~kept, far[1]))
            found.append((*_read_all(parts, shift), dropped.logsumexp(dim=-1)))
        return (*(torch.stack(each) for each in zip(*found)), *exact)

    out, lse, dropped_lse, *exact = per_head(q, attend)
    return Prefixes(*(x.movedim(2, 0) for x in (out, lse, dropped_lse)), *exact)


def _read(weights: Tensor, values: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return _read_all([(weights, values)], shift)


def _read_all(parts: list[tuple[Tensor, Tensor]], shift: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over several sets of keys whose weights are exp(score - shift): -> out, LSE."""
    total = sum(weights.sum(dim=-1, keepdim=True) for weights, _ in parts)
    out = sum(weights @ values for weights, values in parts)
    assert isinstance(total, Tensor) and isinstance(out, Tensor)
    out = out / total.clamp(min=torch.finfo(total.dtype).tiny)
    return out, (shift + total.log()).squeeze(-1)
