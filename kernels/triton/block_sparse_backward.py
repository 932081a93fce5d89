"""Block-sparse attention, backward: dQ by the row lists, dK and dV by the transposed lists; no atomics, deterministic.

Weights are recomputed from the LSE. delta = sum(out * d_out) - d_lse is summed in float32 from the rounded tensors, and
the softmax scale is applied in float32, to the scores and to the finished gradients: a k scaled in bf16 is right at
unit activations and wrong at 16 times that.
"""

from __future__ import annotations

import triton.language as tl

from .launch import kernel
from .tiles import LOG2_E, block_rows, is_short, load_rows, store_rows


@kernel
def _delta(
    out_ptr, d_out_ptr, d_lse_ptr, delta_ptr,
    out_batch, out_head, out_row, d_batch, d_head, d_row, heads, tokens,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    rows = block_rows(None, tl.program_id(0), tokens, BLOCK)
    out = load_rows(out_ptr + b * out_batch * 8 + h * out_head * 8, rows, out_row, D, DP)
    d_out = load_rows(d_out_ptr + b * d_batch * 8 + h * d_head * 8, rows, d_row, D, DP)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    if d_lse_ptr is not None:
        delta -= tl.load(d_lse_ptr + head * tokens + rows, mask=rows >= 0, other=0.0)
    tl.store(delta_ptr + head * tokens + rows, delta, mask=rows >= 0)


@kernel
def _d_queries(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, d_q_ptr, q_table_ptr, k_table_ptr, lists_ptr, counts_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, d_batch, d_head, d_row,
    dq_batch, dq_head, dq_row, heads, q_tokens, k_tokens, n_q, list_width, scale,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    q_block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    k_ptr += b * k_batch * 8 + h * k_head * 8
    v_ptr += b * v_batch * 8 + h * v_head * 8
    line = head * n_q + q_block
    count = tl.load(counts_ptr + line)
    lists_ptr += line * list_width

    q_rows = block_rows(q_table_ptr, q_block, q_tokens, BLOCK_Q)
    there = q_rows >= 0
    q = load_rows(q_ptr + b * q_batch * 8 + h * q_head * 8, q_rows, q_row, D, DP)
    d_out = load_rows(d_out_ptr + b * d_batch * 8 + h * d_head * 8, q_rows, d_row, D, DP)
    lse = tl.load(lse_ptr + head * q_tokens + q_rows, mask=there, other=float("inf")) * LOG2_E
    delta = tl.load(delta_ptr + head * q_tokens + q_rows, mask=there, other=0.0)
    scale2 = scale * LOG2_E
    d_q = tl.zeros((BLOCK_Q, DP), tl.float32)
    for i in range(0, count):
        k_block = tl.load(lists_ptr + i)
        rows = block_rows(k_table_ptr, k_block, k_tokens, BLOCK_K)
        k = load_rows(k_ptr, rows, k_row, D, DP)
        v = load_rows(v_ptr, rows, v_row, D, DP)
        scores = tl.dot(q, k.T) * scale2
        if is_short(k_table_ptr, k_block, k_tokens, BLOCK_K):
            scores = tl.where((rows >= 0)[None, :], scores, -float("inf"))
        weights = tl.exp2(scores - lse[:, None])
        d_weights = tl.dot(d_out, v.T)
        d_scores = weights * (d_weights - delta[:, None])
        d_q = tl.dot(d_scores.to(k.dtype), k, d_q)
    store_rows(d_q_ptr + b * dq_batch * 8 + h * dq_head * 8, q_rows, dq_row, d_q * scale, D, DP)


@kernel
def _d_keys(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, d_k_ptr, d_v_ptr, q_table_ptr, k_table_ptr,
    entries_ptr, starts_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, d_batch, d_head, d_row,
    dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row, heads, q_tokens, k_tokens, n_k, entries_width, scale,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    k_block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    q_ptr += b * q_batch * 8 + h * q_head * 8
    d_out_ptr += b * d_batch * 8 + h * d_head * 8
    starts_ptr += head * (n_k + 1) + k_block
    entries_ptr += head * entries_width

    k_rows = block_rows(k_table_ptr, k_block, k_tokens, BLOCK_K)
    k = load_rows(k_ptr + b * k_batch * 8 + h * k_head * 8, k_rows, k_row, D, DP)
    v = load_rows(v_ptr + b * v_batch * 8 + h * v_head * 8, k_rows, v_row, D, DP)
    scale2 = scale * LOG2_E
    d_k = tl.zeros((BLOCK_K, DP), tl.float32)
    d_v = tl.zeros((BLOCK_K, DP), tl.float32)
    for i in range(tl.load(starts_ptr), tl.load(starts_ptr + 1)):
        rows = block_rows(q_table_ptr, tl.load(entries_ptr + i), q_tokens, BLOCK_Q)
        there = rows >= 0
        q = load_rows(q_ptr, rows, q_row, D, DP)
        d_out = load_rows(d_out_ptr, rows, d_row, D, DP)
        # An empty slot has no weight: exp2(score - inf). Keys that are not there get gradients nobody stores.
        lse = tl.load(lse_ptr + head * q_tokens + rows, mask=there, other=float("inf")) * LOG2_E
        delta = tl.load(delta_ptr + head * q_tokens + rows, mask=there, other=0.0)
        scores = tl.dot(k, q.T) * scale2
        weights = tl.exp2(scores - lse[None, :])
        d_v = tl.dot(weights.to(d_out.dtype), d_out, d_v)
        d_weights = tl.dot(v, d_out.T)
        d_scores = weights * (d_weights - delta[None, :])
        d_k = tl.dot(d_scores.to(q.dtype), q, d_k)
    store_rows(d_k_ptr + b * dk_batch * 8 + h * dk_head * 8, k_rows, dk_row, d_k * scale, D, DP)
    store_rows(d_v_ptr + b * dv_batch * 8 + h * dv_head * 8, k_rows, dv_row, d_v, D, DP)
