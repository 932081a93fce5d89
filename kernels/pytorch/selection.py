"""Which blocks are kept, in plain PyTorch: by score, by exact mass; bits and lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import BlockLayout, BlockMask, list_dtype
from .common import acc_dtype, gather, head_chunks, per_head

BLOCKS_PER_STEP = 8


def block_select(
    pooled_q: Tensor,
    pooled_k: Tensor,
    layout: BlockLayout,
    topk: int | Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.block_select`: -> kv_indices, kv_num_blocks, dropped_lse.

    kv_indices flat where topk has a number for each head. Some heads at a time: scores of all of
    them may be larger than q.
    """
    q, k = pooled_q.flatten(0, 1), pooled_k.flatten(0, 1)
    if not isinstance(topk, int):
        each = [
            _select(q[i : i + 1], k[i : i + 1], layout, own, scale) for i, own in enumerate(topk)
        ]
        lists, *sums = zip(*each)
        counts, dropped_lse = (torch.cat(x).unflatten(0, pooled_q.shape[:2]) for x in sums)
        return torch.cat([x.flatten() for x in lists]), counts, dropped_lse
    parts = [
        _select(q[some], k[some], layout, topk, scale)
        for some in head_chunks(q.shape[0], q.shape[1] * k.shape[1])
    ]
    whole = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts))
    lists, counts, dropped_lse = (x.unflatten(0, pooled_q.shape[:2]) for x in whole)
    return lists, counts, dropped_lse


def dropped_mass(pooled_q: Tensor, pooled_k: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """See `reference.dropped_mass`; the backward pass makes the scores again."""
    return _DroppedMass.apply(pooled_q, pooled_k, mask, scale)


class _DroppedMass(torch.autograd.Function):
    """A few heads at a time: the scores of all may be larger than q."""

    @staticmethod
    def forward(
        ctx: Any, pooled_q: Tensor, pooled_k: Tensor, mask: BlockMask, scale: float
    ) -> Tensor:
        found = pooled_q.new_empty(pooled_q.shape[:3])
        for some, scores in _dropped_scores(pooled_q, pooled_k, mask, scale):
            found.flatten(0, 1)[some] = scores.logsumexp(dim=-1)
        ctx.save_for_backward(pooled_q, pooled_k, found)
        ctx.mask, ctx.scale = mask, scale
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pooled_q, pooled_k, found = ctx.saved_tensors
        d_q, d_k = torch.empty_like(pooled_q), torch.empty_like(pooled_k)
        q, k = pooled_q.flatten(0, 1), pooled_k.flatten(0, 1)
        for some, scores in _dropped_scores(pooled_q, pooled_k, ctx.mask, ctx.scale):
            # A row that drops nothing has no mass, and no gradient.
            total = found.flatten(0, 1)[some].clamp(min=-1e30)[..., None]
            shares = (scores - total).exp() * gradients[0].flatten(0, 1)[some][..., None]
            shares = ctx.scale * shares.masked_fill(scores == -torch.inf, 0.0)
            d_q.flatten(0, 1)[some] = shares @ k[some]
            d_k.flatten(0, 1)[some] = shares.mT @ q[some]
        return d_q, d_k, None, None


def _dropped_scores(
    pooled_q: Tensor, pooled_k: Tensor, mask: BlockMask, scale: float
) -> Iterator[tuple[slice, Tensor]]:
    """Some of B * H heads, and their scores plus log sizes `(n, Nq, Nk)`, -inf where kept."""
    q, k, blocks = pooled_q.flatten(0, 1), pooled_k.flatten(0, 1), mask.kv_blocks.num_blocks
    lists, sizes = mask.fill_unused(blocks).flatten(0, 1), mask.kv_blocks.sizes.to(q.dtype).log()
    for some in head_chunks(q.shape[0], q.shape[1] * k.shape[1]):
        scores = scale * q[some] @ k[some].mT + sizes
        kept = torch.zeros(*scores.shape[:-1], blocks + 1, dtype=torch.bool, device=q.device)
        kept.scatter_(-1, lists[some], True)
        yield some, scores.masked_fill(kept[..., :blocks], -torch.inf)


def _select(
    pooled_q: Tensor, pooled_k: Tensor, layout: BlockLayout, topk: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`block_select` of heads `(n, N, D)`."""
    blocks = layout.kv_blocks.num_blocks
    scores = pooled_q @ pooled_k.transpose(-1, -2) * scale
    required = None if layout.required is None else layout.required.mask
    ranked = scores if required is None else scores.masked_fill(required, -torch.inf)
    indices = ranked.topk(min(topk, blocks), dim=-1, sorted=False).indices
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, indices, True)
    counts = torch.full(
        scores.shape[:-1], indices.shape[-1], dtype=torch.int32, device=scores.device
    )
    if required is not None:
        kept |= required
        counts = kept.sum(dim=-1, dtype=torch.int32)
        indices = torch.where(kept, torch.arange(blocks, device=scores.device), blocks)
    indices = indices.sort(dim=-1).values[..., : layout.list_width(topk)]
    sizes = layout.kv_blocks.sizes.to(scores.dtype)
    dropped_lse = (scores + sizes.log()).masked_fill(kept, -torch.inf).logsumexp(dim=-1)
    return indices.to(list_dtype(blocks)), counts, dropped_lse


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, layout: BlockLayout, topks: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """See `reference.block_mass`: exact search, a few query blocks of one head at a time."""
    q_blocks, kv_blocks = layout.q_blocks, layout.kv_blocks
    required = None if layout.required is None else layout.required.mask
    block_of_key = kv_blocks.block_of_token
    dtype = acc_dtype(q.dtype)

    def search(b: int, h: int) -> tuple[Tensor, Tensor]:
        queries, keys = gather(q[b, h], q_blocks, dtype), k[b, h].to(dtype).T
        shift = gather(lse[b, h, :, None], q_blocks, dtype)
        shift = shift.masked_fill(q_blocks.empty[..., None], torch.inf)
        rows = []
        for start in range(0, q_blocks.num_blocks, BLOCKS_PER_STEP):
            some = slice(start, start + BLOCKS_PER_STEP)
            weights = (queries[some] @ keys * scale - shift[some]).exp_().sum(dim=1)
            sums = weights.new_zeros(weights.shape[0], kv_blocks.num_blocks + 1)
            rows.append(sums.index_add_(1, block_of_key, weights)[:, :-1])
        return _best(torch.cat(rows), topks, required)

    return per_head(q, search)


def _best(mass: Tensor, topks: list[int], required: Tensor | None) -> tuple[Tensor, Tensor]:
    """Bits of the blocks of largest mass, and the share of it that they hold, for each topk."""
    ranked = mass if required is None else mass.masked_fill(required, -1.0)
    bits, recall = [], []
    for topk in topks:
        kept = torch.zeros_like(mass, dtype=torch.bool)
        best = ranked.topk(min(topk, mass.shape[-1]), dim=-1, sorted=False).indices
        kept.scatter_(-1, best, True)
        if required is not None:
            kept |= required
        bits.append(pack_bits(kept))
        recall.append((mass * kept).sum() / mass.sum())
    return torch.stack(bits), torch.stack(recall)


def pack_bits(kept: Tensor) -> Tensor:
    """Booleans `(..., Nk)` -> `(..., ceil(Nk / 32))` int32, bit j % 32 of word j / 32."""
    words = F.pad(kept, (0, -kept.shape[-1] % 32)).unflatten(-1, (-1, 32)).int()
    place = torch.arange(32, dtype=torch.int32, device=kept.device)
    return (words << place).sum(dim=-1, dtype=torch.int32)


def lists_from_bits(bits: Tensor, blocks: int, list_width: int) -> tuple[Tensor, Tensor]:
    """Bits `(..., words)` -> ascending lists `(..., list_width)` and their lengths."""
    place = torch.arange(32, dtype=torch.int32, device=bits.device)
    kept = ((bits[..., None] >> place) & 1).flatten(-2)[..., :blocks]
    place = (kept.cumsum(dim=-1, dtype=torch.int32) - 1).masked_fill(kept == 0, list_width)
    dtype = list_dtype(blocks)
    lists = torch.full((*bits.shape[:-1], list_width + 1), blocks, dtype=dtype, device=bits.device)
    column = torch.arange(blocks, dtype=dtype, device=bits.device).expand(kept.shape)
    lists.scatter_(-1, place.clamp(max=list_width).long(), column)
    counts = kept.sum(dim=-1, dtype=torch.int32).clamp(max=list_width)
    return lists[..., :list_width].contiguous(), counts
