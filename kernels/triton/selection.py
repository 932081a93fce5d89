"""Choosing blocks: the best of each row by an exact threshold, as sorted lists or as bits.

The threshold is found on order-preserving integers, so a row of any length costs some six counting
passes over data that stays in the cache, whatever is kept. Equal scores at the threshold go to the
lower block number. Rows of scores are padded to whole chunks: every pass reads four at a time then.
"""

from __future__ import annotations

# Kernel bodies are Triton's own language, which a type checker takes for Python.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pytorch.common import head_chunks
from ..types import BlockLayout, Packing, list_dtype
from .launch import aligned, kernel, launch_options, padded, strides, table
from .tiles import LN_2, LOG2_E, block_tokens, head_ptr, list_of, load_rows

SELECT_CHUNK = 512
HALVING = tl.constexpr(8)  # every so many turns bounds are halved, whatever their counts promise
LEAST = tl.constexpr(-3.4028234663852886e38)
ABSENT, REQUIRED = tl.constexpr(0), tl.constexpr(0xFFFFFFFF)  # ranks below and above all others


def block_select(
    pooled_q: Tensor,
    pooled_k: Tensor,
    layout: BlockLayout,
    topk: int | Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.block_select`: -> kv_indices, kv_num_blocks, dropped_lse.

    kv_indices flat where topk has a number for each head. Scores are made for a few heads at a time
    and never kept.
    """
    batch, heads, n_q, _ = pooled_q.shape
    n_k = pooled_k.shape[2]
    q, k = (x.flatten(0, 1).float() for x in (pooled_q, pooled_k))
    list_width, starts, topks = 0, None, None
    if isinstance(topk, int):
        list_width = layout.list_width(topk)
        indices = q.new_empty(batch, heads, n_q, list_width, dtype=list_dtype(n_k))
    else:
        widths = layout.widths(topk)
        packing = Packing.of(widths, n_q, q.device)
        indices = q.new_empty(n_q * sum(widths), dtype=list_dtype(n_k))
        starts = packing.starts
        topks = numbers(tuple(topk), q.device)
        topk = 0
    counts = q.new_empty(batch, heads, n_q, dtype=torch.int32)
    dropped_lse = q.new_empty(batch, heads, n_q)
    log_sizes = layout.kv_blocks.log2_sizes
    required = layout.required_bytes
    width = row_width(n_k)
    for some in head_chunks(batch * heads, n_q * width):
        scores = q.new_empty(some.stop - some.start, n_q, width)
        torch.bmm(q[some] * scale, k[some].mT, out=scores[..., :n_k])
        _select_lists[(scores.shape[0] * n_q,)](
            scores,
            scores,
            required,
            log_sizes,
            indices,
            counts,
            dropped_lse,
            starts,
            topks,
            some.start * n_q,
            n_q,
            n_k,
            width // SELECT_CHUNK,
            topk,
            list_width,
            CHUNK=SELECT_CHUNK,
            **launch_options("select"),
        )
    return indices, counts, dropped_lse


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, layout: BlockLayout, topks: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """See `reference.block_mass`. Masses are made for a few heads at a time and never kept."""
    batch, heads, tokens, head_dim = q.shape
    q, k, lse = aligned(q), aligned(k), lse.contiguous()
    q_blocks, kv_blocks = layout.q_blocks, layout.kv_blocks
    q_table, kv_table = table(q_blocks), table(kv_blocks)
    n_q, n_k, choices = q_blocks.num_blocks, kv_blocks.num_blocks, len(topks)
    words = -(-n_k // 32)
    bits = q.new_empty(batch * heads, n_q, choices, words, dtype=torch.int32)
    kept_mass = q.new_empty(batch * heads, n_q, choices, dtype=torch.float32)
    all_mass = []
    wanted = numbers(tuple(topks), q.device)
    required = layout.required_bytes
    width = row_width(n_k)
    for some in head_chunks(batch * heads, n_q * width):
        mass = q.new_empty(some.stop - some.start, n_q, width, dtype=torch.float32)
        _mass[(n_q, mass.shape[0])](
            q,
            k,
            lse,
            mass,
            q_table,
            kv_table,
            *strides(q),
            *strides(k),
            heads,
            some.start,
            tokens,
            k.shape[2],
            n_q,
            n_k,
            width,
            scale,
            D=head_dim,
            DP=padded(head_dim),
            BLOCK_Q=q_blocks.block_size,
            BLOCK_K=kv_blocks.block_size,
            **launch_options("mass"),
        )
        all_mass.append(mass[..., :n_k].sum(dim=(1, 2)))
        _select_bits[(mass.shape[0] * n_q, choices)](
            mass,
            required,
            wanted,
            bits,
            kept_mass,
            some.start * n_q,
            n_q,
            n_k,
            width // SELECT_CHUNK,
            words,
            choices,
            CHUNK=SELECT_CHUNK,
            **launch_options("select"),
        )
    bits, kept_mass = (x.unflatten(0, (batch, heads)).movedim(3, 2) for x in (bits, kept_mass))
    return bits.contiguous(), kept_mass.sum(dim=-1) / torch.cat(all_mass).view(batch, heads, 1)


def lists_from_bits(bits: Tensor, blocks: int, list_width: int) -> tuple[Tensor, Tensor]:
    """Bits `(..., words)` -> ascending lists `(..., list_width)` and their lengths."""
    bits = bits.contiguous()
    rows = bits.shape[:-1]
    indices = bits.new_empty(*rows, list_width, dtype=list_dtype(blocks))
    counts = bits.new_empty(rows)
    _unpack[(counts.numel(),)](
        bits,
        indices,
        counts,
        blocks,
        list_width,
        bits.shape[-1],
        CHUNK=SELECT_CHUNK,
        **launch_options("select"),
    )
    return indices, counts


def row_width(n_k: int) -> int:
    """What a row of `n_k` scores takes: whole chunks, so that a pass has nothing to leave out."""
    return -(-n_k // SELECT_CHUNK) * SELECT_CHUNK


@lru_cache(maxsize=1024)
def numbers(values: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 on a device, made once: kernels read them, and nothing else does."""
    return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)


@triton.jit
def _rank(scores):
    """The order of scores as uint32; ABSENT and REQUIRED are those of what is no number."""
    bits = scores.to(tl.int32, bitcast=True)
    below_zero = (bits >> 31).to(tl.uint32, bitcast=True)  # all bits or none
    return bits.to(tl.uint32, bitcast=True) ^ (below_zero | 0x80000000)


@triton.jit
def _score(rank):
    """The score of a rank; nothing sensible for ABSENT and REQUIRED."""
    above_zero = (rank.to(tl.int32, bitcast=True) >> 31).to(tl.uint32, bitcast=True)
    bits = rank ^ ((above_zero ^ 0xFFFFFFFF) | 0x80000000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _first_look(scores_ptr, required_ptr, columns, n_k):
    """A row's scores, their ranks, and which are free to be chosen.

    The others' ranks are REQUIRED, or ABSENT beyond n_k. What is no number is the least one, so
    that its rank is neither; -0 is 0.
    """
    scores = tl.load(scores_ptr + columns) + 0.0
    scores = tl.where(scores > LEAST, scores, LEAST)
    there = columns < n_k
    free, ranks = there, _rank(scores)
    if required_ptr is not None:
        required = tl.load(required_ptr + columns, mask=there, other=0) != 0
        free = there & (required == 0)
        ranks = tl.where(required, REQUIRED, ranks)
    return scores, tl.where(there, ranks, ABSENT), free


@triton.jit
def _ranks(scores_ptr, required_ptr, columns, n_k, READY: tl.constexpr):
    """The ranks of a row's scores. READY: they are there already, in the place of the scores."""
    if READY:
        ranks = tl.load(scores_ptr + columns).to(tl.uint32, bitcast=True)
    else:
        _, ranks, _ = _first_look(scores_ptr, required_ptr, columns, n_k)
    return ranks


@triton.jit
def _by_lane(x, CHUNK: tl.constexpr):
    """A chunk as `(CHUNK // 128, 32, 4)`: a lane, which reads four, sums over 2 and 0 by itself."""
    return x.reshape(CHUNK // 128, 32, 4)


@triton.jit
def _bounds(scores_ptr, required_ptr, n_k, CHUNK: tl.constexpr, REPLACE: tl.constexpr):
    """Least and largest rank of a row, how many are free, the sums of their scores and squares.

    REPLACE: the scores by ranks.
    """
    lanes = tl.arange(0, CHUNK)
    least, largest = tl.full((32,), REQUIRED, tl.uint32), tl.full((32,), ABSENT, tl.uint32)
    total, squares = tl.zeros((32,), tl.float32), tl.zeros((32,), tl.float32)
    count = tl.zeros((32,), tl.int32)
    for start in range(0, n_k, CHUNK):
        columns = start + lanes
        scores, ranks, free = _first_look(scores_ptr, required_ptr, columns, n_k)
        if REPLACE:
            tl.store(scores_ptr + columns, ranks.to(tl.float32, bitcast=True))
        low = _by_lane(tl.where(free, ranks, REQUIRED), CHUNK)
        high = _by_lane(tl.where(free, ranks, ABSENT), CHUNK)
        scores = _by_lane(tl.where(free, scores, 0.0), CHUNK)
        least = tl.minimum(least, tl.min(tl.min(low, 2), 0))
        largest = tl.maximum(largest, tl.max(tl.max(high, 2), 0))
        total += tl.sum(tl.sum(scores, 2), 0)
        squares += tl.sum(tl.sum(scores * scores, 2), 0)
        if required_ptr is not None:
            count += tl.sum(tl.sum(_by_lane(free.to(tl.int32), CHUNK), 2), 0)
    found = tl.sum(count, 0)
    if required_ptr is None:
        found = n_k
    return tl.min(least, 0), tl.max(largest, 0), found, tl.sum(total, 0), tl.sum(squares, 0)


@triton.jit
def _normal_quantile(share):
    """Where a standard normal number lies above with probability `share`; within 5e-4.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.2.23.
    """
    t = tl.sqrt(-2.0 * LN_2 * tl.log2(tl.minimum(share, 1.0 - share)))
    upper = 2.515517 + t * (0.802853 + t * 0.010328)
    z = t - upper / (1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308)))
    return tl.where(share <= 0.5, z, -z)


@triton.jit
def _threshold(
    scores_ptr, required_ptr, n_k, topk, bounds,
    CHUNK: tl.constexpr, READY: tl.constexpr,
):  # fmt: skip
    """A rank that a row's topk best reach, and how many of that very rank are not to be kept.

    Above it lie those that are required, which are no part of the topk.

    Between bounds whose counts are known, until a count is topk. The first guess takes scores for
    normally distributed; then the counts' logarithms are interpolated over scores, and where one
    bound stands still its weight is halved (the Illinois rule); now and then ranks are halved,
    which ends on whatever scores there are. Some six passes, where going bit by bit takes 32.
    """
    least, largest, count, total, squares = bounds
    required = n_k - count
    lanes = tl.arange(0, CHUNK)
    low, high = least.to(tl.int64), largest.to(tl.int64) + 1
    n_low = count
    if topk <= 0:
        low, n_low = high, topk
    if topk >= count:  # all there are
        n_low = topk
    wanted, numbers = topk.to(tl.float32), tl.maximum(count, 1).to(tl.float32)
    mean = total / numbers
    spread = tl.sqrt(tl.maximum(squares / numbers - mean * mean, 0.0))
    guess = mean + spread * _normal_quantile(wanted / numbers)
    above, below = tl.log2(numbers / wanted), tl.log2(0.5 / wanted)  # log of count / topk
    raised = low < 0  # whether the last turn raised the lower bound
    turn = 0
    while (n_low != topk) & (high - low > 1):
        ends = _score(low.to(tl.uint32)), _score(high.to(tl.uint32))
        found = tl.where(turn == 0, guess, ends[0] + (ends[1] - ends[0]) * above / (above - below))
        halve = (turn % HALVING == HALVING - 1) | (found - found != 0)  # or where it is infinite
        middle = tl.where(halve, (low + high) // 2, _rank(found).to(tl.int64))
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        reached = -required
        for start in range(0, n_k, CHUNK):
            ranks = _ranks(scores_ptr, required_ptr, start + lanes, n_k, READY)
            reached += tl.sum((ranks >= middle.to(tl.uint32)).to(tl.int32), 0)
        enough = reached >= topk
        own = tl.log2(tl.maximum(reached.to(tl.float32), 0.5) / wanted)
        again = (turn > 0) & (enough == raised)
        kept_above = tl.where(again, above * 0.5, above)
        kept_below = tl.where(again, below * 0.5, below)
        above, below = tl.where(enough, own, kept_above), tl.where(enough, kept_below, own)
        low, n_low = tl.where(enough, middle, low), tl.where(enough, reached, n_low)
        high = tl.where(enough, high, middle)
        raised = enough
        turn += 1
    return low.to(tl.uint32), tl.maximum(n_low - topk, 0)


@triton.jit
def _end_of_equals(
    scores_ptr, required_ptr, n_k, threshold, too_many, CHUNK: tl.constexpr, READY: tl.constexpr
):
    """From which column on the threshold's rank is one too many; n_k where it never is."""
    end = n_k
    if too_many > 0:
        lanes = tl.arange(0, CHUNK)
        left = -too_many
        for start in range(0, n_k, CHUNK):
            ranks = _ranks(scores_ptr, required_ptr, start + lanes, n_k, READY)
            left += tl.sum((ranks == threshold).to(tl.int32), 0)
        for start in range(0, n_k, CHUNK):
            columns = start + lanes
            ranks = _ranks(scores_ptr, required_ptr, columns, n_k, READY)
            equal = (ranks == threshold).to(tl.int32)
            beyond = (equal > 0) & (tl.cumsum(equal, 0) > left)
            end = tl.minimum(end, tl.min(tl.where(beyond, columns, n_k), 0))
            left -= tl.sum(equal, 0)
    return end


@triton.jit
def _kept(ranks, columns, threshold, end):
    """Which are kept: those that reach the threshold, and only before `end` those that equal it."""
    return (ranks >= threshold) & ((ranks != threshold) | (columns < end))


@triton.jit
def _counted(kept, CHUNK: tl.constexpr):
    """How many of a chunk `(CHUNK // 32, 32)` are kept before each, and altogether.

    Each row is counted in eight bits of a number of 32, so that one scan serves four rows.
    """
    WORDS: tl.constexpr = CHUNK // 128
    bits = 8 * tl.arange(0, 4).to(tl.uint32)[None, :, None]
    flags = kept.to(tl.uint32).reshape(WORDS, 4, 32)
    words = tl.sum(flags << bits, 1)
    totals = tl.sum(words, 1)
    rows_before = (totals << 8) + (totals << 16) + (totals << 24)  # 96 at most in each byte
    packed = tl.cumsum(words, 1) - words + rows_before[:, None]
    totals = (rows_before + totals) >> 24
    word, earlier = tl.arange(0, WORDS), tl.zeros_like(totals)
    for each in tl.static_range(WORDS - 1):
        earlier += tl.where(word > each, tl.sum(tl.where(word == each, totals, 0), 0), 0)
    before = ((packed[:, None, :] >> bits) & 255) + earlier[:, None, None]
    return before.reshape(CHUNK // 32, 32).to(tl.int32), tl.sum(totals, 0).to(tl.int32)


@kernel
def _select_lists(
    scores_ptr, ranks_single, required_ptr, log_sizes_single,
    lists_ptr, counts_ptr, dropped_lse_ptr, starts_ptr, topks_ptr,
    first_line, n_q, n_k, chunks, topk, list_width,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Kept blocks and the log-mass of the others: one program per row of scores, which become
    ranks; a row takes so many chunks.

    Scores hold some heads at a time; their first row is row first_line of the outputs. topks, where
    given, has a number for each head, and its lists lie packed from starts on. ranks: the same
    memory as scores, read by neighbouring lanes one by one, as lists are written.
    """
    line = tl.program_id(0).to(tl.int64)
    scores_ptr += line * chunks * CHUNK
    ranks_single += line * chunks * CHUNK
    if required_ptr is not None:
        required_ptr += (line % n_q) * n_k
    line += first_line
    if topks_ptr is not None:
        topk = tl.load(topks_ptr + line // n_q)
        first = tl.load(starts_ptr + line // n_q)
        list_width = ((tl.load(starts_ptr + line // n_q + 1) - first) // n_q).to(tl.int32)
    lists_ptr = list_of(lists_ptr, starts_ptr, line, n_q, list_width)
    bounds = _bounds(scores_ptr, required_ptr, n_k, CHUNK, True)
    tl.debug_barrier()  # the ranks that replace the scores are read back
    threshold, too_many = _threshold(scores_ptr, required_ptr, n_k, topk, bounds, CHUNK, True)
    if too_many > 0:  # of equals those that go become a little smaller
        end = _end_of_equals(scores_ptr, required_ptr, n_k, threshold, too_many, CHUNK, True)
        lanes = tl.arange(0, CHUNK)
        for start in range(end // CHUNK * CHUNK, n_k, CHUNK):
            columns = start + lanes
            ranks = _ranks(scores_ptr, required_ptr, columns, n_k, True)
            ranks -= ((ranks == threshold) & (columns >= end)).to(tl.uint32)
            tl.store(scores_ptr + columns, ranks.to(tl.float32, bitcast=True))
        tl.debug_barrier()

    written = 0
    running_max = tl.full((32,), -float("inf"), tl.float32)
    running_sum = tl.zeros((32,), tl.float32)
    lanes = tl.arange(0, CHUNK // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    for start in range(0, n_k, CHUNK):
        columns = start + lanes
        ranks = tl.load(ranks_single + columns).to(tl.uint32, bitcast=True)
        kept = ranks >= threshold
        before, of_chunk = _counted(kept, CHUNK)
        # Of numbers no more are kept than there is room for. (A mask of places costs a second sum.)
        place = tl.minimum(written + before, list_width - 1).reshape(CHUNK)
        tl.store(lists_ptr + place, columns.reshape(CHUNK), mask=kept.reshape(CHUNK))
        written += of_chunk
        dropped = (ranks != ABSENT) & (kept == 0)
        scores = _score(ranks) * LOG2_E
        scores += tl.load(log_sizes_single + columns, mask=dropped, other=0.0)
        scores = tl.where(dropped, scores, -float("inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 0))
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        running_sum *= tl.exp2(running_max - shift)
        running_sum += tl.sum(tl.exp2(scores - shift[None, :]), 0)
        running_max = new_max
    largest = tl.max(running_max, 0)
    largest = tl.where(largest == -float("inf"), 0.0, largest)
    total = tl.sum(running_sum * tl.exp2(running_max - largest), 0)
    lse = (largest + tl.log2(total)) * LN_2
    tl.store(dropped_lse_ptr + line, tl.where(total > 0, lse, -float("inf")))
    _fill(lists_ptr, written, list_width, n_k, CHUNK)
    tl.store(counts_ptr + line, tl.minimum(written, list_width))


@kernel
def _select_bits(
    mass_ptr, required_ptr, topks_ptr, bits_ptr, kept_mass_ptr,
    first_line, n_q, n_k, chunks, words, choices,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Masks of `words` int32, and the mass they keep: one program per row and choice of topk."""
    line = tl.program_id(0).to(tl.int64)
    choice = tl.program_id(1)
    mass_ptr += line * chunks * CHUNK
    if required_ptr is not None:
        required_ptr += (line % n_q) * n_k
    line = (line + first_line) * choices + choice
    lanes = tl.arange(0, CHUNK)
    topk = tl.load(topks_ptr + choice)
    bounds = _bounds(mass_ptr, required_ptr, n_k, CHUNK, False)
    threshold, too_many = _threshold(mass_ptr, required_ptr, n_k, topk, bounds, CHUNK, False)
    end = _end_of_equals(mass_ptr, required_ptr, n_k, threshold, too_many, CHUNK, False)

    kept_mass = 0.0
    for start in range(0, n_k, CHUNK):
        columns = start + lanes
        ranks = _ranks(mass_ptr, required_ptr, columns, n_k, False)
        kept = _kept(ranks, columns, threshold, end)
        mass = tl.load(mass_ptr + columns, mask=columns < n_k, other=0.0)
        kept_mass += tl.sum(tl.where(kept, mass, 0.0), 0)
        word = kept.reshape(CHUNK // 32, 32).to(tl.int32) << tl.arange(0, 32)[None, :]
        place = start // 32 + tl.arange(0, CHUNK // 32)
        tl.store(bits_ptr + line * words + place, tl.sum(word, 1), mask=place < words)
    tl.store(kept_mass_ptr + line, kept_mass)


@triton.jit
def _fill(lists_ptr, written, list_width, n_k, CHUNK: tl.constexpr):
    """n_k in the entries that a row does not use."""
    lanes = tl.arange(0, CHUNK)
    for start in range(written, list_width, CHUNK):
        place = start + lanes
        tl.store(lists_ptr + place, tl.zeros_like(place) + n_k, mask=place < list_width)


@kernel
def _unpack(
    bits_ptr, lists_ptr, counts_ptr,
    n_k, list_width, words,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Bit masks back into sorted lists: one program per row."""
    line = tl.program_id(0).to(tl.int64)
    lists_ptr += line * list_width
    lanes = tl.arange(0, CHUNK)
    written = 0
    for start in range(0, n_k, CHUNK):
        columns = start + lanes
        word = tl.load(bits_ptr + line * words + columns // 32, mask=columns < n_k, other=0)
        kept = (word >> (columns % 32)) & 1
        place = written + tl.cumsum(kept, 0) - 1
        tl.store(lists_ptr + place, columns, mask=(kept > 0) & (place < list_width))
        written += tl.sum(kept, 0)
    written = tl.minimum(written, list_width)
    _fill(lists_ptr, written, list_width, n_k, CHUNK)
    tl.store(counts_ptr + line, written)


@kernel
def _mass(
    q_ptr, k_ptr, lse_ptr, mass_ptr, q_table_ptr, kv_table_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    heads, first_head, q_tokens, k_tokens, n_q, n_k, width, scale,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Softmax mass `(n_q, n_k)` of every pair of blocks, for the heads from first_head on."""
    q_block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64) + first_head
    b, h = head // heads, head % heads
    k_ptr = head_ptr(k_ptr, b, h, k_batch, k_head)
    mass_ptr += (tl.program_id(1).to(tl.int64) * n_q + q_block) * width
    q_rows = block_tokens(q_table_ptr, q_block, q_tokens, BLOCK_Q)
    q = load_rows(head_ptr(q_ptr, b, h, q_batch, q_head), q_rows, q_row, D, DP)
    lse = tl.load(lse_ptr + head * q_tokens + q_rows, mask=q_rows >= 0, other=float("inf"))
    lse = lse * LOG2_E
    for kv_block in range(0, n_k):
        rows = block_tokens(kv_table_ptr, kv_block, k_tokens, BLOCK_K)
        k = load_rows(k_ptr, rows, k_row, D, DP)
        scores = tl.dot(q, k.T) * (scale * LOG2_E)
        weights = tl.where((rows >= 0)[None, :], tl.exp2(scores - lse[:, None]), 0.0)
        tl.store(mass_ptr + kv_block, tl.sum(weights))
