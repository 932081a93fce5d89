"""What the portable operations share: one head at a time, tokens gathered in block order, float32 or wider."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def block_sizes(blocks: Tensor) -> Tensor:
    """Real tokens per block: `(N, S)` table -> `(N,)` int64."""
    return (blocks >= 0).sum(dim=-1)


def token_slots(blocks: Tensor, tokens: int) -> Tensor:
    """Where each token stands in the flattened `(N, S)` table: -> `(tokens,)` int64."""
    flat = blocks.reshape(-1).long()
    slots = torch.empty(tokens + 1, dtype=torch.int64, device=blocks.device)
    slots[torch.where(flat < 0, tokens, flat)] = torch.arange(flat.numel(), device=blocks.device)
    return slots[:tokens]


def gather(head: Tensor, blocks: Tensor, dtype: torch.dtype, zero_empty: bool = False) -> Tensor:
    """Tokens of one head in block order: head `(L, D)`, blocks `(N, S)` -> `(N, S, D)`."""
    gathered = head.index_select(0, blocks.reshape(-1).long().clamp(min=0)).view(*blocks.shape, -1).to(dtype)
    if zero_empty and blocks.numel() != head.shape[0]:
        gathered = gathered.masked_fill((blocks < 0)[..., None], 0.0)
    return gathered


def channels(x: Tensor, features: Tensor | None, b: int, h: int) -> Tensor:
    """The channels of one head that features `(B, H, R)` names; all when None."""
    return x[b, h] if features is None else x[b, h].index_select(1, features[b, h])


def per_head(
    like: Tensor, compute: Callable[[int, int], tuple[Tensor, ...]], host: int = 0
) -> tuple[Tensor, ...]:
    """Run compute(b, h) for every head of `like` and put the results together as `(B, H, ...)`.

    Results are written as they come: a second copy of everything would cost as much memory as dense attention needs
    in all. In the first `host` of them heads lie side by side in each token, as hosts want them back; the rest is
    contiguous. Only gradients need the copy.
    """
    batch, heads = like.shape[:2]
    results: list[Tensor] = []
    parts: list[tuple[Tensor, ...]] = []
    for b in range(batch):
        for h in range(heads):
            found = compute(b, h)
            if any(x.requires_grad for x in found):
                parts.append(found)
                continue
            if not results:
                results = [
                    x.new_empty(batch, x.shape[0], heads, *x.shape[1:]).transpose(1, 2) if i < host
                    else x.new_empty(batch, heads, *x.shape)
                    for i, x in enumerate(found)
                ]
            for whole, x in zip(results, found):
                whole[b, h] = x
    if parts:
        return tuple(torch.stack(xs).unflatten(0, (batch, heads)) for xs in zip(*parts))
    return tuple(results)


def like_host(x: Tensor, tokens: int) -> Tensor:
    """An empty `(B, H, tokens, D)` whose heads lie side by side in each token, as hosts want them back."""
    batch, heads, _, width = x.shape
    return x.new_empty(batch, tokens, heads, width).transpose(1, 2)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of such numbers are made in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
