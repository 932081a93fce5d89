"""What the portable operations share: one head at a time, tokens gathered in block order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor

from ..types import TokenBlocks

SCORES_AT_ONCE = 16 << 20
Results = TypeVar("Results", bound="tuple[Tensor, ...]")


def gather(
    head: Tensor, blocks: TokenBlocks, dtype: torch.dtype, zero_empty: bool = False
) -> Tensor:
    """Tokens of one head in block order: head `(L, D)` -> `(N, S, D)`."""
    gathered = head.index_select(0, blocks.slots).view(*blocks.tokens.shape, -1).to(dtype)
    if zero_empty and blocks.has_empty_slots:
        gathered = gathered.masked_fill(blocks.empty[..., None], 0.0)
    return gathered


def scatter(gathered: Tensor, blocks: TokenBlocks) -> Tensor:
    """Back in token order: `(N, S, ...)` -> `(L, ...)`; tokens in no block get 0."""
    flat = gathered.flatten(0, 1)
    if blocks.lists_every_token:
        return flat.index_select(0, blocks.slot_of_token)
    missing = blocks.slot_of_token == flat.shape[0]
    found = flat.index_select(0, blocks.slot_of_token.clamp(max=flat.shape[0] - 1))
    return found.masked_fill(missing.view(-1, *(1,) * (found.ndim - 1)), 0.0)


def channels(x: Tensor, channel_ids: Tensor | None, b: int, h: int) -> Tensor:
    """The channels of one head that `channel_ids` `(B, H, r)` names; all when None."""
    return x[b, h] if channel_ids is None else x[b, h].index_select(1, channel_ids[b, h])


def per_head(
    like: Tensor,
    compute: Callable[[int, int], Results],
    nhd_outputs: int = 0,
    out: Tensor | None = None,
) -> Results:
    """Run compute(b, h) for every head of `like`, and put the results together as `(B, H, ...)`.

    The first `nhd_outputs` results have their heads side by side in each token (NHD layout, which
    hosts want back); the others are contiguous. out: where the first result is written. Results are
    written as they come, since a second copy of everything would cost as much memory as all of
    dense attention needs; only gradients need one.
    """
    batch, heads = like.shape[:2]
    may_need_gradients = torch.is_grad_enabled()
    results: list[Tensor] = []
    partials: list[tuple[Tensor, ...]] = []
    for b in range(batch):
        for h in range(heads):
            found = compute(b, h)
            if may_need_gradients and any(x.requires_grad for x in found):
                partials.append(found)
                continue
            if not results:
                results = [_empty(x, batch, heads, i < nhd_outputs) for i, x in enumerate(found)]
                if out is not None:
                    results[0] = out
            for whole, x in zip(results, found):
                whole[b, h] = x
    if partials:
        results = [torch.stack(xs).unflatten(0, (batch, heads)) for xs in zip(*partials)]
    return cast(Results, tuple(results))


def head_chunks(heads: int, numbers_per_head: int) -> list[slice]:
    """Heads of all batch rows, so many at a time that their scores are no large tensor."""
    step = max(1, SCORES_AT_ONCE // numbers_per_head)
    return [slice(start, min(start + step, heads)) for start in range(0, heads, step)]


def _empty(x: Tensor, batch: int, heads: int, nhd: bool) -> Tensor:
    if nhd:
        return x.new_empty(batch, x.shape[0], heads, *x.shape[1:]).transpose(1, 2)
    return x.new_empty(batch, heads, *x.shape)


def empty_nhd(x: Tensor, tokens: int) -> Tensor:
    """An empty `(B, H, tokens, D)` in NHD layout."""
    batch, heads, _, head_dim = x.shape
    return x.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of such numbers are made in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
