"""Which blocks are kept, in plain PyTorch: pooling, selection by score, exact search by mass, bits and lists."""

from __future__ import annotations

import torch
from torch import Tensor

from .heads import block_sizes, gather, per_head, token_slots, wide

BLOCKS_PER_STEP = 8


def block_pool(x: Tensor, blocks: Tensor) -> Tensor:
    """Mean over each block, float32 or wider: see `reference.block_pool`."""
    sizes = block_sizes(blocks)[:, None]

    def pool(b: int, h: int) -> tuple[Tensor]:
        return (gather(x[b, h], blocks, wide(x.dtype), zero_empty=True).sum(dim=1) / sizes,)

    return per_head(x, pool)[0]


def block_select(
    pooled_q: Tensor, pooled_k: Tensor, k_sizes: Tensor, keep: int, forced: Tensor | None, scale: float,
    most_forced: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Routing: see `reference.block_select`; most_forced = forced blocks of the fullest row."""
    n_k = pooled_k.shape[2]
    scores = pooled_q @ pooled_k.transpose(-1, -2) * scale
    ranked = scores if forced is None else scores.masked_fill(forced, -torch.inf)
    indices = ranked.topk(min(keep, n_k), dim=-1, sorted=False).indices
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, indices, True)
    counts = torch.full(scores.shape[:-1], indices.shape[-1], dtype=torch.int32, device=scores.device)
    if forced is not None:
        kept |= forced
        counts = kept.sum(dim=-1, dtype=torch.int32)
        indices = torch.where(kept, torch.arange(n_k, device=scores.device), n_k)
    indices = indices.sort(dim=-1).values[..., : min(n_k, keep + most_forced)]
    tail = (scores + k_sizes.to(scores.dtype).log()).masked_fill(kept, -torch.inf).logsumexp(dim=-1)
    return indices.int(), counts, tail


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, q_blocks: Tensor, k_blocks: Tensor, keeps: list[int], forced: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Exact search, a few query blocks of one head at a time: see `reference.block_mass`."""
    n_q, n_k = q_blocks.shape[0], k_blocks.shape[0]
    of_key = token_slots(k_blocks, k.shape[2]) // k_blocks.shape[1]
    dtype = wide(q.dtype)

    def search(b: int, h: int) -> tuple[Tensor, Tensor]:
        queries, keys = gather(q[b, h], q_blocks, dtype), k[b, h].to(dtype).T
        shift = gather(lse[b, h, :, None], q_blocks, dtype).masked_fill((q_blocks < 0)[..., None], torch.inf)
        rows = []
        for start in range(0, n_q, BLOCKS_PER_STEP):
            some = slice(start, start + BLOCKS_PER_STEP)
            weights = (queries[some] @ keys * scale - shift[some]).exp_().sum(dim=1)
            rows.append(weights.new_zeros(weights.shape[0], n_k).index_add_(1, of_key, weights))
        mass = torch.cat(rows)
        ranked = mass if forced is None else mass.masked_fill(forced, -1.0)
        bits, recall = [], []
        for keep in keeps:
            kept = torch.zeros_like(mass, dtype=torch.bool)
            kept.scatter_(-1, ranked.topk(min(keep, n_k), dim=-1, sorted=False).indices, True)
            if forced is not None:
                kept |= forced
            bits.append(pack_bits(kept))
            recall.append((mass * kept).sum() / mass.sum())
        return torch.stack(bits), torch.stack(recall)

    return per_head(q, search)


def pack_bits(kept: Tensor) -> Tensor:
    """Booleans `(..., Nk)` -> `(..., ceil(Nk / 32))` int32, bit j % 32 of word j / 32."""
    words = torch.nn.functional.pad(kept, (0, -kept.shape[-1] % 32)).unflatten(-1, (-1, 32))
    return (words.int() << torch.arange(32, dtype=torch.int32, device=kept.device)).sum(dim=-1, dtype=torch.int32)


def lists_from_bits(bits: Tensor, blocks: int, longest: int) -> tuple[Tensor, Tensor]:
    """See `reference.lists_from_bits`."""
    kept = ((bits[..., None] >> torch.arange(32, dtype=torch.int32, device=bits.device)) & 1).flatten(-2)[..., :blocks]
    place = (kept.cumsum(dim=-1, dtype=torch.int32) - 1).masked_fill(kept == 0, longest).clamp(max=longest)
    lists = torch.full((*bits.shape[:-1], longest + 1), blocks, dtype=torch.int32, device=bits.device)
    column = torch.arange(blocks, dtype=torch.int32, device=bits.device).expand(kept.shape)
    lists.scatter_(-1, place.long(), column)
    return lists[..., :longest].contiguous(), kept.sum(dim=-1, dtype=torch.int32).clamp(max=longest)
