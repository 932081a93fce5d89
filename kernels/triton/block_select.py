"""Choosing blocks: the best of each row by an exact threshold, written as sorted lists or as bits; and exact mass.

The threshold is found bit by bit on order-preserving integers, so a row of any length costs 32 counting passes over
data that stays in the cache, whatever is kept. Equal scores at the threshold go to the lower block number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import kernel
from .tiles import LN_2, LOG2_E, block_rows, load_rows


@triton.jit
def _forced(forced_ptr, columns, n_k):
    forced = columns < 0
    if forced_ptr is not None:
        forced = tl.load(forced_ptr + columns, mask=columns < n_k, other=0) != 0
    return forced


@triton.jit
def _ranks(scores_ptr, forced_ptr, columns, n_k):
    """The order of a row's scores as uint32; 0, below every score, for columns that are forced or not there."""
    there = columns < n_k
    bits = tl.load(scores_ptr + columns, mask=there, other=0.0).to(tl.uint32, bitcast=True)
    ranks = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    free = there & (_forced(forced_ptr, columns, n_k) == 0)
    return tl.where(free, ranks, tl.zeros_like(ranks))


@kernel
def _select(
    scores_ptr, forced_ptr, log_sizes_ptr, keeps_ptr, lists_ptr, counts_ptr, tail_ptr, bits_ptr, kept_mass_ptr,
    first_line, n_q, n_k, keep, list_width, words, choices, CHUNK: tl.constexpr,
):
    """One program per row of scores `(n_q, n_k)` and, for bits, per choice of how many to keep.

    Scores hold some heads at a time; their first row is row first_line of the outputs.
    lists: indices, counts and the log-mass of the rest. bits: a mask of `words` int32 and the mass that it keeps.
    """
    line = tl.program_id(0).to(tl.int64)
    choice = tl.program_id(1)
    scores_ptr += line * n_k
    if forced_ptr is not None:
        forced_ptr += (line % n_q) * n_k
    if keeps_ptr is not None:
        keep = tl.load(keeps_ptr + choice)
    line += first_line
    lanes = tl.arange(0, CHUNK)

    threshold = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(0, 32):
        candidate = threshold | bit
        reached = 0
        for start in range(0, n_k, CHUNK):
            ranks = _ranks(scores_ptr, forced_ptr, start + lanes, n_k)
            reached += tl.sum((ranks >= candidate).to(tl.int32), 0)
        threshold = tl.where(reached >= keep, candidate, threshold)
        bit = bit >> 1
    above = 0
    for start in range(0, n_k, CHUNK):
        ranks = _ranks(scores_ptr, forced_ptr, start + lanes, n_k)
        above += tl.sum((ranks > threshold).to(tl.int32), 0)

    equals_left = keep - above
    written = 0
    mass = 0.0
    best = tl.full((), -float("inf"), tl.float32)
    total = 0.0
    for start in range(0, n_k, CHUNK):
        columns = start + lanes
        there = columns < n_k
        scores = tl.load(scores_ptr + columns, mask=there, other=0.0)
        ranks = _ranks(scores_ptr, forced_ptr, columns, n_k)
        equal = ((ranks == threshold) & (ranks > 0)).to(tl.int32)
        chosen = (ranks > threshold) | ((equal > 0) & (tl.cumsum(equal, 0) <= equals_left))
        equals_left -= tl.minimum(tl.sum(equal, 0), equals_left)
        kept = there & (chosen | _forced(forced_ptr, columns, n_k))
        if lists_ptr is not None:
            place = written + tl.cumsum(kept.to(tl.int32), 0) - 1
            tl.store(lists_ptr + line * list_width + place, columns, mask=kept & (place < list_width))
            written += tl.sum(kept.to(tl.int32), 0)
            sizes = tl.load(log_sizes_ptr + columns, mask=there, other=0.0)
            rest = tl.where(there & (kept == 0), scores * LOG2_E + sizes, -float("inf"))
            higher = tl.maximum(best, tl.max(rest, 0))
            shift = tl.where(higher == -float("inf"), 0.0, higher)
            total = total * tl.exp2(best - shift) + tl.sum(tl.exp2(rest - shift), 0)
            best = higher
        else:
            mass += tl.sum(tl.where(kept, scores, 0.0), 0)
            word = kept.reshape(CHUNK // 32, 32).to(tl.int32) << tl.arange(0, 32)[None, :]
            at = start // 32 + tl.arange(0, CHUNK // 32)
            tl.store(bits_ptr + (line * choices + choice) * words + at, tl.sum(word, 1), mask=at < words)
    if lists_ptr is not None:
        for start in range(written, list_width, CHUNK):
            place = start + lanes
            tl.store(lists_ptr + line * list_width + place, tl.zeros_like(place) + n_k, mask=place < list_width)
        tl.store(counts_ptr + line, tl.minimum(written, list_width))
        tl.store(tail_ptr + line, tl.where(total > 0, (best + tl.log2(total)) * LN_2, -float("inf")))
    else:
        tl.store(kept_mass_ptr + line * choices + choice, mass)


@kernel
def _unpack(bits_ptr, lists_ptr, counts_ptr, n_k, list_width, words, CHUNK: tl.constexpr):
    """Bit masks back into sorted lists: one program per row."""
    line = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, CHUNK)
    written = 0
    for start in range(0, n_k, CHUNK):
        columns = start + lanes
        word = tl.load(bits_ptr + line * words + columns // 32, mask=columns < n_k, other=0)
        kept = (word >> (columns % 32)) & 1
        place = written + tl.cumsum(kept, 0) - 1
        tl.store(lists_ptr + line * list_width + place, columns, mask=(kept > 0) & (place < list_width))
        written += tl.sum(kept, 0)
    written = tl.minimum(written, list_width)
    for start in range(written, list_width, CHUNK):
        place = start + lanes
        tl.store(lists_ptr + line * list_width + place, tl.zeros_like(place) + n_k, mask=place < list_width)
    tl.store(counts_ptr + line, written)


@kernel
def _mass(
    q_ptr, k_ptr, lse_ptr, mass_ptr, q_table_ptr, k_table_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, heads, first_head, q_tokens, k_tokens, n_q, n_k, scale,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Softmax mass `(n_q, n_k)` of every block pair, for the heads from first_head on; lse from a dense pass."""
    q_block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64) + first_head
    b, h = head // heads, head % heads
    k_ptr += b * k_batch * 8 + h * k_head * 8
    mass_ptr += (tl.program_id(1).to(tl.int64) * n_q + q_block) * n_k
    q_rows = block_rows(q_table_ptr, q_block, q_tokens, BLOCK_Q)
    q = load_rows(q_ptr + b * q_batch * 8 + h * q_head * 8, q_rows, q_row, D, DP)
    lse = tl.load(lse_ptr + head * q_tokens + q_rows, mask=q_rows >= 0, other=float("inf")) * LOG2_E
    for k_block in range(0, n_k):
        rows = block_rows(k_table_ptr, k_block, k_tokens, BLOCK_K)
        k = load_rows(k_ptr, rows, k_row, D, DP)
        scores = tl.dot(q, k.T) * (scale * LOG2_E)
        weights = tl.where((rows >= 0)[None, :], tl.exp2(scores - lse[:, None]), 0.0)
        tl.store(mass_ptr + k_block, tl.sum(weights))
