"""Pieces that every kernel shares: token numbers of a block, tiles of rows, one step of the online softmax."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def block_rows(table_ptr, block, tokens, BLOCK: tl.constexpr, AGAIN: tl.constexpr = False):
    """Token numbers of one block, -1 on empty slots; without a table blocks lie one behind the other.

    AGAIN reads them anew, so that no address made of them stays in registers since the first time.
    """
    slots = tl.arange(0, BLOCK)
    if table_ptr is None:
        rows = block * BLOCK + slots
        rows = tl.where(rows < tokens, rows, -1)
    else:
        rows = tl.load(table_ptr + block * BLOCK + slots, volatile=AGAIN)
    return rows


@triton.jit
def is_short(table_ptr, block, tokens, BLOCK: tl.constexpr):
    """Whether a block has an empty slot; slots are filled from the front, so the last one tells."""
    if table_ptr is None:
        short = (block + 1) * BLOCK > tokens
    else:
        short = tl.load(table_ptr + block * BLOCK + BLOCK - 1) < 0
    return short


@triton.jit
def row_pointers(base_ptr, rows, stride, D: tl.constexpr, DP: tl.constexpr):
    """Addresses and mask `(BLOCK, DP)` of rows of a `(L, D)` matrix; stride in units of 8 elements.

    64-bit throughout: a million tokens of 40 heads side by side lie up to 5e9 elements apart.
    """
    channels = tl.arange(0, DP)
    there = (rows >= 0)[:, None]
    if D < DP:
        there = there & (channels < D)[None, :]
    return base_ptr + rows.to(tl.int64)[:, None] * (stride * 8) + channels[None, :], there


@triton.jit
def load_rows(base_ptr, rows, stride, D: tl.constexpr, DP: tl.constexpr):
    """Rows as a tile `(BLOCK, DP)`; empty slots and channels beyond D are 0."""
    pointers, there = row_pointers(base_ptr, rows, stride, D, DP)
    return tl.load(pointers, mask=there, other=0.0)


@triton.jit
def store_rows(base_ptr, rows, stride, tile, D: tl.constexpr, DP: tl.constexpr):
    """Store a tile `(BLOCK, DP)` to the rows it belongs to; empty slots are left out."""
    pointers, there = row_pointers(base_ptr, rows, stride, D, DP)
    tl.store(pointers, tile.to(base_ptr.dtype.element_ty), mask=there)


@triton.jit
def softmax_step(scores, v, best, total, acc):
    """Take one tile of scores (in log2 units, -inf = absent) and its values into the running softmax.

    best, total `(BLOCK,)`: running maximum and sum; acc `(BLOCK, DP)`: running sum of values. All in float32; the
    scale is applied to the float32 scores, never to a half-precision q or k.
    """
    higher = tl.maximum(best, tl.max(scores, 1))
    shift = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(best - shift)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None])
    return higher, total, acc
