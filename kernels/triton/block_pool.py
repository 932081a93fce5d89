"""Pooling and states, in one read each: block means, first-order state of keys and values, low-rank state."""

from __future__ import annotations

import triton.language as tl

from .features import feature_tile
from .launch import kernel
from .tiles import block_rows, load_rows


@kernel
def _pool(
    x_ptr, means_ptr, table_ptr, x_batch, x_head, x_row, heads, tokens, blocks,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):
    """Block means `(B, H, N, D)` float32: one program per block and head. Reads x once."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    x_ptr += head // heads * x_batch * 8 + head % heads * x_head * 8
    rows = block_rows(table_ptr, block, tokens, BLOCK)
    size = tl.sum((rows >= 0).to(tl.float32), 0)
    mean = tl.sum(load_rows(x_ptr, rows, x_row, D, DP).to(tl.float32), 0) / size
    channels = tl.arange(0, DP)
    tl.store(means_ptr + (head * blocks + block) * D + channels, mean, mask=channels < D)


@kernel
def _pool_state(
    k_ptr, v_ptr, means_ptr, products_ptr, sums_ptr, table_ptr,
    k_batch, k_head, k_row, v_batch, v_head, v_row, heads, tokens, blocks, inner, per_program, parts,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):
    """Block means of k, and over the first `inner` blocks k^T v and the sums of k and v, in parts to be added up.

    One program takes `per_program` blocks of one head and reads k and v once. products `(B*H, parts, D, D)`, sums
    `(B*H, parts, 2, D)`, float32.
    """
    part = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    k_ptr += b * k_batch * 8 + h * k_head * 8
    v_ptr += b * v_batch * 8 + h * v_head * 8
    channels = tl.arange(0, DP)
    there = channels < D
    products = tl.zeros((DP, DP), tl.float32)
    k_sum = tl.zeros((DP,), tl.float32)
    v_sum = tl.zeros((DP,), tl.float32)
    for block in range(part * per_program, tl.minimum((part + 1) * per_program, blocks)):
        rows = block_rows(table_ptr, block, tokens, BLOCK)
        k = load_rows(k_ptr, rows, k_row, D, DP)
        total = tl.sum(k.to(tl.float32), 0)
        size = tl.sum((rows >= 0).to(tl.float32), 0)
        tl.store(means_ptr + (head * blocks + block) * D + channels, total / size, mask=there)
        v = load_rows(v_ptr, tl.where(block < inner, rows, -1), v_row, D, DP)
        products = tl.dot(k.T, v, products)
        k_sum += tl.where(block < inner, total, 0.0)
        v_sum += tl.sum(v.to(tl.float32), 0)
    line = head * parts + part
    at = line * D * D + channels[:, None] * D + channels[None, :]
    tl.store(products_ptr + at, products, mask=there[:, None] & there[None, :])
    tl.store(sums_ptr + line * 2 * D + channels, k_sum, mask=there)
    tl.store(sums_ptr + (line * 2 + 1) * D + channels, v_sum, mask=there)


@kernel
def _low_rank_state(
    k_ptr, v_ptr, products_ptr, sums_ptr, a_ptr, cos_ptr, sin_ptr, pe_ptr, places_ptr,
    k_batch, k_head, k_row, v_batch, v_head, v_row, heads, tokens, rank, pe_rows, per_program, parts,
    D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr,
):
    """phi^T v `(B*H, parts, rank, D)` and the sums of phi `(B*H, parts, rank)`, float32, in parts to be added up."""
    part = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    k_ptr += b * k_batch * 8 + h * k_head * 8
    v_ptr += b * v_batch * 8 + h * v_head * 8
    products = tl.zeros((RP, DP), tl.float32)
    sums = tl.zeros((RP,), tl.float32)
    for block in range(part * per_program, tl.minimum((part + 1) * per_program, tl.cdiv(tokens, BLOCK))):
        rows = block_rows(None, block, tokens, BLOCK)
        v = load_rows(v_ptr, rows, v_row, D, DP)
        phi = feature_tile(
            k_ptr, rows, k_row, h, a_ptr, cos_ptr, sin_ptr, pe_ptr, places_ptr, pe_rows, rank,
            D, DP, RP, BLOCK, ACT,
        )
        products = tl.dot(phi.to(v.dtype).T, v, products)
        sums += tl.sum(phi, 0)
    features, channels = tl.arange(0, RP), tl.arange(0, DP)
    line = head * parts + part
    inside = (features < rank)[:, None] & (channels < D)[None, :]
    at = (line * rank + features)[:, None] * D + channels[None, :]
    tl.store(products_ptr + at, products, mask=inside)
    tl.store(sums_ptr + line * rank + features, sums, mask=features < rank)
