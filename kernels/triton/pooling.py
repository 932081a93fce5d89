"""Pooling and states, in one read each: block means, first-order state, low-rank state."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ..types import BlockLayout, FeatureMap, TokenBlocks
from .features import ACT_NUMBERS, feature_tile
from .launch import aligned, kernel, launch_options, map_pointers, padded, pe_rows, strides, table
from .tiles import block_tokens, head_ptr, load_rows

TOKENS_PER_PROGRAM = 4096  # tokens that one program sums into its part of a state
BLOCK = 64  # where the caller has no table


def block_pool(x: Tensor, blocks: TokenBlocks) -> Tensor:
    """See `reference.block_pool`."""
    batch, heads, tokens, head_dim = x.shape
    x, count = aligned(x), blocks.num_blocks
    means = x.new_empty(batch, heads, count, head_dim, dtype=torch.float32)
    _pool[(count, batch * heads)](
        x,
        means,
        table(blocks),
        *strides(x),
        heads,
        tokens,
        count,
        D=head_dim,
        DP=padded(head_dim),
        BLOCK=blocks.block_size,
        **launch_options("pool"),
    )
    return means


@kernel
def _pool(
    x_ptr, means_ptr, table_ptr,
    x_batch, x_head, x_row, heads, tokens, blocks,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Block means `(B, H, N, D)` float32: one program per block and head. Reads x once."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    x_ptr = head_ptr(x_ptr, head // heads, head % heads, x_batch, x_head)
    rows = block_tokens(table_ptr, block, tokens, BLOCK)
    size = tl.sum((rows >= 0).to(tl.float32), 0)
    mean = tl.sum(load_rows(x_ptr, rows, x_row, D, DP).to(tl.float32), 0) / size
    channels = tl.arange(0, DP)
    tl.store(means_ptr + (head * blocks + block) * D + channels, mean, mask=channels < D)


def block_pool_state(
    k: Tensor, v: Tensor, layout: BlockLayout, channel_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.block_pool_state`; the state is made of all channels, at no further read."""
    batch, heads, tokens, head_dim = k.shape
    k, v, blocks, own = aligned(k), aligned(v), layout.kv_blocks, layout.kv_of_queries
    count = blocks.num_blocks
    per_program = max(1, TOKENS_PER_PROGRAM // blocks.block_size)
    programs = -(-count // per_program)
    means = k.new_empty(batch, heads, count, head_dim, dtype=torch.float32)
    v_means = k.new_empty(batch, heads, own.num_blocks, head_dim, dtype=torch.float32)
    products = k.new_empty(batch, heads, programs, head_dim, head_dim, dtype=torch.float32)
    _pool_state[(programs, batch * heads)](
        k,
        v,
        means,
        v_means,
        products,
        table(blocks),
        *strides(k),
        *strides(v),
        heads,
        tokens,
        count,
        own.num_blocks,
        per_program,
        programs,
        D=head_dim,
        DP=padded(head_dim),
        BLOCK=blocks.block_size,
        **launch_options("state"),
    )
    v_mean, cov = _combined(products, means[:, :, : own.num_blocks], v_means, own)
    if channel_ids is not None:
        cov = cov.gather(2, channel_ids[..., None].expand(-1, -1, -1, head_dim))
    return means, v_mean, cov


def _combined(
    products: Tensor, k_means: Tensor, v_means: Tensor, own: TokenBlocks
) -> tuple[Tensor, Tensor]:
    """Mean of v and covariance from the blocks' own, each centred on its own means.

    sum (k - m)^T (v - w) = sum over blocks of their own + n_b (k_b - m)^T (v_b - w).
    """
    sizes, tokens = own.sizes.float()[:, None], own.num_listed
    k_mean, v_mean = ((x * sizes).sum(dim=2, keepdim=True) / tokens for x in (k_means, v_means))
    between = ((k_means - k_mean) * sizes).mT @ (v_means - v_mean)
    return v_mean[:, :, 0], (products.sum(dim=2) + between) / tokens


@kernel
def _pool_state(
    k_ptr, v_ptr, means_ptr, v_means_ptr, products_ptr, table_ptr,
    k_batch, k_head, k_row, v_batch, v_head, v_row,
    heads, tokens, blocks, own_blocks, per_program, programs,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Block means of k; of the first own_blocks also those of v, and sum (k - k_b)^T (v - v_b).

    One program takes `per_program` blocks of one head and reads k and v once. A block's product is
    centred on its own means as it is added, since a sum of products of numbers far from 0 would
    lose what is sought. products `(B*H, programs, D, D)`, float32.
    """
    program = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    k_ptr = head_ptr(k_ptr, b, h, k_batch, k_head)
    v_ptr = head_ptr(v_ptr, b, h, v_batch, v_head)
    channels = tl.arange(0, DP)
    mask = channels < D
    products = tl.zeros((DP, DP), tl.float32)
    first = program * per_program
    for block in range(first, tl.minimum(first + per_program, blocks)):
        rows = block_tokens(table_ptr, block, tokens, BLOCK)
        size = tl.sum((rows >= 0).to(tl.float32), 0)
        k = load_rows(k_ptr, rows, k_row, D, DP)
        k_mean = tl.sum(k.to(tl.float32), 0) / size
        tl.store(means_ptr + (head * blocks + block) * D + channels, k_mean, mask=mask)
        v = load_rows(v_ptr, tl.where(block < own_blocks, rows, -1), v_row, D, DP)
        v_sum = tl.sum(v.to(tl.float32), 0)
        own_mask = mask & (block < own_blocks)
        pointers = v_means_ptr + (head * own_blocks + block) * D + channels
        tl.store(pointers, v_sum / size, mask=own_mask)
        products = tl.dot(k.T, v, products - k_mean[:, None] * v_sum[None, :])
    line = head * programs + program
    offsets = line * D * D + channels[:, None] * D + channels[None, :]
    tl.store(products_ptr + offsets, products, mask=mask[:, None] & mask[None, :])


def low_rank_state(k: Tensor, v: Tensor, feature_map: FeatureMap) -> tuple[Tensor, Tensor]:
    """See `reference.low_rank_state`."""
    batch, heads, tokens, head_dim = k.shape
    k, v = aligned(k), aligned(v)
    rank = feature_map.rank(head_dim)
    programs = -(-tokens // TOKENS_PER_PROGRAM)
    products = k.new_empty(batch, heads, programs, rank, head_dim, dtype=torch.float32)
    sums = k.new_empty(batch, heads, programs, rank, dtype=torch.float32)
    _low_rank_state[(programs, batch * heads)](
        k,
        v,
        products,
        sums,
        *map_pointers(feature_map),
        *strides(k),
        *strides(v),
        heads,
        tokens,
        rank,
        pe_rows(feature_map),
        TOKENS_PER_PROGRAM // BLOCK,
        programs,
        D=head_dim,
        DP=padded(head_dim),
        RP=padded(rank),
        BLOCK=BLOCK,
        ACT=ACT_NUMBERS[feature_map.act],
        **launch_options("features"),
    )
    return products.sum(dim=2) / tokens, sums.sum(dim=2) / tokens


@kernel
def _low_rank_state(
    k_ptr, v_ptr, products_ptr, sums_ptr, proj_ptr, cos_ptr, sin_ptr, pe_ptr, axis_ids_ptr,
    k_batch, k_head, k_row, v_batch, v_head, v_row,
    heads, tokens, rank, pe_rows, per_program, programs,
    D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """phi^T v `(B*H, programs, rank, D)` and the sums of phi `(B*H, programs, rank)`, float32."""
    program = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    k_ptr = head_ptr(k_ptr, b, h, k_batch, k_head)
    v_ptr = head_ptr(v_ptr, b, h, v_batch, v_head)
    products = tl.zeros((RP, DP), tl.float32)
    sums = tl.zeros((RP,), tl.float32)
    first = program * per_program
    for block in range(first, tl.minimum(first + per_program, tl.cdiv(tokens, BLOCK))):
        rows = block_tokens(None, block, tokens, BLOCK)
        v = load_rows(v_ptr, rows, v_row, D, DP)
        phi = feature_tile(
            k_ptr, rows, k_row, h, proj_ptr, cos_ptr, sin_ptr, pe_ptr, axis_ids_ptr, pe_rows, rank,
            D, DP, RP, BLOCK, ACT,
        )  # fmt: skip
        products = tl.dot(phi.to(v.dtype).T, v, products)
        sums += tl.sum(phi, 0)
    features, channels = tl.arange(0, RP), tl.arange(0, DP)
    line = head * programs + program
    mask = (features < rank)[:, None] & (channels < D)[None, :]
    offsets = (line * rank + features)[:, None] * D + channels[None, :]
    tl.store(products_ptr + offsets, products, mask=mask)
    tl.store(sums_ptr + line * rank + features, sums, mask=features < rank)
