"""Pieces that kernels share: tokens of a block, tiles of rows, one step of online softmax."""

from __future__ import annotations

# Kernel bodies are Triton's own language, which a type checker takes for Python.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

# Strides are handed over in these units: it tells the compiler, for every tensor, that rows are
# aligned for 16-byte loads, without a variant per stride.
STRIDE_UNIT = tl.constexpr(8)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def head_ptr(base_ptr, batch, head, batch_stride, head_stride):
    """Where one head begins; strides in units of STRIDE_UNIT elements, 64-bit throughout.

    A million tokens of 40 heads side by side lie up to 5e9 elements apart.
    """
    return base_ptr + batch * batch_stride * STRIDE_UNIT + head * head_stride * STRIDE_UNIT


@triton.jit
def block_tokens(table_ptr, block, tokens, BLOCK: tl.constexpr, RELOAD: tl.constexpr = False):
    """Tokens of one block, -1 on empty slots; without a table blocks follow each other in order.

    RELOAD reads them anew, so that no address made of them stays in registers since the first time.
    """
    slots = tl.arange(0, BLOCK)
    if table_ptr is None:
        rows = block * BLOCK + slots
        rows = tl.where(rows < tokens, rows, -1)
    else:
        rows = tl.load(table_ptr + block * BLOCK + slots, volatile=RELOAD)
    return rows


@triton.jit
def list_of(lists_ptr, starts_ptr, line, n_q, list_width):
    """Where the list of row `line` begins: list_width entries a row, or packed by head."""
    if starts_ptr is None:
        start = line * list_width
    else:
        start = tl.load(starts_ptr + line // n_q)
        stop = tl.load(starts_ptr + line // n_q + 1)
        start += (stop - start) // n_q * (line % n_q)
    return lists_ptr + start


@triton.jit
def is_short(table_ptr, block, tokens, BLOCK: tl.constexpr):
    """Whether a block has an empty slot; slots are filled from the front, so the last one tells."""
    if table_ptr is None:
        short = (block + 1) * BLOCK > tokens
    else:
        short = tl.load(table_ptr + block * BLOCK + BLOCK - 1) < 0
    return short


@triton.jit
def kept_tokens(
    table_ptr, lists_ptr, first, count, tokens, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """Tokens `(TILE,)` of a list's blocks from entry `first` on, -1 where there are none.

    TILE // BLOCK entries make a tile; without a list its entries are all blocks in order. -> those,
    and the block numbers that `any_missing` takes: one, or one per slot.
    """
    if TILE == BLOCK:
        block = first
        if lists_ptr is not None:
            block = tl.load(lists_ptr + first).to(tl.int32)
        rows = block_tokens(table_ptr, block, tokens, BLOCK)
    else:
        slots = tl.arange(0, TILE)
        entries = first + slots // BLOCK
        there = entries < count
        block = entries
        if lists_ptr is not None:
            block = tl.load(lists_ptr + entries, mask=there, other=0).to(tl.int32)
        rows = block * BLOCK + slots % BLOCK
        if table_ptr is None:
            rows = tl.where(there & (rows < tokens), rows, -1)
        else:
            rows = tl.load(table_ptr + rows, mask=there, other=-1)
    return rows, block


@triton.jit
def any_missing(table_ptr, rows, block, tokens, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Whether a tile of `kept_tokens` has an empty slot."""
    if TILE == BLOCK:
        missing = is_short(table_ptr, block, tokens, BLOCK)
    else:
        missing = tl.min(rows, 0) < 0
    return missing


@triton.jit
def row_pointers(base_ptr, rows, stride, D: tl.constexpr, DP: tl.constexpr):
    """Addresses and mask `(BLOCK, DP)` of rows of a `(L, D)` matrix; stride in STRIDE_UNITs."""
    channels = tl.arange(0, DP)
    mask = (rows >= 0)[:, None]
    if D < DP:
        mask = mask & (channels < D)[None, :]
    offsets = rows.to(tl.int64)[:, None] * (stride * STRIDE_UNIT)
    return base_ptr + offsets + channels[None, :], mask


@triton.jit
def load_rows(base_ptr, rows, stride, D: tl.constexpr, DP: tl.constexpr):
    """Rows as a tile `(BLOCK, DP)`; empty slots and channels beyond D are 0."""
    pointers, mask = row_pointers(base_ptr, rows, stride, D, DP)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_rows(base_ptr, rows, stride, tile, D: tl.constexpr, DP: tl.constexpr):
    """Store a tile `(BLOCK, DP)` to the rows it belongs to; empty slots are left out."""
    pointers, mask = row_pointers(base_ptr, rows, stride, D, DP)
    tl.store(pointers, tile.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit
def softmax_step(scores, v, running_max, running_sum, acc):
    """Take one tile of scores (log2 units, -inf = absent) and its values into the running softmax.

    running_max, running_sum `(BLOCK,)`; acc `(BLOCK, DP)`: running sum of values. All in float32;
    the scale is applied to the float32 scores, never to a half-precision q or k.
    """
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    shift = tl.where(new_max == -float("inf"), 0.0, new_max)
    weights = tl.exp2(scores - shift[:, None])
    alpha = tl.exp2(running_max - shift)
    running_sum = running_sum * alpha + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * alpha[:, None])
    return new_max, running_sum, acc
