"""Dense and block-sparse attention, forward; an epilogue may be added before anything is written.

One program per query block and head goes through the key blocks that the block keeps. Its epilogue
may add the background, in registers; see `_forward`. A whole call of the training-free method moves
these rows of D numbers per token and head (D = 128, half precision: 256 bytes a row):

    block_pool           read q                      1 row
    block_pool_state     read k, v                   2 rows
    this kernel          read q, k, v; write out     4 rows   a low-rank branch reads q once more
    floor                read q, k, v; write out     4 rows

With the small tensors 2,042 bytes at 75,600 tokens and key blocks of 64, against a floor of 1,024
(benchmarks/traffic.py; a test counts the rows load by load): routing needs every key before the
first query block can start, so q, k and v are read twice. k and v are counted once here; each query
block that keeps them reads them again, from the cache as far as it holds. Sparse output and
background never travel to memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..pytorch.common import empty_nhd
from ..types import BlockMask, FeatureMap, LinearState, PooledKV, TokenBlocks
from .features import ACT_NUMBERS, add_linear, feature_tile
from .launch import (
    aligned,
    as_operand,
    kernel,
    launch_options,
    map_pointers,
    padded,
    pe_rows,
    strides,
    table,
)
from .tiles import (
    LN_2,
    LOG2_E,
    STRIDE_UNIT,
    any_missing,
    block_tokens,
    head_ptr,
    kept_tokens,
    list_of,
    load_rows,
    softmax_step,
    store_rows,
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


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_blocks: TokenBlocks | None,
    scale: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.dense_attention`."""
    out = empty_nhd(q, q.shape[2]) if out is None else out
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    kv_table = None if kv_blocks is None else table(kv_blocks)
    block_k = BLOCK if kv_blocks is None else kv_blocks.block_size
    blocks = Tables(None, kv_table, None, None, None, BLOCK, block_k)
    launch(q, k, v, blocks, scale, out, lse)
    return out, lse


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    pooled: PooledKV | None,
    scale: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.block_sparse_attention`; pooled keys and values enter in q's dtype."""
    out = empty_nhd(q, q.shape[2]) if out is None else out
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    far = None
    if pooled is not None:
        log_sizes = mask.kv_blocks.sizes.float().log2()
        far = (*(x.to(q.dtype).contiguous() for x in pooled), log_sizes)
    launch(q, k, v, Tables.of(mask), scale, out, lse, far)
    return out, lse


class Tables(NamedTuple):
    """Blocks and lists as the kernels take them; None: blocks in token order, every block kept."""

    q_table: Tensor | None
    kv_table: Tensor | None
    lists: Tensor | None
    counts: Tensor | None
    starts: Tensor | None
    block_q: int
    block_k: int

    @classmethod
    def of(cls, mask: BlockMask) -> Tables:
        q_blocks, kv_blocks = mask.q_blocks, mask.kv_blocks
        lists, counts = mask.kv_indices.contiguous(), mask.kv_num_blocks.contiguous()
        return cls(
            table(q_blocks),
            table(kv_blocks),
            lists,
            counts,
            None if mask.packing is None else mask.packing.starts,
            q_blocks.block_size,
            kv_blocks.block_size,
        )

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
) -> None:
    """Run the forward kernel; what is None leaves its code out."""
    batch, heads, tokens, head_dim = q.shape
    q, k, v = aligned(q), aligned(k), aligned(v)
    target = out if aligned(out) is out else empty_nhd(q, tokens)
    n_q, n_k = tables.counts_for(tokens, k.shape[2])
    kind = "pooled" if pooled is not None else epilogue.kind
    if tables.tile_k > tables.block_k and kind in ("pooled", "linear"):
        kind = f"fine_{kind}"
    mixing = epilogue.mixing or (None,) * 7
    feature_map, rank, state = FeatureMap("softmax"), 0, (None,) * 5
    if epilogue.linear is not None:
        feature_map, linear, branch_scale = epilogue.linear
        rank = linear.kv_state.shape[2]
        matrix, matrix_scale = normalised(linear.kv_state.float(), q.dtype)
        eps = torch.full_like(matrix_scale, linear.eps)
        state = (matrix, matrix_scale, linear.normalizer.float(), eps, branch_scale)
    _forward[(n_q, batch * heads)](
        q,
        k,
        v,
        target,
        lse,
        *tables[:5],
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
        DP=padded(head_dim),
        RP=padded(rank or 1),
        BLOCK_Q=tables.block_q,
        BLOCK_K=tables.block_k,
        TILE_K=tables.tile_k,
        ACT=ACT_NUMBERS[feature_map.act],
        **launch_options(kind),
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
    # blocks and lists: without lists every block is kept; starts: of packed lists
    q_table_ptr, kv_table_ptr, lists_ptr, counts_ptr, starts_ptr,
    # one pooled pseudo-key per dropped block
    pooled_k_ptr, pooled_v_ptr, log_sizes_ptr,
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
    D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Every group of pointers is optional: None leaves its code out.

    Mixing: out = (1 - g) sparse + g background, g = sigmoid(slope (dropped_lse - LSE) + bias +
    logits), background = v_mean + q M [+ branch_scale (low rank - v_mean)]. Without it, kv_state
    ... out_bias: out = sparse + linear + out_bias (SLA).
    """
    q_block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    q_ptr = head_ptr(q_ptr, b, h, q_batch, q_head)
    k_ptr = head_ptr(k_ptr, b, h, k_batch, k_head)
    v_ptr = head_ptr(v_ptr, b, h, v_batch, v_head)
    out_ptr = head_ptr(out_ptr, b, h, out_batch, out_head)
    line = head * n_q + q_block
    if lists_ptr is None:
        count = n_k
    else:
        count = tl.load(counts_ptr + line)
        lists_ptr = list_of(lists_ptr, starts_ptr, line, n_q, list_width)

    q_rows = block_tokens(q_table_ptr, q_block, q_tokens, BLOCK_Q)
    q = load_rows(q_ptr, q_rows, q_row, D, DP)
    log2_scale = scale * LOG2_E
    m = tl.full((BLOCK_Q,), -float("inf"), tl.float32)  # running maximum
    l = tl.zeros((BLOCK_Q,), tl.float32)  # running sum  # noqa: E741
    acc = tl.zeros((BLOCK_Q, DP), tl.float32)
    for i in range(0, count, TILE_K // BLOCK_K):
        rows, block = kept_tokens(kv_table_ptr, lists_ptr, i, count, k_tokens, BLOCK_K, TILE_K)
        k = load_rows(k_ptr, rows, k_row, D, DP)
        scores = tl.dot(q, k.T) * log2_scale
        if any_missing(kv_table_ptr, rows, block, k_tokens, BLOCK_K, TILE_K):
            scores = tl.where((rows >= 0)[None, :], scores, -float("inf"))
        v = load_rows(v_ptr, rows, v_row, D, DP)
        m, l, acc = softmax_step(scores, v, m, l, acc)  # noqa: E741

    if pooled_k_ptr is not None:
        offset = 0  # list entries before this tile: the list is sorted
        for start in range(0, n_k, TILE_K):
            blocks = start + tl.arange(0, TILE_K)
            place = offset + tl.arange(0, TILE_K)
            listed = tl.load(lists_ptr + place, mask=place < count, other=n_k).to(tl.int32)
            kept = tl.max((listed[:, None] == blocks[None, :]).to(tl.int32), 0) > 0
            offset += tl.sum((listed < start + TILE_K).to(tl.int32), 0)
            dropped = (blocks < n_k) & (kept == 0)
            rows = tl.where(blocks < n_k, blocks, -1)
            k = load_rows(pooled_k_ptr + head * n_k * D, rows, D // STRIDE_UNIT, D, DP)
            sizes = tl.load(log_sizes_ptr + blocks, mask=blocks < n_k, other=0.0)
            scores = tl.dot(q, k.T) * log2_scale + sizes[None, :]
            scores = tl.where(dropped[None, :], scores, -float("inf"))
            v = load_rows(pooled_v_ptr + head * n_k * D, rows, D // STRIDE_UNIT, D, DP)
            m, l, acc = softmax_step(scores, v, m, l, acc)  # noqa: E741

    lse = tl.where(l > 0, (m + tl.log2(l)) * LN_2, -float("inf"))
    if lse_ptr is not None:
        tl.store(lse_ptr + head * q_tokens + q_rows, lse, mask=q_rows >= 0)
    inv_l = 1.0 / tl.where(l > 0, l, 1.0)
    q_rows = block_tokens(q_table_ptr, q_block, q_tokens, BLOCK_Q, RELOAD=True)
    channels = tl.arange(0, DP)
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
        mean = tl.load(v_mean_ptr + head * D + channels, mask=channels < D, other=0.0)
        if kv_state_ptr is not None:
            branch_scale = tl.load(branch_scale_ptr + h)
            mean = mean * (1.0 - branch_scale)
        # The gate goes into q and into phi, so every product adds to the one tile that is there.
        size = tl.load(matrix_scale_ptr + head)
        acc = (acc * (inv_l * (1.0 - gate))[:, None] + gate[:, None] * mean[None, :]) / size
        mask = (channels < D)[:, None] & (channels < D)[None, :]
        offsets = channels[:, None] * D + channels[None, :]
        matrix = tl.load((matrix_ptr + head * D * D) + offsets, mask=mask, other=0.0)
        acc = tl.dot((q.to(tl.float32) * gate[:, None]).to(matrix.dtype), matrix, acc) * size
        share = gate
        if kv_state_ptr is not None:
            share = gate * branch_scale
    else:
        acc = acc * inv_l[:, None]
        share = tl.full((BLOCK_Q,), 1.0, tl.float32)
        if out_bias_ptr is not None:
            acc += tl.load(out_bias_ptr + channels, mask=channels < D, other=0.0)[None, :]
    if kv_state_ptr is not None:
        phi = feature_tile(
            q_ptr, q_rows, q_row, h, proj_ptr, cos_ptr, sin_ptr, pe_ptr, axis_ids_ptr, pe_rows,
            rank, D, DP, RP, BLOCK_Q, ACT,
        )  # fmt: skip
        acc = add_linear(
            acc, phi, share, head, kv_state_ptr, kv_state_scale_ptr, normalizer_ptr, eps_ptr, rank,
            D, DP, RP,
        )  # fmt: skip
    store_rows(out_ptr, q_rows, out_row, acc, D, DP)
