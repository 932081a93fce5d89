"""Block-sparse attention, backward: dQ by the row lists, dK and dV by the transposed lists.

No atomics, so deterministic. Weights are recomputed from the LSE. delta = sum(out * d_out) - d_lse
is summed in float32 from the rounded tensors, and the softmax scale is applied in float32, to the
scores and to the finished gradients: a k scaled in bf16 is right at unit activations and wrong at
16 times that.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from .. import pytorch
from ..pytorch.common import empty_nhd
from ..types import Forward
from .attention import Tables
from .launch import aligned, kernel, launch_options, padded, strides
from .tiles import (
    LOG2_E,
    block_tokens,
    full_tiles,
    head_ptr,
    kept_blocks,
    list_of,
    load_rows,
    store_rows,
    tokens_of,
)
from .transpose import transposed_lists

BLOCK = 64  # rows of the element-wise pass
ROWS = 64  # of dQ that a program makes: three tiles of twice as many do not fit into registers


def block_sparse_attention_backward(
    d_out: Tensor, d_lse: Tensor | None, forward: Forward
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v; with pooled keys, which no trained method has, on the portable path."""
    if forward.pooled is not None:
        return pytorch.block_sparse_attention_backward(d_out, d_lse, forward)
    mask, scale = forward.mask, forward.scale
    q, k, v, out = (aligned(x) for x in (forward.q, forward.k, forward.v, forward.out))
    d_out = aligned(d_out.to(q.dtype))
    tables = Tables.of(mask)
    batch, heads, tokens, head_dim = q.shape
    k_tokens = k.shape[2]
    n_q, n_k = tables.counts_for(tokens, k_tokens)
    lse = forward.lse.contiguous()
    delta = _delta_of(out, d_out, d_lse)
    shape = {
        "D": head_dim,
        "DP": padded(head_dim),
        "BLOCK_Q": tables.block_q,
        "BLOCK_K": tables.block_k,
    }
    d_q = empty_nhd(q, tokens)
    rows = min(tables.block_q, ROWS)
    _d_queries[(n_q * (tables.block_q // rows), batch * heads)](
        q,
        k,
        v,
        d_out,
        lse,
        delta,
        d_q,
        *tables.pointers,
        *strides(q),
        *strides(k),
        *strides(v),
        *strides(d_out),
        *strides(d_q),
        heads,
        tokens,
        k_tokens,
        n_q,
        n_k,
        tables.list_width,
        scale,
        **shape,
        ROWS=rows,
        TILE_K=tables.tile_k,
        **launch_options("d_queries"),
    )
    d_k, d_v = empty_nhd(k, k_tokens), empty_nhd(v, k_tokens)
    if not mask.kv_blocks.lists_every_token:  # keys in no block are not written
        d_k.zero_()
        d_v.zero_()
    q_indices, q_indptr = transposed_lists(mask)
    _d_keys[(n_k, batch * heads)](
        q,
        k,
        v,
        d_out,
        lse,
        delta,
        d_k,
        d_v,
        tables.q_table,
        tables.kv_table,
        q_indices,
        q_indptr,
        *strides(q),
        *strides(k),
        *strides(v),
        *strides(d_out),
        *strides(d_k),
        *strides(d_v),
        heads,
        tokens,
        k_tokens,
        n_k,
        q_indices.shape[-1],
        scale,
        **shape,
        **launch_options("d_keys"),
    )
    return d_q, d_k, d_v


def _delta_of(out: Tensor, d_out: Tensor, d_lse: Tensor | None) -> Tensor:
    batch, heads, tokens, head_dim = out.shape
    delta = out.new_empty(batch, heads, tokens, dtype=torch.float32)
    _delta[(-(-tokens // BLOCK), batch * heads)](
        out,
        d_out,
        None if d_lse is None else d_lse.float().contiguous(),
        delta,
        *strides(out),
        *strides(d_out),
        heads,
        tokens,
        D=head_dim,
        DP=padded(head_dim),
        BLOCK=BLOCK,
        **launch_options("pool"),
    )
    return delta


@kernel
def _delta(
    out_ptr, d_out_ptr, d_lse_ptr, delta_ptr,
    out_batch, out_head, out_row, d_batch, d_head, d_row, heads, tokens,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    rows = block_tokens(None, tl.program_id(0), tokens, BLOCK)
    out = load_rows(head_ptr(out_ptr, b, h, out_batch, out_head), rows, out_row, D, DP)
    d_out = load_rows(head_ptr(d_out_ptr, b, h, d_batch, d_head), rows, d_row, D, DP)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    if d_lse_ptr is not None:
        delta -= tl.load(d_lse_ptr + head * tokens + rows, mask=rows >= 0, other=0.0)
    tl.store(delta_ptr + head * tokens + rows, delta, mask=rows >= 0)


@kernel
def _d_queries(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, d_q_ptr,
    q_table_ptr, kv_table_ptr, num_full_ptr, lists_ptr, counts_ptr, starts_ptr, longest_first_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    d_batch, d_head, d_row, dq_batch, dq_head, dq_row,
    heads, q_tokens, k_tokens, n_q, n_k, list_width, scale,
    D: tl.constexpr, DP: tl.constexpr,
    BLOCK_Q: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    q_block = tl.program_id(0) // (BLOCK_Q // ROWS)
    head = tl.program_id(1).to(tl.int64)
    if longest_first_ptr is not None:
        head = tl.load(longest_first_ptr + head).to(tl.int64)
    b, h = head // heads, head % heads
    k_ptr = head_ptr(k_ptr, b, h, k_batch, k_head)
    v_ptr = head_ptr(v_ptr, b, h, v_batch, v_head)
    line = head * n_q + q_block
    count = tl.load(counts_ptr + line)
    lists_ptr = list_of(lists_ptr, starts_ptr, line, n_q, list_width)

    q_rows = block_tokens(q_table_ptr, tl.program_id(0), q_tokens, ROWS)
    filled = q_rows >= 0
    q = load_rows(head_ptr(q_ptr, b, h, q_batch, q_head), q_rows, q_row, D, DP)
    d_out = load_rows(head_ptr(d_out_ptr, b, h, d_batch, d_head), q_rows, d_row, D, DP)
    lse = tl.load(lse_ptr + head * q_tokens + q_rows, mask=filled, other=float("inf")) * LOG2_E
    delta = tl.load(delta_ptr + head * q_tokens + q_rows, mask=filled, other=0.0)
    log2_scale = scale * LOG2_E
    d_q = tl.zeros((ROWS, DP), tl.float32)
    EACH: tl.constexpr = TILE_K // BLOCK_K
    full = full_tiles(lists_ptr, num_full_ptr, count, n_k, k_tokens, BLOCK_K, TILE_K)
    for i in tl.range(0, full, EACH):
        block = kept_blocks(lists_ptr, i, count, BLOCK_K, TILE_K, True)
        rows = tokens_of(kv_table_ptr, block, i, count, k_tokens, BLOCK_K, TILE_K, True)
        k = load_rows(k_ptr, rows, k_row, D, DP, FULL=True)
        v = load_rows(v_ptr, rows, v_row, D, DP, FULL=True)
        weights = tl.exp2(tl.dot(q, k.T) * log2_scale - lse[:, None])
        d_scores = weights * (tl.dot(d_out, v.T) - delta[:, None])
        d_q = tl.dot(d_scores.to(k.dtype), k, d_q)
    for i in tl.range(full, count, EACH, num_stages=1):
        block = kept_blocks(lists_ptr, i, count, BLOCK_K, TILE_K, False)
        rows = tokens_of(kv_table_ptr, block, i, count, k_tokens, BLOCK_K, TILE_K, False)
        k = load_rows(k_ptr, rows, k_row, D, DP)
        v = load_rows(v_ptr, rows, v_row, D, DP)
        weights = tl.exp2(tl.dot(q, k.T) * log2_scale - lse[:, None])
        weights = tl.where((rows >= 0)[None, :], weights, 0.0)
        d_scores = weights * (tl.dot(d_out, v.T) - delta[:, None])
        d_q = tl.dot(d_scores.to(k.dtype), k, d_q)
    d_q_ptr = head_ptr(d_q_ptr, b, h, dq_batch, dq_head)
    store_rows(d_q_ptr, q_rows, dq_row, d_q * scale, D, DP)


@kernel
def _d_keys(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, d_k_ptr, d_v_ptr,
    q_table_ptr, kv_table_ptr, q_indices_ptr, q_indptr_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    d_batch, d_head, d_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    heads, q_tokens, k_tokens, n_k, list_width, scale,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    kv_block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    q_ptr = head_ptr(q_ptr, b, h, q_batch, q_head)
    d_out_ptr = head_ptr(d_out_ptr, b, h, d_batch, d_head)
    q_indptr_ptr += head * (n_k + 1) + kv_block
    q_indices_ptr += head * list_width

    k_rows = block_tokens(kv_table_ptr, kv_block, k_tokens, BLOCK_K)
    k = load_rows(head_ptr(k_ptr, b, h, k_batch, k_head), k_rows, k_row, D, DP)
    v = load_rows(head_ptr(v_ptr, b, h, v_batch, v_head), k_rows, v_row, D, DP)
    log2_scale = scale * LOG2_E
    d_k = tl.zeros((BLOCK_K, DP), tl.float32)
    d_v = tl.zeros((BLOCK_K, DP), tl.float32)
    for i in range(tl.load(q_indptr_ptr), tl.load(q_indptr_ptr + 1)):
        rows = block_tokens(q_table_ptr, tl.load(q_indices_ptr + i), q_tokens, BLOCK_Q)
        filled = rows >= 0
        q = load_rows(q_ptr, rows, q_row, D, DP)
        d_out = load_rows(d_out_ptr, rows, d_row, D, DP)
        # An empty slot has no weight: exp2(score - inf). Keys that are not there get gradients
        # that nobody stores.
        lse = tl.load(lse_ptr + head * q_tokens + rows, mask=filled, other=float("inf")) * LOG2_E
        delta = tl.load(delta_ptr + head * q_tokens + rows, mask=filled, other=0.0)
        scores = tl.dot(k, q.T) * log2_scale
        weights = tl.exp2(scores - lse[None, :])
        d_v = tl.dot(weights.to(d_out.dtype), d_out, d_v)
        d_weights = tl.dot(v, d_out.T)
        d_scores = weights * (d_weights - delta[None, :])
        d_k = tl.dot(d_scores.to(q.dtype), q, d_k)
    d_k_ptr = head_ptr(d_k_ptr, b, h, dk_batch, dk_head)
    d_v_ptr = head_ptr(d_v_ptr, b, h, dv_batch, dv_head)
    store_rows(d_k_ptr, k_rows, dk_row, d_k * scale, D, DP)
    store_rows(d_v_ptr, k_rows, dv_row, d_v, D, DP)
