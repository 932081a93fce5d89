"""Gradients of block-sparse attention in plain PyTorch.

Weights come from the LSE again; delta = sum(out d_out) - d_lse is summed in float32 or wider.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Forward, TokenBlocks
from .attention import blocks_per_step, dropped_bias, empty_slot_bias, keys_at_once
from .common import acc_dtype, gather, per_head, scatter


def block_sparse_attention_backward(
    d_out: Tensor, d_lse: Tensor | None, forward: Forward
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, and with pooled keys and values of those too."""
    q, k, v, out, lse, mask, pooled, scale = forward
    dtype, head_dim = acc_dtype(q.dtype), q.shape[-1]
    q_blocks, kv_blocks = mask.q_blocks, mask.kv_blocks
    count, block_size = kv_blocks.tokens.shape
    bias = empty_slot_bias(kv_blocks, dtype)

    def gradients(b: int, h: int) -> tuple[Tensor, ...]:
        lists = mask.head_lists(b, h, count)
        step = blocks_per_step(q, keys_at_once(mask, lists, pooled), q_blocks.block_size)
        queries, d_outs = (gather(x[b, h], q_blocks, dtype, zero_empty=True) for x in (q, d_out))
        keys, values = (
            gather(x[b, h], kv_blocks, dtype, zero_empty=True).flatten(1) for x in (k, v)
        )
        delta = (out[b, h].to(dtype) * d_out[b, h].to(dtype)).sum(dim=-1, keepdim=True)
        if d_lse is not None:
            delta = delta - d_lse[b, h, :, None].to(dtype)
        delta = gather(delta, q_blocks, dtype)
        shift = _shift(lse[b, h], q_blocks, dtype)
        d_queries = torch.empty_like(queries)
        d_keys, d_values = (x.new_zeros(count + 1, block_size * head_dim) for x in (keys, values))
        d_pooled = [torch.zeros_like(x[b, h], dtype=dtype) for x in pooled or ()]
        for start in range(0, q_blocks.num_blocks, step):
            some = slice(start, start + step)
            rows, d_rows, kept = queries[some], d_outs[some], lists[some]
            flat = kept.reshape(-1)
            near = flat.clamp(max=count - 1)
            near_k, near_v = (
                x.index_select(0, near).view(rows.shape[0], -1, head_dim) for x in (keys, values)
            )
            scores = rows @ near_k.mT * scale
            scores = scores + bias.index_select(0, flat).view(rows.shape[0], 1, -1)
            weights = (scores - shift[some]).exp_()
            d_scores = weights * (d_rows @ near_v.mT - delta[some]) * scale
            d_queries[some] = d_scores @ near_k
            d_keys.index_add_(0, flat, (d_scores.mT @ rows).view(-1, block_size * head_dim))
            d_values.index_add_(0, flat, (weights.mT @ d_rows).view(-1, block_size * head_dim))
            if pooled is not None:
                far_k, far_v = (x[b, h].to(dtype) for x in pooled)
                scores = rows @ far_k.T * scale + dropped_bias(kept, kv_blocks, dtype)
                weights = (scores - shift[some]).exp_()
                d_scores = weights * (d_rows @ far_v.T - delta[some]) * scale
                d_queries[some] += d_scores @ far_k
                d_pooled[0] += torch.einsum("mqn,mqd->nd", d_scores, rows)
                d_pooled[1] += torch.einsum("mqn,mqd->nd", weights, d_rows)
        d_k, d_v = (x[:count].view(count, block_size, -1) for x in (d_keys, d_values))
        found = (scatter(d_queries, q_blocks), scatter(d_k, kv_blocks), scatter(d_v, kv_blocks))
        return (*(x.to(q.dtype) for x in found), *d_pooled)

    return per_head(q, gradients, nhd_outputs=3)


def _shift(lse: Tensor, q_blocks: TokenBlocks, dtype: torch.dtype) -> Tensor:
    """LSE in block order `(N, S, 1)`; infinite, which leaves no weight, where nothing is kept."""
    shift = lse[:, None].to(dtype)
    shift = gather(shift.masked_fill(shift == -torch.inf, torch.inf), q_blocks, dtype)
    return shift.masked_fill(q_blocks.empty[..., None], torch.inf)
