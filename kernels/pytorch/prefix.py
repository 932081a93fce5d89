"""Attention of a few queries over ever more of their best key blocks, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import Prefixes, RankedBlocks
from .attention import STEP_BYTES, empty_slot_bias
from .common import acc_dtype, gather, per_head

QUERY_DIMS = (-2, -1, -1, -2, -1)  # of out, LSE, dropped LSE; of exact out and LSE


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranked: RankedBlocks,
    counts: Sequence[int],
    scale: float,
) -> Prefixes:
    """See `reference.prefix_attention`. Every weight is computed once, whatever the counts."""
    kv_blocks, pooled_q, pooled_k, required, pooled = ranked
    dtype = acc_dtype(q.dtype)
    bias = empty_slot_bias(kv_blocks, dtype)[:-1].flatten()
    log_sizes = kv_blocks.sizes.to(dtype).log()
    wanted = torch.tensor(list(counts), device=q.device)[:, None, None]
    step = max(1, STEP_BYTES // (4 * (len(counts) + 2) * kv_blocks.tokens.numel()))

    def attend(b: int, h: int) -> tuple[Tensor, ...]:
        keys, values = (gather(x[b, h], kv_blocks, dtype, zero_empty=True) for x in (k, v))
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        own_k = pooled_k[b, h].to(dtype)
        far = None if pooled is None else [x[b, h].to(dtype) for x in pooled]
        rows = []
        for start in range(0, q.shape[2], step):
            some = slice(start, start + step)
            own = pooled_q[b, h, some].to(dtype) @ own_k.T * scale
            needed = None if required is None else required[some]
            rows.append(read(q[b, h, some].to(dtype), own, needed, keys, values, far))
        return tuple(torch.cat(each, dim=at) for each, at in zip(zip(*rows), QUERY_DIMS))

    def read(
        queries: Tensor,
        block_scores: Tensor,
        needed: Tensor | None,
        keys: Tensor,
        values: Tensor,
        far: list[Tensor] | None,
    ) -> tuple[Tensor, ...]:
        """Some queries of a head: out, LSE and dropped LSE of every count, exact out and LSE."""
        scores = torch.addmm(bias, queries, keys.T, alpha=scale)
        shift = scores.amax(dim=-1, keepdim=True)
        weights = scores.sub_(shift).exp_()
        exact_sum, exact_out = weights.sum(dim=-1), weights @ values
        best = block_scores if needed is None else block_scores.masked_fill(needed, -torch.inf)
        order = best.argsort(dim=-1, descending=True, stable=True)
        place = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(-1, order, place)
        kept = rank < wanted
        if needed is not None:
            kept = kept | needed
        # All counts in one product; one that keeps nothing needs none.
        none = int(needed is None and counts[0] == 0)
        near = weights.view(len(queries), *kv_blocks.tokens.shape) * kept[none:, :, :, None]
        near = near.flatten(-2)
        total, out = near.sum(dim=-1), near @ values
        if none:
            total = torch.cat((torch.zeros_like(exact_sum)[None], total))
            out = torch.cat((torch.zeros_like(exact_out)[None], out))
        if far is not None:
            beyond = (queries @ far[0].T * scale + log_sizes - shift).exp_() * ~kept
            total, out = total + beyond.sum(dim=-1), out + beyond @ far[1]
        dropped = (block_scores + log_sizes).masked_fill(kept, -torch.inf)
        found = _normalised(out, total, shift), dropped.logsumexp(dim=-1)
        return (*found[0], found[1], *_normalised(exact_out, exact_sum, shift))

    out, lse, dropped_lse, *exact = per_head(q, attend)
    return Prefixes(*(x.movedim(2, 0) for x in (out, lse, dropped_lse)), *exact)


def _normalised(out: Tensor, total: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of values and weights `(..., R)`, weights being exp(score - shift): -> out, LSE."""
    smallest = torch.finfo(total.dtype).tiny
    return out / total.clamp(min=smallest)[..., None], shift.squeeze(-1) + total.log()
