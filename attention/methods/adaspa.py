"""AdaSpa: exact search of the blocks that hold the softmax mass, a few times a run; between searches the mask stands.

    search   W_ij = sum over block (i, j) of exp(q k^T / sqrt D - LSE); a row keeps the blocks of largest W
    recall   of a head = kept mass / all mass, at the sparsity s
    heads    n = min(#heads with recall > 0.8, H // 2): the n of highest recall get the sparsity (1 + s) / 2, the n of
             lowest (3 s - 1) / 2, the others s, so that the mean stays s; for s < 1/3 all get s
    when     steps before the first search, at 0.2 of the schedule, are dense; that step is dense and searches; at 0.6
             a second search needs no dense pass: LSE = LSE of the kept blocks now + log(all mass / kept mass) then.
             Runs of up to 8 steps search at their first step and no more: a second search would cost half a dense step

Masks and mass ratios belong to one layer, one conditioning, one context window, one shape, one run; a call that finds
none is dense and searches. Masks are kept as bits, ratios in half precision.
Source: AdaSpa (arXiv 2502.21079); no public code, written from the paper. Ours: the guard H // 2, the few-step rule,
and the ratio, where the paper reuses the first LSE itself: on random tiny models at consecutive steps (q and k change
by a fifth) masks found so share 95-97 % with fresh ones, and 88-92 % with the LSE itself.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels import ops
from ..accounting import search_flops, sparse_flops
from ..layout import TokenLayout
from ..plan import SparsePlan, kept_blocks
from .base import LayerCall, Method, VideoOutput

FIRST, SECOND = 0.2, 0.6                    # of the steps
FEW_STEPS = 8
GOOD_RECALL = 0.8
HALF_MAX = 6e4                              # beyond half precision a ratio would become infinite
BEFORE_SEARCH = "before AdaSpa's first search"


class Found(NamedTuple):
    """What one search leaves behind, batch rows in front."""

    bits: Tensor                            # (B, H, Nq, words) int32
    ratio: Tensor | None                    # (B, H, Lq) float16: LSE of all blocks - LSE of the kept ones
    longest: int                            # the most blocks that a row keeps
    density: float
    step: int                               # of the search


class AdaSpa(Method):
    """Remembers masks by layer, conditioning, part of the video, and layout."""

    routes = False

    def __init__(self, plan: SparsePlan) -> None:
        self.plan = plan
        self.memory: dict[tuple[Hashable, Hashable, TokenLayout, Hashable], Found] = {}
        self._used: dict[tuple, int] = {}   # the step that last asked for each

    def dense_reason(self, step: int, steps: int) -> str | None:
        """See `Method.dense_reason`."""
        return BEFORE_SEARCH if step < search_steps(steps)[0] else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> VideoOutput:
        """See `Method.attend`."""
        known, later = self._recall(call), search_steps(call.steps)[1:]
        if known is not None:
            out, lse = _attend(q, k, v, known, call)
            due = any(known.step < step <= call.step for step in later)
            if not due:
                return VideoOutput(out, known.density, 0.0)
            lse += known.ratio              # a search that is due was foreseen, so there is one
        else:
            out, lse = ops.dense_attention(q, k, v, call.scale, call.backend)
        found, recall = self._search(q, k, lse, call)
        batch, heads, tokens, width = q.shape
        cost = batch * search_flops(k.shape[2], width, heads)
        again = any(step > call.step for step in later)
        if known is None and not again:     # a run that searches once needs no ratio
            self._remember(found, call)
            return VideoOutput(out, 1.0, 0.0, cost, recall)
        kept, kept_lse = _attend(q, k, v, found, call)
        cost += batch * sparse_flops(tokens, width, heads, found.density)
        if again:
            found = found._replace(ratio=(lse - kept_lse).clamp(0.0, HALF_MAX).half())
        self._remember(found, call)
        if known is None:
            return VideoOutput(out, 1.0, 0.0, cost, recall)
        return VideoOutput(kept, found.density, 0.0, cost, recall)

    def _search(self, q: Tensor, k: Tensor, lse: Tensor, call: LayerCall) -> tuple[Found, float]:
        """Masks of the best blocks, heads sharing the work by their recall: -> Found without its ratio, mean recall."""
        tables = call.tables
        blocks = tables.video.shape[0]
        sparsities = head_sparsities(self.plan.sparsity)
        keeps = [kept_blocks(sparsity, blocks) for sparsity in sparsities]
        bits, recall = ops.block_mass(
            q, k, lse, tables.video, tables.keys, keeps, tables.forced, call.scale, call.backend
        )
        recall = recall.float().nan_to_num(0.0, 0.0, 0.0)
        choice = choose(recall[..., len(keeps) // 2])
        if len(keeps) == 1:
            choice = torch.zeros_like(choice)
        picked = choice[:, :, None, None, None].expand(-1, -1, 1, *bits.shape[3:])
        bits = bits.gather(2, picked).squeeze(2)
        recall = recall.gather(2, choice[..., None]).mean().item()
        of_level = torch.tensor([tables.density(keep) for keep in keeps], dtype=torch.float64)
        density = of_level[choice.cpu()].mean().item()
        longest = min(tables.keys.shape[0], max(keeps) + int(tables.forced_counts.max()))
        return Found(bits, None, longest, density, call.step), recall

    def _recall(self, call: LayerCall) -> Found | None:
        """What is known for all conditionings of the call; None where any is new or of another batch size."""
        keys = [(call.layer, key, call.layout, call.part) for key, _ in call.conditioning]
        self._used.update((key, call.step) for key in keys)
        parts = [self.memory.get(key) for key in keys]
        rows = [count for _, count in call.conditioning]
        if any(part is None for part in parts) or [part.bits.shape[0] for part in parts] != rows:
            return None
        if len(parts) == 1:
            return parts[0]
        if len({part.ratio is None for part in parts}) > 1:                   # one of them was found too late for it
            return None
        density = sum(part.density * count for part, count in zip(parts, rows)) / sum(rows)
        return Found(
            torch.cat([part.bits for part in parts]),
            None if parts[0].ratio is None else torch.cat([part.ratio for part in parts]), parts[0].longest, density,
            min(part.step for part in parts),
        )

    def _remember(self, found: Found, call: LayerCall) -> None:
        for key, own in call.rows:
            # A part of a larger tensor would keep all of it alive.
            ratio = None if found.ratio is None else found.ratio[own].clone()
            part = found._replace(bits=found.bits[own].clone(), ratio=ratio)
            self.memory[call.layer, key, call.layout, call.part] = part
        # Context windows may move from step to step: what the last two steps did not ask for is not asked for again.
        for key in [key for key in self.memory if key[0] == call.layer and self._used[key] < call.step - 1]:
            del self.memory[key], self._used[key]


def _attend(q: Tensor, k: Tensor, v: Tensor, found: Found, call: LayerCall) -> tuple[Tensor, Tensor]:
    blocks = call.tables.keys.shape[0]
    indices, counts = ops.lists_from_bits(found.bits, blocks, found.longest, call.backend)
    return ops.block_sparse_attention(
        q, k, v, call.tables.video, call.tables.keys, indices, counts, scale=call.scale, backend=call.backend,
        trusted=True,
    )


def search_steps(steps: int) -> tuple[int, ...]:
    """The steps of a schedule of so many that search."""
    if steps <= FEW_STEPS:
        return (0,)
    return (math.floor(FIRST * steps), math.floor(SECOND * steps))


def head_sparsities(sparsity: float) -> tuple[float, ...]:
    """The three sparsities that heads share, highest first; one alone where the lowest would be negative."""
    if sparsity < 1 / 3:
        return (sparsity,)
    return ((1 + sparsity) / 2, sparsity, max(0.0, (3 * sparsity - 1) / 2))


def choose(recall: Tensor) -> Tensor:
    """Which of the three sparsities each head gets: recall `(B, H)` -> `(B, H)` int64, 0 = the highest sparsity."""
    heads = recall.shape[-1]
    count = (recall > GOOD_RECALL).sum(dim=-1, keepdim=True).clamp(max=heads // 2)
    rank = recall.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)    # 0 = the highest recall
    return 1 - (rank < count).long() + (rank >= heads - count).long()
