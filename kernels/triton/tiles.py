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
def full_tiles(
    lists_ptr, num_full_ptr, count, n_k, tokens, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """Entries of a list, or of all blocks in order, that make tiles without an empty slot.

    Those come first: a list ascends, and blocks from num_full on may be short.
    """
    if num_full_ptr is None:
        num_full = tokens // BLOCK
    else:
        num_full = tl.load(num_full_ptr)
    if lists_ptr is None:
        late = n_k - num_full
    else:
        late = 0
        slots = tl.arange(0, 64)
        for start in range(0, n_k - num_full, 64):
            place = count - 1 - start - slots
            entries = tl.load(lists_ptr + place, mask=place >= 0, other=0).to(tl.int32)
            late += tl.sum(((place >= 0) & (entries >= num_full)).to(tl.int32), 0)
    EACH: tl.constexpr = TILE // BLOCK
    return (count - late) // EACH * EACH


@triton.jit
def kept_blocks(
    lists_ptr, first, count, BLOCK: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr
):
    """A list's blocks from entry `first` on, TILE // BLOCK of them, as the block of every key.

    `(TILE,)`, or one number where a tile is a block; without a list all blocks are there, in order.
    Entries from `count` on name block 0; FULL: there are none.
    """
    if TILE == BLOCK:
        block = first
        if lists_ptr is not None:
            block = tl.load(lists_ptr + first).to(tl.int32)
    else:
        block = first + tl.arange(0, TILE) // BLOCK
        if lists_ptr is not None:
            if FULL:
                block = tl.load(lists_ptr + block).to(tl.int32)
            else:
                block = tl.load(lists_ptr + block, mask=block < count, other=0).to(tl.int32)
        elif not FULL:
            block = tl.where(block < count, block, 0)
    return block


@triton.jit
def tokens_of(
    table_ptr, block, first, count, tokens,
    BLOCK: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Tokens `(TILE,)` of what `kept_blocks` found, -1 where there are none.

    FULL: each of them is there and has no empty slot, so that nothing needs a mask.
    """
    slots = tl.arange(0, TILE)
    rows = block * BLOCK + slots % BLOCK
    if table_ptr is not None:
        rows = tl.load(table_ptr + rows)
    elif not FULL:
        rows = tl.where(rows < tokens, rows, -1)
    if not FULL and TILE > BLOCK:
        rows = tl.where(first + slots // BLOCK < count, rows, -1)
    return rows


@triton.jit
def row_pointers(base_ptr, rows, stride, D: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr):
    """Addresses and mask `(BLOCK, WIDTH)` of rows of a `(L, D)` matrix; stride in STRIDE_UNITs.

    The channels are those from FIRST on.
    """
    channels = FIRST + tl.arange(0, WIDTH)
    mask = (rows >= 0)[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (channels < D)[None, :]
    # In units a product of 32 bits reaches 17 billion elements, and costs a third of a wide one.
    offsets = (rows * stride).to(tl.int64) * STRIDE_UNIT
    return base_ptr + offsets[:, None] + channels[None, :], mask


@triton.jit
def load_rows(
    base_ptr, rows, stride, D: tl.constexpr, WIDTH: tl.constexpr,
    FIRST: tl.constexpr = 0, FULL: tl.constexpr = False,
):  # fmt: skip
    """Channels from FIRST on as a tile `(BLOCK, WIDTH)`; 0 in empty slots and from channel D on.

    FULL: no slot is empty.
    """
    pointers, mask = row_pointers(base_ptr, rows, stride, D, WIDTH, FIRST)
    if not FULL:
        tile = tl.load(pointers, mask=mask, other=0.0)
    elif FIRST + WIDTH <= D:
        tile = tl.load(pointers)
    else:
        there = (FIRST + tl.arange(0, WIDTH) < D)[None, :]
        tile = tl.load(pointers, mask=there, other=0.0)
    return tile


@triton.jit
def store_rows(
    base_ptr, rows, stride, tile, D: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr = 0
):
    """Store a tile `(BLOCK, WIDTH)` to the rows it belongs to; empty slots are left out."""
    pointers, mask = row_pointers(base_ptr, rows, stride, D, WIDTH, FIRST)
    tl.store(pointers, tile.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit
def softmax_weights(
    scores, log2_scale, running_max, running_sum,
    ABSENT: tl.constexpr, GAIN: tl.constexpr = 0.0, PER_ROW: tl.constexpr = False,
):  # fmt: skip
    """Take one tile of scores into the running softmax.

    -> their weights, what earlier sums fade by, and the new running_max and running_sum `(BLOCK,)`.
    Scores are plain products: the scale, one number or (PER_ROW) `(BLOCK,)`, is applied in float32,
    in the exponent, where it costs nothing. ABSENT: some may be -inf, all of a row even. Weights
    and their sum are 2 ** GAIN times as large.
    """
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    shift = new_max * log2_scale
    if ABSENT:
        shift = tl.where(new_max == -float("inf"), 0.0, shift)
    fade = tl.exp2(running_max * log2_scale - shift)
    if GAIN != 0.0:
        shift -= GAIN
    row_scale = log2_scale
    if PER_ROW:
        row_scale = log2_scale[:, None]
    weights = tl.exp2(scores * row_scale - shift[:, None])
    return weights, fade, new_max, running_sum * fade + tl.sum(weights, 1)
