"""Dense and block-sparse attention, forward; an epilogue may be added before anything is written.

One program per query block and head goes through the key blocks that the block keeps. Its epilogue
may add the background, in registers; see `_forward`. A whole call of the training-free method moves
these rows of D numbers per token and head (D = 128, half precision: 256 bytes a row):

    block_pool           read q                      1 row
    block_pool_state     read k, v                   2 rows
    add_mapped           read v; write it            2 rows   where a calibration corrects itself
    this kernel          read q, k, v; write out     4 rows   a low-rank branch reads q once more
    floor                read q, k, v; write out     4 rows

With the small tensors 2,554 bytes at 75,600 tokens and key blocks of 64, against a floor of 1,024
(benchmarks/traffic.py; a test counts the rows load by load): routing needs every key before the
first query block can start, so q, k and v are read twice. k and v are counted once here; each query
block that keeps them reads them again, from the cache as far as it holds. Sparse output and
background never travel to memory.

Tiles of k and v are gathered through a table of tokens. In block order they would need none: of 445
instructions a turn (sm_90, key blocks of 16) 403 are left. But to put them there moves four rows
more, and the estimate (benchmarks/model.py) says that the turn takes no less time: it waits for the
cache and the tensor cores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..pytorch.common import empty_nhd
from ..types import (
    GAINS,
    BlockMask,
    EightBit,
    FeatureMap,
    LinearState,
    PooledKV,
    TokenBlocks,
)
from .eight_bit import (
    load_keys,
    load_values,
    plain_values,
    quantized_queries,
    score_of_mean,
    weighted,
)
from .features import ACT_NUMBERS, add_linear, feature_tile, linear_weights
from .launch import (
    aligned,
    as_operand,
    kernel,
    launch_of,
    launch_options,
    map_pointers,
    padded,
    pe_rows,
    strides,
    table,
)
from .split import merged, shares, split
from .tiles import (
    LN_2,
    LOG2_E,
    STRIDE_UNIT,
    block_tokens,
    full_tiles,
    head_ptr,
    kept_blocks,
    list_of,
    load_rows,
    softmax_weights,
    store_rows,
    tokens_of,
)

BLOCK = 64  # where the caller has no table
TILE = 64  # keys of one product at least


class Mixing(NamedTuple):
    """Gate and first-order background, as the kernel takes them; see `types.Background`."""

    dropped_lse: Tensor
    slope: Tensor
    bias: Tensor
    logits: Tensor | None
    matrix: Tensor  # (B, H, D, D), scaled
    matrix_scale: Tensor  # (B, H)
    v_mean: Tensor


class Linear(NamedTuple):
    """A linear branch: feature map of the queries, state, and its scale per head (None: 1)."""

    feature_map: FeatureMap
    state: LinearState
    scale: Tensor | None = None


class Epilogue(NamedTuple):
    """What the forward kernel adds to its output; kind names the launch parameters."""

    kind: str = "forward"
    mixing: Mixing | None = None
    linear: Linear | None = None
    bias: Tensor | None = None


NOTHING = Epilogue()
DENSE = Epilogue("dense")


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_blocks: TokenBlocks | None,
    scale: float,
    out: Tensor | None = None,
    eight_bit: EightBit | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.dense_attention`."""
    out = empty_nhd(q, q.shape[2]) if out is None else out
    blocks = Tables()
    if kv_blocks is not None:
        blocks = Tables(
            kv_table=table(kv_blocks), num_full=kv_blocks.num_full, block_k=kv_blocks.block_size
        )
    (batch, heads, tokens, _), keys = q.shape, k.shape[2]
    n_q, n_k = blocks.counts_for(tokens, keys)
    parts = shares(n_q * batch * heads, n_k * blocks.block_k, q.device)
    copies, each = q, out
    if parts > 1:
        blocks = blocks._replace(**split(q, BLOCK, n_k, parts)._asdict())
        copies, each = q.repeat(1, 1, parts, 1), empty_nhd(q, parts * tokens)
    lse = q.new_empty(copies.shape[:3], dtype=torch.float32)
    launch(copies, k, v, blocks, scale, each, lse, epilogue=DENSE, eight_bit=eight_bit)
    if parts == 1:
        return out, lse
    found, lse = merged(each, lse, parts)
    return out.copy_(found), lse


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    pooled: PooledKV | None,
    scale: float,
    out: Tensor | None = None,
    eight_bit: EightBit | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.block_sparse_attention`; pooled keys and values enter in q's dtype."""
    out = empty_nhd(q, q.shape[2]) if out is None else out
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    far = None
    if pooled is not None:
        # Sizes in 16 bits: no asynchronous copy is so small, so they take no buffer.
        sizes = mask.kv_blocks.sizes.short()
        far = (*(x.to(q.dtype).contiguous() for x in pooled), sizes)
    launch(q, k, v, Tables.of(mask), scale, out, lse, far, eight_bit=eight_bit)
    return out, lse


class Tables(NamedTuple):
    """Blocks and lists as the kernels take them; None: blocks in token order, every block kept."""

    q_table: Tensor | None = None
    kv_table: Tensor | None = None
    num_full: Tensor | None = None  # key blocks before the first with an empty slot
    lists: Tensor | None = None
    counts: Tensor | None = None
    starts: Tensor | None = None
    longest_first: Tensor | None = None  # the heads in the order in which they are begun
    block_q: int = BLOCK
    block_k: int = BLOCK

    @classmethod
    def of(cls, mask: BlockMask) -> Tables:
        q_blocks, kv_blocks = mask.q_blocks, mask.kv_blocks
        starts, longest_first, _ = mask.packing or (None, None, None)
        return cls(
            table(q_blocks),
            table(kv_blocks),
            kv_blocks.num_full,
            mask.kv_indices.contiguous(),
            mask.kv_num_blocks.contiguous(),
            starts,
            longest_first,
            q_blocks.block_size,
            kv_blocks.block_size,
        )

    @property
    def pointers(self) -> tuple[Tensor | None, ...]:
        return self[:7]

    @property
    def list_width(self) -> int:
        """Entries of every list; 0 where lists are packed, or none."""
        return 0 if self.lists is None or self.starts is not None else self.lists.shape[-1]

    @property
    def tile_k(self) -> int:
        """Keys of one product: a block, or several small ones."""
        return max(self.block_k, TILE)

    def counts_for(self, q_tokens: int, k_tokens: int) -> tuple[int, int]:
        """Number of query and of key blocks."""
        n_q = -(-q_tokens // self.block_q) if self.q_table is None else self.q_table.shape[0]
        n_k = -(-k_tokens // self.block_k) if self.kv_table is None else self.kv_table.shape[0]
        return n_q, n_k


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tables,
    scale: float,
    out: Tensor,
    lse: Tensor | None = None,
    pooled: tuple[Tensor, ...] | None = None,
    epilogue: Epilogue = NOTHING,
    eight_bit: EightBit | None = None,
    done: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Run the forward kernel; what is None leaves its code out.

    done: attention and its LSE, laid out as `out` is, to be given its epilogue.
    """
    batch, heads, tokens, head_dim = q.shape
    q, k, v = aligned(q), aligned(k), aligned(v)
    target = out if aligned(out) is out else empty_nhd(q, tokens)
    n_q, n_k = tables.counts_for(tokens, k.shape[2])
    kind = "pooled" if pooled is not None else epilogue.kind
    if tables.block_q > BLOCK:
        kind = f"wide {kind}"
    if eight_bit is not None:
        kind = f"8-bit {kind}"
    mixing = epilogue.mixing or (None,) * 7
    feature_map, rank, state = FeatureMap("softmax"), 0, (None,) * 5
    if epilogue.linear is not None:
        feature_map, linear, branch_scale = epilogue.linear
        rank = linear.kv_state.shape[2]
        matrix, matrix_scale = normalised(linear.kv_state.float(), q.dtype)
        eps = torch.full_like(matrix_scale, linear.eps)
        state = (matrix, matrix_scale, linear.normalizer.float(), eps, branch_scale)
    width = padded(head_dim)
    lean = launch_of(kind, width).lean
    _forward[(n_q, batch * heads)](
        q,
        k,
        v,
        target,
        lse,
        *tables.pointers,
        *(eight_bit or (None,) * 6),
        *(done or (None,) * 2),
        *(pooled or (None,) * 3),
        *map(as_operand, mixing),
        as_operand(epilogue.bias),
        *map_pointers(feature_map),
        *map(as_operand, state),
        *strides(q),
        *strides(k),
        *strides(v),
        *strides(target),
        heads,
        tokens,
        k.shape[2],
        n_q,
        n_k,
        tables.list_width,
        rank,
        pe_rows(feature_map),
        scale,
        D=head_dim,
        DP=width,
        VP=width // 2 if lean and tables.block_q < width else width,
        RP=padded(rank or 1),
        BLOCK_Q=tables.block_q,
        BLOCK_K=tables.block_k,
        TILE_K=tables.tile_k,
        ACT=ACT_NUMBERS[feature_map.act],
        LEAN=lean,
        GAIN=0.0 if eight_bit is None else GAINS[eight_bit.v.dtype],
        **launch_options(kind, width),
    )
    if target is not out:
        out.copy_(target)


def normalised(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix per head scaled to at most 1, so that half precision holds it; its scale `(B, H)`.

    The scale is a power of two: what is divided and multiplied by it comes back bit for bit.
    """
    size = torch.exp2(matrix.abs().amax(dim=(-2, -1)).clamp(min=1e-30).log2().ceil())
    return (matrix / size[..., None, None]).to(dtype).contiguous(), size


@kernel
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    # blocks and lists: without lists every block is kept; starts, longest_first: of packed lists
    q_table_ptr, kv_table_ptr, num_full_ptr, lists_ptr, counts_ptr, starts_ptr, longest_first_ptr,
    # keys and values in 8 bits, in block order: read instead of k and v
    k8_ptr, k_scale_ptr, k_mean_ptr, v8_ptr, v_scale_ptr, v8_mean_ptr,
    # attention that is there already: only the epilogue is left to do
    done_ptr, done_lse_ptr,
    # one pooled pseudo-key per dropped block
    pooled_k_ptr, pooled_v_ptr, sizes_ptr,
    # mixing by mass
    dropped_lse_ptr, slope_ptr, bias_ptr, logits_ptr, matrix_ptr, matrix_scale_ptr, v_mean_ptr,
    # SLA's bias
    out_bias_ptr,
    # linear branch: feature map, state
    proj_ptr, cos_ptr, sin_ptr, pe_ptr, axis_ids_ptr,
    kv_state_ptr, kv_state_scale_ptr, normalizer_ptr, eps_ptr, branch_scale_ptr,
    # strides
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, out_batch, out_head, out_row,
    # sizes
    heads, q_tokens, k_tokens, n_q, n_k, list_width, rank, pe_rows, scale,
    D: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, RP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr, ACT: tl.constexpr,
    LEAN: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """Every group of pointers is optional: None leaves its code out.

    Mixing: out = (1 - g) sparse + g background, g = sigmoid(slope (dropped_lse - LSE) + bias +
    logits), background = v_mean + q M [+ branch_scale (low rank - v_mean)]. Without it, kv_state
    ... out_bias: out = sparse + linear + out_bias (SLA).

    LEAN: for chips whose products read and write registers. VP < DP there: values come in two
    halves of their channels. With fewer rows than channels the compiler would spread a product with
    all of them over the warps by columns, and send the weights of every tile through shared memory.
    """
    q_block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    if longest_first_ptr is not None:
        head = tl.load(longest_first_ptr + head).to(tl.int64)
    b, h = head // heads, head % heads
    q_ptr = head_ptr(q_ptr, b, h, q_batch, q_head)
    k_ptr = head_ptr(k_ptr, b, h, k_batch, k_head)
    v_ptr = head_ptr(v_ptr, b, h, v_batch, v_head)
    out_ptr = head_ptr(out_ptr, b, h, out_batch, out_head)
    if done_ptr is not None:  # laid out as the result is
        done_ptr = head_ptr(done_ptr, b, h, out_batch, out_head)
    line = head * n_q + q_block
    if done_ptr is not None:
        count = 0
    elif lists_ptr is None:
        count = n_k
    else:
        count = tl.load(counts_ptr + line)
        lists_ptr = list_of(lists_ptr, starts_ptr, line, n_q, list_width)
    full = 0
    if done_ptr is None:
        full = full_tiles(lists_ptr, num_full_ptr, count, n_k, k_tokens, BLOCK_K, TILE_K)

    q_rows = block_tokens(q_table_ptr, q_block, q_tokens, BLOCK_Q)
    q = load_rows(q_ptr, q_rows, q_row, D, DP)
    log2_scale = scale * LOG2_E
    EACH: tl.constexpr = TILE_K // BLOCK_K
    m = tl.full((BLOCK_Q,), -float("inf"), tl.float32)  # running maximum
    l = tl.zeros((BLOCK_Q,), tl.float32)  # running sum  # noqa: E741
    acc = tl.zeros((BLOCK_Q, VP), tl.float32)
    acc_1 = tl.zeros((BLOCK_Q, VP), tl.float32)
    # Two loops each: what a short block needs would slow every tile down.
    if done_ptr is not None:
        acc = load_rows(done_ptr, q_rows, out_row, D, VP).to(tl.float32)
        if VP < DP:
            acc_1 = load_rows(done_ptr, q_rows, out_row, D, VP, VP).to(tl.float32)
        m = tl.load(done_lse_ptr + head * q_tokens + q_rows, mask=q_rows >= 0, other=0.0) * LOG2_E
        l = tl.where(m > -float("inf"), 1.0, 0.0)  # noqa: E741
    elif k8_ptr is None:
        for i in tl.range(0, full, EACH):
            block = kept_blocks(lists_ptr, i, count, BLOCK_K, TILE_K, True)
            rows = tokens_of(kv_table_ptr, block, i, count, k_tokens, BLOCK_K, TILE_K, True)
            k = load_rows(k_ptr, rows, k_row, D, DP, FULL=True)
            v = load_rows(v_ptr, rows, v_row, D, VP, FULL=True)
            if VP < DP:
                v_1 = load_rows(v_ptr, rows, v_row, D, VP, VP, True)
            scores = tl.dot(q, k.T)
            weights, fade, m, l = softmax_weights(scores, log2_scale, m, l, False)  # noqa: E741
            acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None])
            if VP < DP:
                acc_1 = tl.dot(weights.to(v.dtype), v_1, acc_1 * fade[:, None])
        for i in tl.range(full, count, EACH, num_stages=1):
            block = kept_blocks(lists_ptr, i, count, BLOCK_K, TILE_K, False)
            rows = tokens_of(kv_table_ptr, block, i, count, k_tokens, BLOCK_K, TILE_K, False)
            k = load_rows(k_ptr, rows, k_row, D, DP)
            scores = tl.where((rows >= 0)[None, :], tl.dot(q, k.T), -float("inf"))
            weights, fade, m, l = softmax_weights(scores, log2_scale, m, l, True)  # noqa: E741
            v = load_rows(v_ptr, rows, v_row, D, VP)
            acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None])
            if VP < DP:
                v = load_rows(v_ptr, rows, v_row, D, VP, VP)
                acc_1 = tl.dot(weights.to(v.dtype), v, acc_1 * fade[:, None])
        m = m * log2_scale
    else:
        k8_ptr += head * n_k * (BLOCK_K * D)
        v8_ptr += head * n_k * (BLOCK_K * D)
        k_scale_ptr += head * n_k
        k_mean_ptr += head * D
        q8, q_scale = quantized_queries(q)
        row_scale = q_scale * log2_scale
        if VP == DP:
            of_mean = score_of_mean(q, k_mean_ptr, D, 0)
        inside = tl.arange(0, TILE_K) % BLOCK_K
        for i in tl.range(0, full, EACH):
            block = kept_blocks(lists_ptr, i, count, BLOCK_K, TILE_K, True)
            slots = block * BLOCK_K + inside
            k = load_keys(k8_ptr, slots, D, DP)
            k_scale = tl.load(k_scale_ptr + block + inside * 0)
            v = load_values(v8_ptr, block, D, VP, 0, BLOCK_K, TILE_K)
            if VP < DP:
                v_1 = load_values(v8_ptr, block, D, VP, VP, BLOCK_K, TILE_K)
            scores = tl.dot(q8, k.T).to(tl.float32) * k_scale[None, :]
            weights, fade, m, l = softmax_weights(  # noqa: E741
                scores, row_scale, m, l, False, GAIN, True
            )
            acc = acc * fade[:, None] + weighted(weights, v)
            if VP < DP:
                acc_1 = acc_1 * fade[:, None] + weighted(weights, v_1)
        for i in tl.range(full, count, EACH, num_stages=1):
            block = kept_blocks(lists_ptr, i, count, BLOCK_K, TILE_K, False)
            rows = tokens_of(kv_table_ptr, block, i, count, k_tokens, BLOCK_K, TILE_K, False)
            slots = block * BLOCK_K + inside
            k = load_keys(k8_ptr, slots, D, DP)
            k_scale = tl.load(k_scale_ptr + block + inside * 0)
            scores = tl.dot(q8, k.T).to(tl.float32) * k_scale[None, :]
            scores = tl.where((rows >= 0)[None, :], scores, -float("inf"))
            weights, fade, m, l = softmax_weights(  # noqa: E741
                scores, row_scale, m, l, True, GAIN, True
            )
            v = load_values(v8_ptr, block, D, VP, 0, BLOCK_K, TILE_K)
            acc = acc * fade[:, None] + weighted(weights, v)
            if VP < DP:
                v = load_values(v8_ptr, block, D, VP, VP, BLOCK_K, TILE_K)
                acc_1 = acc_1 * fade[:, None] + weighted(weights, v)
        if VP < DP:  # q is read anew: there are no registers for a row's number during the loop
            q_rows = block_tokens(q_table_ptr, q_block, q_tokens, BLOCK_Q, RELOAD=True)
            of_mean = tl.zeros((BLOCK_Q,), tl.float32)
            for first in tl.static_range(0, DP, 32):
                part = load_rows(q_ptr, q_rows, q_row, D, 32, first)
                of_mean += score_of_mean(part, k_mean_ptr, D, first)
        # Back to plain units: what follows continues the same softmax in 16 bits.
        m = m * row_scale + of_mean * log2_scale
        # Rounding to integers swallows what is not finite; it has to show in the result.
        l = tl.where(m < float("inf"), l, float("nan"))  # noqa: E741
        SMALL: tl.constexpr = 2.0**-GAIN
        l *= SMALL  # noqa: E741
        acc = plain_values(acc, l, v_scale_ptr + head * D, v8_mean_ptr + head * D, SMALL, D, VP, 0)
        if VP < DP:
            acc_1 = plain_values(
                acc_1, l, v_scale_ptr + head * D, v8_mean_ptr + head * D, SMALL, D, VP, VP
            )

    if pooled_k_ptr is not None:
        if k8_ptr is not None:  # read anew: they would fill registers all through the loop
            q_rows = block_tokens(q_table_ptr, q_block, q_tokens, BLOCK_Q, RELOAD=True)
            q = load_rows(q_ptr, q_rows, q_row, D, DP)
        PIECE: tl.constexpr = TILE_K // 2 if LEAN else TILE_K
        plain = tl.full((), 1.0, tl.float32)  # these scores are in log2 units already
        offset = 0  # list entries before this tile: the list is sorted
        for start in tl.range(0, n_k, PIECE, num_stages=2):
            blocks = start + tl.arange(0, PIECE)
            place = offset + tl.arange(0, PIECE)
            listed = tl.load(lists_ptr + place, mask=place < count, other=n_k).to(tl.int32)
            kept = tl.max((listed[:, None] == blocks[None, :]).to(tl.int32), 0) > 0
            offset += tl.sum((listed < start + PIECE).to(tl.int32), 0)
            dropped = (blocks < n_k) & (kept == 0)
            rows = tl.where(blocks < n_k, blocks, -1)
            k = load_rows(pooled_k_ptr + head * n_k * D, rows, D // STRIDE_UNIT, D, DP)
            sizes = tl.load(sizes_ptr + blocks, mask=blocks < n_k, other=1).to(tl.float32)
            scores = tl.dot(q, k.T) * log2_scale + tl.log2(sizes)[None, :]
            scores = tl.where(dropped[None, :], scores, -float("inf"))
            weights, fade, m, l = softmax_weights(scores, plain, m, l, True)  # noqa: E741
            pooled_v = pooled_v_ptr + head * n_k * D
            v = load_rows(pooled_v, rows, D // STRIDE_UNIT, D, VP)
            acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None])
            if VP < DP:
                v = load_rows(pooled_v, rows, D // STRIDE_UNIT, D, VP, VP)
                acc_1 = tl.dot(weights.to(v.dtype), v, acc_1 * fade[:, None])

    lse = tl.where(l > 0, (m + tl.log2(l)) * LN_2, -float("inf"))
    if lse_ptr is not None:
        tl.store(lse_ptr + head * q_tokens + q_rows, lse, mask=q_rows >= 0)
    inv_l = 1.0 / tl.where(l > 0, l, 1.0)
    q_rows = block_tokens(q_table_ptr, q_block, q_tokens, BLOCK_Q, RELOAD=True)
    # The gate goes into q and into phi, so every product adds to the one tile that is there.
    sparse_share, mean_share = inv_l, inv_l
    share = tl.full((BLOCK_Q,), 1.0, tl.float32)
    if dropped_lse_ptr is not None:
        dropped_lse = tl.load(dropped_lse_ptr + line)
        # A row that keeps nothing has LSE -inf; the bound keeps slope 0 from making 0 * inf of it.
        gate_logits = tl.load(slope_ptr + head) * (dropped_lse - tl.maximum(lse, -1e30))
        gate_logits += tl.load(bias_ptr + head)
        if logits_ptr is not None:
            gate_logits += tl.load(
                logits_ptr + head * q_tokens + q_rows, mask=q_rows >= 0, other=0.0
            )
        gate = tl.where(lse == -float("inf"), 1.0, tl.sigmoid(gate_logits))
        gate = tl.where(dropped_lse == -float("inf"), 0.0, gate)
        sparse_share, mean_share, share = inv_l * (1.0 - gate), gate, gate
        if kv_state_ptr is not None:
            branch_scale = tl.load(branch_scale_ptr + h)
            mean_share, share = gate * (1.0 - branch_scale), gate * branch_scale
    if kv_state_ptr is not None:
        phi = feature_tile(
            q_ptr, q_rows, q_row, h, proj_ptr, cos_ptr, sin_ptr, pe_ptr, axis_ids_ptr, pe_rows,
            rank, D, DP, RP, BLOCK_Q, ACT,
        )  # fmt: skip
        phi = linear_weights(phi, share, head, normalizer_ptr, eps_ptr, rank, RP)
        phi = phi.to(kv_state_ptr.dtype.element_ty)
    if dropped_lse_ptr is not None:
        if LEAN:  # read anew: it would fill registers all through the loop
            q = load_rows(q_ptr, q_rows, q_row, D, DP)
        gated_q = (q.to(tl.float32) * gate[:, None]).to(matrix_ptr.dtype.element_ty)
    for piece in tl.static_range(DP // VP):
        if piece == 0:
            found = acc
        else:
            found = acc_1
        found = found * sparse_share[:, None]
        channels = piece * VP + tl.arange(0, VP)
        if dropped_lse_ptr is not None:
            mean = tl.load(v_mean_ptr + head * D + channels, mask=channels < D, other=0.0)
            size = tl.load(matrix_scale_ptr + head)
            inputs = tl.arange(0, DP)
            offsets = inputs[:, None] * D + channels[None, :]
            mask = (inputs < D)[:, None] & (channels < D)[None, :]
            matrix = tl.load((matrix_ptr + head * D * D) + offsets, mask=mask, other=0.0)
            found = (found + mean_share[:, None] * mean[None, :]) / size
            found = tl.dot(gated_q, matrix, found) * size
        if out_bias_ptr is not None:
            found += tl.load(out_bias_ptr + channels, mask=channels < D, other=0.0)[None, :]
        if kv_state_ptr is not None:
            found = add_linear(
                found, phi, head, kv_state_ptr, kv_state_scale_ptr, rank, D, VP, RP, piece * VP
            )
        store_rows(out_ptr, q_rows, out_row, found, D, VP, piece * VP)
