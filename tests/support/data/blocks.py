"""Token blocks, random tensors, block masks and backgrounds for tests of the operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pack_loader import load

reference, types = load(".kernels.reference"), load(".kernels.types")
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def blocks_of(tokens: int, size: int = 64, shuffled: bool = False, seed: int = 0):
    """`TokenBlocks` over `tokens` tokens in order, or in a random one."""
    order = torch.arange(tokens)
    if shuffled:
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    return types.TokenBlocks.cut(order, size)


def tensors(
    *shapes, dtype: torch.dtype = torch.float64, scale: float = 1.0, seed: int = 0
) -> list[Tensor]:
    """Random normal tensors, the same for every dtype up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        for shape in shapes
    ]


def selected(
    q: Tensor, k: Tensor, q_blocks, kv_blocks, topk: int, required: Tensor | None = None
) -> tuple[Any, Tensor]:
    """The definition's block mask and dropped LSE."""
    pooled_q = reference.block_pool(q.double(), q_blocks)
    pooled_k = reference.block_pool(k.double(), kv_blocks)
    return reference.block_select(
        pooled_q, pooled_k, layout_of(q_blocks, kv_blocks, required), topk
    )


def layout_of(q_blocks, kv_blocks, required: Tensor | None = None):
    """A `BlockLayout`, with required `(Nq, Nk)` bool."""
    found = None if required is None else types.RequiredBlocks.of(required)
    return types.BlockLayout(q_blocks, kv_blocks, found)


def mask_like(mask, **changed):
    """A block mask with other lists, checked anew."""
    names = ("q_blocks", "kv_blocks", "kv_indices", "kv_num_blocks")
    return types.BlockMask(**{name: changed.get(name, getattr(mask, name)) for name in names})


def ragged(heads: int, q_blocks, kv_blocks, seed: int = 0):
    """A block mask whose rows keep from nothing to everything, by row and head."""
    generator = torch.Generator().manual_seed(seed)
    n_q, n_k = q_blocks.num_blocks, kv_blocks.num_blocks
    kept = torch.rand(1, heads, n_q, n_k, generator=generator)
    kept = kept < torch.rand(1, heads, n_q, 1, generator=generator)
    kept[:, :, 0] = False
    kept[:, :, -1] = True
    column = torch.arange(n_k).expand_as(kept)
    lists = torch.where(kept, column, n_k).sort(dim=-1).values.int()
    return types.BlockMask(q_blocks, kv_blocks, lists, kept.sum(dim=-1).int())


def wide(values):
    """Floating-point tensors as float64, in whatever tuples they come; all else as it is."""
    if isinstance(values, Tensor):
        return values.double() if values.is_floating_point() else values
    if hasattr(values, "_fields"):
        return type(values)(*map(wide, values))
    return [wide(x) for x in values] if isinstance(values, (list, tuple)) else values


def sparse_case(
    tokens: int,
    dtype: torch.dtype,
    head_dim: int = 64,
    batch: int = 1,
    heads: int = 2,
    scale: float = 1.0,
    topk: int | None = None,
    key_block: int = 64,
    query_block: int = 64,
):
    """q, k, v and the definition's mask over shuffled blocks; and the dropped LSE."""
    q, k, v = tensors(*[(batch, heads, tokens, head_dim)] * 3, dtype=dtype, scale=scale)
    sizes = query_block, key_block
    q_blocks, kv_blocks = (blocks_of(tokens, size, shuffled=True) for size in sizes)
    topk = topk or max(1, kv_blocks.num_blocks // 3)
    mask, dropped_lse = selected(q, k, q_blocks, kv_blocks, topk)
    return (q, k, v, mask), dropped_lse


def feature_map(
    act: str,
    heads: int,
    tokens: int,
    head_dim: int,
    rank: int,
    dtype: torch.dtype,
    full: bool = True,
):
    """A feature map with everything that it may have; full=False: the projection alone."""
    proj, pe = tensors((heads, rank, head_dim), (heads, 9, rank), dtype=dtype, seed=5)
    angles = tensors((tokens, head_dim // 2), dtype=dtype, seed=6)[0]
    number = torch.arange(tokens)
    axis_ids = torch.stack((number % 3, 3 + number % 4, 7 + number % 2), dim=1).int()
    extra = (angles.cos(), angles.sin(), 0.3 * pe, axis_ids) if full else (None,) * 4
    return types.FeatureMap(act, proj / head_dim**0.5, *extra)


def mixing_case(
    dtype: torch.dtype,
    tokens: int = 170,
    head_dim: int = 48,
    heads: int = 2,
    scale: float = 1.0,
    rank: int | None = None,
    low_rank: str | None = None,
    logits: bool = False,
    sharpness: float = 1.0,
    key_block: int = 64,
    query_block: int = 64,
):
    """q, k, v, mask, background; rank: channels of the first order; low_rank: a branch's act."""
    case, dropped_lse = sparse_case(
        tokens,
        dtype,
        head_dim,
        heads=heads,
        scale=scale,
        topk=1,
        key_block=key_block,
        query_block=query_block,
    )
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    per_head = (1, heads)
    slope, bias, channel_scale = tensors(
        per_head, per_head, (*per_head, head_dim), dtype=sums, seed=7
    )
    dropped_lse, k, v = (x.to(sums) for x in (dropped_lse, *case[1:3]))
    if dropped_lse.shape[2] > 1:
        dropped_lse[0, 0, 1] = -torch.inf  # a query block that dropped nothing
    channel_ids = None
    if rank:
        channel_ids = torch.stack([torch.randperm(head_dim)[:rank] for _ in range(heads)])[None]
    layout = layout_of(case[3].q_blocks, case[3].kv_blocks)
    _, v_mean, cov = reference.block_pool_state(k, v, layout, channel_ids)
    own = tensors((*per_head, tokens), dtype=sums, seed=8)[0] if logits else None
    first = types.FirstOrder(v_mean, cov, channel_scale[..., :rank] / head_dim**0.5, channel_ids)
    branch = None
    if low_rank:
        fmap = feature_map(low_rank, heads, tokens, head_dim, 24, sums)
        fmap = fmap._replace(proj=sharpness * fmap.proj)
        state = types.LinearState(*reference.low_rank_state(k, v, fmap), 1e-5)
        branch = types.LowRank(fmap, state, torch.linspace(0.5, 1, heads, dtype=sums))
    gate = types.Gate(dropped_lse, slope, bias, own)
    return (*case, types.Background(gate, first, branch))


def packed(mask, widths=None):
    """The same mask with each head's lists as wide as its own longest row, or as `widths` says."""
    batch, heads, rows = mask.kv_num_blocks.shape
    lists = mask.kv_indices.flatten(0, 1)
    widths = widths or mask.kv_num_blocks.flatten(0, 1).amax(dim=1).tolist()
    flat = torch.cat([each[:, :width].flatten() for each, width in zip(lists, widths)])
    packing = types.Packing.of(widths, rows, flat.device)
    return types.BlockMask(mask.q_blocks, mask.kv_blocks, flat, mask.kv_num_blocks, packing)
