"""AdaSpa: exact search of the blocks that hold the softmax mass, a few times a run.

    search   W_ij = sum over block (i, j) of exp(q k^T / sqrt D - LSE); a row keeps the blocks of
             largest W; between searches the mask stands
    recall   of a head = kept mass / all mass, at the sparsity s
    heads    n = min(#heads with recall > 0.8, H // 2): the n of highest recall get the sparsity
             (1 + s) / 2, the n of lowest (3 s - 1) / 2, the others s, so that the mean stays s; for
             s < 1/3 all get s
    when     steps before the first search, at 0.2 of the schedule, are dense; that step is dense
             and searches; at 0.6 a second search needs no dense pass: LSE = LSE of the kept blocks
             now + log(all mass / kept mass) then. Runs of up to 8 steps search at their first step
             and no more: a second search would cost half a dense step

Masks and mass ratios belong to one layer, one conditioning, one context window, one shape, one run;
a call that finds none is dense and searches. Masks are kept as bits, ratios in half precision.
Source: AdaSpa (arXiv 2502.21079); no public code, written from the paper. Ours: the guard H // 2,
the few-step rule, and the ratio, where the paper reuses the first LSE itself, which ages faster.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels import ops
from ...kernels.types import BlockMask
from ..accounting import search_flops, sparse_flops
from ..block_layout import TokenLayout
from ..call import AttentionCall
from ..plan import ResolvedPlan, topk_of
from .base import Method, MethodOutput

FIRST, SECOND = 0.2, 0.6  # of the steps
FEW_STEPS = 8
GOOD_RECALL = 0.8
HALF_MAX = 6e4  # beyond half precision a ratio would become infinite
BEFORE_SEARCH = "before AdaSpa's first search"
Key = tuple[Hashable, Hashable, TokenLayout, Hashable]  # layer, conditioning, layout, window


class SearchResult(NamedTuple):
    """What one search leaves behind, batch rows in front."""

    bits: Tensor  # (B, H, Nq, words) int32
    ratio: Tensor | None  # (B, H, Lq) float16: LSE of all blocks - LSE of the kept ones
    list_width: int  # the most blocks that a row keeps
    density: float
    step: int  # of the search

    def of_batch(self, own: slice) -> SearchResult:
        """That of some batch rows; copies, since a part of a tensor would keep all of it alive."""
        ratio = None if self.ratio is None else self.ratio[own].clone()
        return self._replace(bits=self.bits[own].clone(), ratio=ratio)


class AdaSpa(Method):
    """Remembers masks by layer, conditioning, context window and layout."""

    routes = False

    def __init__(self, plan: ResolvedPlan) -> None:
        super().__init__(plan)
        self.memory: dict[Key, SearchResult] = {}
        self._last_asked: dict[Key, int] = {}  # step

    def dense_reason(self, step: int, num_steps: int) -> str | None:
        """See `Method.dense_reason`."""
        return BEFORE_SEARCH if step < search_steps(num_steps)[0] else None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, out: Tensor | None = None
    ) -> MethodOutput:
        """See `Method.attend`."""
        known = self._lookup(call, q.shape[0])
        if known is None:
            return self._dense_search(q, k, v, call, out)
        due = any(known.step < step <= call.step for step in search_steps(call.num_steps)[1:])
        if due:
            return self._sparse_search(q, k, v, call, known, out)
        mask = self._mask(known, call, q.device)
        found, mass = self._attend(q, k, v, mask, call, out)
        return MethodOutput(found, mask, known.density, mass=mass)

    def _dense_search(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, out: Tensor | None
    ) -> MethodOutput:
        """The first search: dense attention gives the LSE, and is the call's result."""
        seen = self.seen_keys(call.layout, q.device)
        backend = self.plan.backend
        dense, lse = ops.dense_attention(q, k, v, seen, scale=call.scale, backend=backend, out=out)
        found, recall = self._search(q, k, lse, call)
        cost = self._search_cost(q, call)
        if self._searches_again(call):  # a run that searches once needs no ratio
            _, kept_lse = self._attend(q, k, v, self._mask(found, call, q.device), call)
            cost += self._sparse_cost(q, call, found)
            found = found._replace(ratio=_ratio(lse.detach(), kept_lse.detach()))
        self._remember(found, call, q.shape[0])
        return MethodOutput(dense, None, 1.0, 0.0, cost, recall, mass=lse)

    def _sparse_search(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: AttentionCall,
        known: SearchResult,
        out: Tensor | None,
    ) -> MethodOutput:
        """A later search: LSE from the blocks kept so far and their earlier share of the mass."""
        _, lse = self._attend(q, k, v, self._mask(known, call, q.device), call)
        assert known.ratio is not None  # a search that is due was foreseen
        lse = lse + known.ratio
        found, recall = self._search(q, k, lse, call)
        mask = self._mask(found, call, q.device)
        kept, kept_lse = self._attend(q, k, v, mask, call, out)
        cost = self._search_cost(q, call) + self._sparse_cost(q, call, found)
        if self._searches_again(call):
            found = found._replace(ratio=_ratio(lse.detach(), kept_lse.detach()))
        self._remember(found, call, q.shape[0])
        return MethodOutput(kept, mask, found.density, 0.0, cost, recall, mass=kept_lse)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: BlockMask,
        call: AttentionCall,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        small = self.eight_bit(k, v, call)
        return ops.block_sparse_attention(
            q, k, v, mask, scale=call.scale, backend=self.plan.backend, out=out, eight_bit=small
        )

    def _mask(self, found: SearchResult, call: AttentionCall, device: torch.device) -> BlockMask:
        blocks = self.blocks(call.layout, device)
        return ops.mask_from_bits(found.bits, blocks, found.list_width, backend=self.plan.backend)

    def _search(
        self, q: Tensor, k: Tensor, lse: Tensor, call: AttentionCall
    ) -> tuple[SearchResult, float]:
        """Masks of the best blocks, heads sharing the work by their recall.

        -> result, mean recall.
        """
        blocks = self.blocks(call.layout, q.device)
        count = blocks.num_ranked
        topks = [topk_of(sparsity, count) for sparsity in head_sparsities(self.plan.sparsity)]
        bits, recall = ops.block_mass(
            q, k, lse, blocks, topks, scale=call.scale, backend=self.plan.backend
        )
        recall = recall.float().nan_to_num(0.0, 0.0, 0.0)
        choice = choose(recall[..., len(topks) // 2])
        if len(topks) == 1:
            choice = torch.zeros_like(choice)
        picked = choice[:, :, None, None, None].expand(-1, -1, 1, *bits.shape[3:])
        bits = bits.gather(2, picked).squeeze(2)
        mean_recall = recall.gather(2, choice[..., None]).mean().item()
        densities = torch.tensor([blocks.density(topk) for topk in topks], dtype=torch.float64)
        density = densities[choice.cpu()].mean().item()
        width = blocks.list_width(max(topks))
        return SearchResult(bits, None, width, density, call.step), mean_recall

    def _searches_again(self, call: AttentionCall) -> bool:
        return any(step > call.step for step in search_steps(call.num_steps)[1:])

    def _search_cost(self, q: Tensor, call: AttentionCall) -> float:
        batch, heads, _, head_dim = q.shape
        return batch * search_flops(call.layout.attended_tokens, head_dim, heads)

    def _sparse_cost(self, q: Tensor, call: AttentionCall, found: SearchResult) -> float:
        batch, heads, tokens, head_dim = q.shape
        return batch * sparse_flops(tokens, head_dim, heads, found.density)

    def _keys(self, call: AttentionCall, batch: int) -> list[tuple[Key, slice]]:
        return [
            ((call.layer, key, call.layout, call.window), own)
            for key, own in call.conditionings(batch)
        ]

    def _lookup(self, call: AttentionCall, batch: int) -> SearchResult | None:
        """What is known for all conditionings; None if any is new or of another size."""
        keys = self._keys(call, batch)
        self._last_asked.update((key, call.step) for key, _ in keys)
        found = [self.memory.get(key) for key, _ in keys]
        counts = [own.stop - own.start for _, own in keys]
        known = [each for each in found if each is not None]
        if len(known) < len(found) or [each.bits.shape[0] for each in known] != counts:
            return None
        if len(known) == 1:
            return known[0]
        ratios = [each.ratio for each in known if each.ratio is not None]
        if len(ratios) not in (0, len(known)):  # one of them was found too late for it
            return None
        density = sum(each.density * count for each, count in zip(known, counts)) / sum(counts)
        return SearchResult(
            torch.cat([each.bits for each in known]),
            torch.cat(ratios) if ratios else None,
            known[0].list_width,
            density,
            min(each.step for each in known),
        )

    def _remember(self, found: SearchResult, call: AttentionCall, batch: int) -> None:
        for key, own in self._keys(call, batch):
            self.memory[key] = found.of_batch(own)
        # Context windows may move from step to step: what the last two steps did not ask for is not
        # asked for again.
        last = self._last_asked
        for key in [x for x in self.memory if x[0] == call.layer and last[x] < call.step - 1]:
            del self.memory[key], last[key]


def _ratio(lse: Tensor, kept_lse: Tensor) -> Tensor:
    return (lse - kept_lse).clamp(0.0, HALF_MAX).half()


def search_steps(num_steps: int) -> tuple[int, ...]:
    """The steps of a schedule of so many that search."""
    if num_steps <= FEW_STEPS:
        return (0,)
    return (math.floor(FIRST * num_steps), math.floor(SECOND * num_steps))


def head_sparsities(sparsity: float) -> tuple[float, ...]:
    """The sparsities that heads share, highest first: three, or one if the lowest is negative."""
    if sparsity < 1 / 3:
        return (sparsity,)
    return ((1 + sparsity) / 2, sparsity, max(0.0, (3 * sparsity - 1) / 2))


def choose(recall: Tensor) -> Tensor:
    """The sparsity each head gets, of three: recall `(B, H)` -> `(B, H)` int64, 0 = highest."""
    heads = recall.shape[-1]
    count = (recall > GOOD_RECALL).sum(dim=-1, keepdim=True).clamp(max=heads // 2)
    order = recall.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)  # 0 = the highest recall
    return 1 - (rank < count).long() + (rank >= heads - count).long()
