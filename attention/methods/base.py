"""The contract of a method, and what all methods share: routing, allocation, exact queries."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels import ops
from ...kernels.types import (
    BlockLayout,
    BlockMask,
    EightBit,
    PooledKV,
    Prefixes,
    RankedBlocks,
    TokenBlocks,
)
from ..accounting import probe_flops, routing_flops
from ..adapters.adapter import layer_identity
from ..allocation import Allocation, Curve, from_shares, probe_counts
from ..block_layout import TokenLayout
from ..call import AttentionCall
from ..head_share import HeadShare
from ..plan import BLOCK, ResolvedPlan
from .adapter_terms import at_noise
from .calibration import Lesson
from .precision import Precision

PROBED_ROWS = 64  # queries that a probe computes exactly; more change nothing that was measured
WIDE = 2 * BLOCK  # queries of a block where the probes allow it: faster
WIDE_COSTS = 0.05  # how much more error, or more blocks for the same error, it may cost


class MethodOutput(NamedTuple):
    """What a method returns for the video's queries."""

    out: Tensor  # (B, H, Lv, D)
    mask: BlockMask | None  # the kept blocks; None where all or none were computed
    density: float  # kept blocks / all blocks, mean over query blocks
    background: float = 0.0  # FLOPs of the background
    calibration: float = 0.0  # FLOPs of calibration or search in this call
    recall: float | None = None  # softmax mass kept, where this call measured it
    heads: tuple[float, ...] = ()  # density of each head, mean over the batch, where they differ
    # (B, H, Lv): log of the softmax mass that out stands for; for layouts with weighted keys.
    mass: Tensor | None = None


class Queries(NamedTuple):
    """Some of the video's queries, spread evenly over its blocks; the same for every head."""

    tokens: Tensor  # (R,): their places in the video
    blocks: Tensor  # (R,): their query blocks


class Probe(NamedTuple):
    """Exact queries, and what is left of them when their rows keep some number of blocks."""

    allocation: Allocation  # what learns from it
    queries: Queries
    q: Tensor  # (B, H, R, D)
    counts: tuple[int, ...]  # the P numbers of kept blocks, see `probe_counts`
    mean: int  # what sparsity asks for, one of them
    blocks: int  # how many there are to keep
    found: Prefixes


class QKV(NamedTuple):
    """The video's queries `(B, H, Lv, D)`, all keys and values `(B, H, L, D)`; after RoPE."""

    q: Tensor
    k: Tensor
    v: Tensor


class Routing(NamedTuple):
    """Kept key blocks of every query block, with the pooled tensors they were chosen by."""

    mask: BlockMask
    dropped_lse: Tensor  # (B, H, Nq): log of the pooled mass of the blocks that were not kept
    pooled_q: Tensor  # (B, H, Nq, D)
    pooled_k: Tensor  # (B, H, Nk, D)
    density: float
    heads: tuple[float, ...] = ()  # that of each head, mean over the batch, where they differ


class Method:
    """One instance serves one sampling run and owns whatever it remembers between calls."""

    routes = True  # scores blocks in every call
    remembers = True  # something from one call of a layer to the next
    always = False  # runs whatever length and sparsity: dense attention is not what it stands for
    fewest = 1  # blocks that every head keeps: none is enough for a method with a background
    tells_mass = True  # of the softmax, so that weighted keys can be added to its output
    needs_x = False  # calls without inputs.x cannot run
    needs_rope = False  # calls without inputs.rope cannot run

    def __init__(self, plan: ResolvedPlan) -> None:
        self.plan = plan
        self._blocks: dict[tuple[TokenLayout, torch.device, int], BlockLayout] = {}
        # What an adapter says that heads keep, for the last noise that was asked for.
        self._from_adapter: tuple[Hashable, Mapping[Hashable, list[int]]] | None = None
        self.lessons: dict[Hashable, list[Lesson]] = {}  # by layer, what is worth keeping
        self.allocation: Allocation | None = None
        self.query_block = plan.query_tokens
        # The same with query blocks of WIDE, until the run knows what those cost.
        self._wide: Allocation | None = None
        self.precision = Precision(plan)
        self.share: HeadShare | None = None
        if plan.allocates:
            self.allocation = Allocation(plan.probe_interval, plan.error_target)
            if plan.query_block == "auto" and plan.probes:
                self._wide = Allocation(plan.probe_interval, plan.error_target)

    def share_heads(self, share: HeadShare) -> None:
        """Attend for a share of the heads; others attend for the rest."""
        self.share = share
        for allocation in (self.allocation, self._wide):
            if allocation is not None:
                allocation.share = share

    def dense_reason(self, step: int, num_steps: int) -> str | None:
        """Why the method itself leaves a step of the schedule dense; None where it does not."""
        return None

    def begin(self, call: AttentionCall) -> None:
        """Called before every call: once all layers have been probed, choose the query blocks."""
        if self._wide is None or self.allocation is None:
            return
        narrow, wide = (each.outcome(call.step) for each in (self.allocation, self._wide))
        if narrow is None or wide is None:
            return
        if wide[0] < math.inf and all(x <= (1.0 + WIDE_COSTS) * y for x, y in zip(wide, narrow)):
            self.allocation, self.query_block = self._wide, WIDE
            self.forget()
        self._wide = None

    def forget(self) -> None:
        """Drop what was learned with other query blocks."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, out: Tensor | None = None
    ) -> MethodOutput:
        """q `(B, H, Lv, D)` of the video; k, v `(B, H, L, D)` of the whole sequence, after RoPE.

        out `(B, H, Lv, D)`: where to write; without one, a new tensor.
        """
        raise NotImplementedError

    def gate(self, call: AttentionCall) -> Tensor | None:
        """What the model's own gate says `(B, L, H*D)`, in the precision that the model runs in."""
        return None

    def add_branch(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        gate: Tensor | None,
        call: AttentionCall,
    ) -> Tensor:
        """Add what a method has for all rows, those beside the video included: -> out.

        q, k, v, out `(B, H, L, D)`; out may be overwritten where no gradients are required.
        """
        return out

    def eight_bit(
        self, k: Tensor, v: Tensor, call: AttentionCall, means: Tensor | None = None
    ) -> EightBit | None:
        """Keys and values in 8 bits, where this call attends in them; means: of the key blocks."""
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            return None
        layout = self.blocks(call.layout, k.device)
        return self.precision.keys_and_values(k, v, call.layer, layout, means)

    def judge_precision(
        self,
        qkv: QKV,
        call: AttentionCall,
        exact: tuple[Tensor, Tensor] | None = None,
        lost: Tensor | None = None,
    ) -> None:
        """Find out whether a layer may attend in 8 bits, where that is open.

        exact: some queries `(B, H, R, D)` and their exact outputs, where known; lost: see
        `Precision.judge`.
        """
        if not self.precision.open(call.layer, qkv.q, self.query_block):
            return
        with torch.no_grad():
            q, k, v = (x.detach() for x in qkv)
            blocks, backend = self.blocks(call.layout, q.device), self.plan.backend
            if exact is None:
                some_q = q.index_select(2, self.some_queries(q, call, PROBED_ROWS).tokens)
                seen = self.seen_keys(call.layout, q.device)
                out, _ = ops.dense_attention(some_q, k, v, seen, scale=call.scale, backend=backend)
                exact = some_q, out
            small = self.precision.quantized(k, v, blocks.kv_blocks, None)
            found, _ = ops.dense_attention(
                exact[0],
                k,
                v,
                blocks.kv_blocks,
                scale=call.scale,
                backend=backend,
                eight_bit=small,
            )
            self.precision.judge(call.layer, exact[1], found, lost)

    def observe(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> float:
        """See a call that stays dense, for what follows it; arguments as of `attend`: -> FLOPs."""
        return 0.0

    def blocks(
        self, layout: TokenLayout, device: torch.device, query_block: int | None = None
    ) -> BlockLayout:
        """Blocks of a token layout, made once for a run. query_block: other than this run's."""
        size = query_block or self.query_block
        key = (layout, device, size)
        if key not in self._blocks:
            plan = self.plan
            self._blocks[key] = layout.blocks(
                plan.keep_diagonal, plan.keep_first_frame, device, plan.key_tokens, size
            )
        return self._blocks[key]

    def seen_keys(self, layout: TokenLayout, device: torch.device) -> TokenBlocks | None:
        """The keys that are neither hidden nor weighted; None for all."""
        every = layout.listed_tokens == layout.tokens
        return None if every else self.blocks(layout, device).kv_blocks

    def route(
        self, q: Tensor, k: Tensor, call: AttentionCall, pooled_k: Tensor | None = None
    ) -> Routing:
        """Keep the best `1 - sparsity` of the video's blocks, and what the layout requires.

        pooled_k: the key blocks' means, where the caller has them already.
        """
        blocks, backend = self.blocks(call.layout, q.device), self.plan.backend
        # Which blocks are kept has no gradient.
        pooled_q = ops.block_pool(q.detach(), blocks.q_blocks, backend=backend)
        if pooled_k is None:
            pooled_k = ops.block_pool(k, blocks.kv_blocks, backend=backend)
        topk = self.kept(q, call)
        mask, dropped_lse = ops.block_select(
            pooled_q, pooled_k, blocks, topk, scale=call.scale, backend=backend
        )
        if isinstance(topk, int):
            return Routing(mask, dropped_lse, pooled_q, pooled_k, blocks.density(topk))
        found = {count: blocks.density(count) for count in set(topk)}
        (batch, heads), each = q.shape[:2], [found[count] for count in topk]
        by_head = tuple(sum(each[head::heads]) / batch for head in range(heads))
        density = sum(by_head) / heads
        return Routing(mask, dropped_lse, pooled_q, pooled_k, density, by_head)

    def kept(self, q: Tensor, call: AttentionCall) -> int | list[int]:
        """How many blocks rows keep by score: one number, or one for each of B * H heads."""
        rows = self.kept_by_all(q, call)
        if isinstance(rows, int):
            return rows
        own = slice(None) if self.share is None else self.share.own(len(rows[0]))
        return [count for row in rows for count in row[own]]

    def kept_by_all(self, q: Tensor, call: AttentionCall) -> int | list[list[int]]:
        """The same by batch row, with the heads that other processes attend for."""
        blocks = self.blocks(call.layout, q.device)
        mean = self.plan.topk(blocks.num_ranked)
        if self.allocation is None:
            return mean
        batch, heads = q.shape[:2]
        heads *= 1 if self.share is None else self.share.size
        parts, probed = call.conditionings(batch), self._probed(blocks)
        rows = self.allocation.kept(call.layer, call.step, parts, probed)
        start = self._start_table(call, mean, probed)
        if start is None and all(row is None for row in rows):
            return mean
        first = (start or {}).get(call.layer, [mean] * heads)
        return [row or first for row in rows]

    def _start_table(
        self, call: AttentionCall, mean: int, probed: tuple[int, ...]
    ) -> Mapping[Hashable, list[int]] | None:
        """What an adapter says that heads keep, by layer, at a call's noise; None without one."""
        adapter = self.plan.adapter
        if adapter is None or not adapter.knows(call.layer):
            return None
        key = (mean, probed, call.sigma)
        if self._from_adapter is None or self._from_adapter[0] != key:
            # ComfyUI may keep some of an adapter's tensors on the CPU.
            levels, dense = adapter.info.noise_levels, self.plan.dense_layers
            shares = {
                layer: at_noise(weights["allocation"].detach().cpu(), 1, levels, call.sigma)
                for number, (layer, weights) in enumerate(adapter.layers.items())
                if "allocation" in weights and number not in dense
            }
            each = torch.stack(list(shares.values()))
            if dense:  # what those had is not there to be shared
                each = each / each.mean().clamp(min=1e-6)
            dealt = from_shares(each.flatten().tolist(), mean, probed)
            heads = adapter.info.num_heads
            table = {
                layer_identity(layer): dealt[i * heads : (i + 1) * heads]
                for i, layer in enumerate(shares)
            }
            self._from_adapter = key, table
        return self._from_adapter[1]

    def _probed(self, blocks: BlockLayout) -> tuple[int, ...]:
        return probe_counts(self.plan.topk(blocks.num_ranked), blocks.num_ranked, self.fewest)

    def probe_due(self, q: Tensor, call: AttentionCall) -> bool:
        """Whether this call has to be probed."""
        allocation = self.allocation if self.plan.probes else None
        if allocation is None or self.plan.drops_nothing(call.layout.video_tokens):
            return False
        parts, blocks = call.conditionings(q.shape[0]), self.blocks(call.layout, q.device)
        return allocation.due(call.layer, call.step, parts, self._probed(blocks))

    def probes(
        self, qkv: QKV, call: AttentionCall, routing: Routing, pooled: PooledKV | None = None
    ) -> list[Probe]:
        """What some queries would lose by keeping fewer or more blocks; empty where nobody asks.

        pooled: what the method keeps of the blocks that it drops. One probe for each size of query
        blocks that is still open.
        """
        q, k, v = (x.detach() for x in qkv)
        if not self.probe_due(q, call):
            return []
        assert self.allocation is not None
        blocks, mean = self.blocks(call.layout, q.device), routing.pooled_q
        queries = self.some_queries(q, call, min(PROBED_ROWS, self.plan.calibrate_rows))
        some_q = q.index_select(2, queries.tokens)
        asking = [(self.allocation, blocks, mean, queries)]
        if self._wide is not None:
            wide = self.blocks(call.layout, q.device, WIDE)
            mean = ops.block_pool(q, wide.q_blocks, backend=self.plan.backend)
            own = queries._replace(blocks=queries.blocks // (WIDE // self.query_block))
            asking.append((self._wide, wide, mean, own))
        counts, there, found = self._probed(blocks), blocks.num_ranked, []
        for allocation, blocks, mean, queries in asking:
            required = blocks.required
            if required is not None:
                required = required.mask.index_select(0, queries.blocks)
            means = mean.index_select(2, queries.blocks), routing.pooled_k.detach()
            ranked = RankedBlocks(blocks.kv_blocks, *means, required, pooled)
            prefixes = ops.prefix_attention(some_q, k, v, ranked, counts, scale=call.scale)
            known = counts, self.plan.topk(there), there
            found.append(Probe(allocation, queries, some_q, *known, prefixes))
        return found

    def look(
        self, qkv: QKV, call: AttentionCall, routing: Routing, pooled: PooledKV | None = None
    ) -> float:
        """Probe a call, where that is due, and learn from kept blocks as they are: -> FLOPs."""
        probes = self.probes(qkv, call, routing, pooled)
        return sum(self.learn(call, probe, probe.found.out) for probe in probes)

    def learn(self, call: AttentionCall, probe: Probe, outputs: Tensor) -> float:
        """Take in the method's own outputs `(P, B, H, R, D)` for a probe: -> FLOPs of the probe."""
        exact = probe.found.exact_out
        batch, heads, count, head_dim = probe.q.shape
        each = call.layout.video_tokens / count
        errors = each * (outputs - exact).square().sum(dim=(-2, -1))
        energy = each * (exact - exact.mean(dim=2, keepdim=True)).square().sum(dim=(-2, -1))
        errors = errors.movedim(0, -1)
        curve = Curve(probe.counts, probe.mean, probe.blocks, errors, energy)
        probe.allocation.add(call.layer, call.step, call.conditionings(batch), curve)
        tokens = call.layout.attended_tokens
        return batch * probe_flops(tokens, head_dim, heads, count, len(probe.counts))

    def some_queries(self, q: Tensor, call: AttentionCall, count: int) -> Queries:
        """So many of the video's queries at most, one drawn from each even part."""
        q_blocks = self.blocks(call.layout, q.device).q_blocks
        listed = q_blocks.num_listed
        count = min(count, listed)
        generator = torch.Generator().manual_seed(call.step)
        inside = torch.rand(count, generator=generator, dtype=torch.float64)
        slots = ((torch.arange(count) + inside) * (listed / count)).long()
        slots = slots.to(q.device, non_blocking=True)
        # Of empty slots, which only tiles have before the last, token 0 takes the place.
        return Queries(q_blocks.slots[slots], slots // q_blocks.block_size)


def routing_cost(q: Tensor, blocks: BlockLayout) -> float:
    """FLOPs of `Method.route` for all batch rows."""
    batch, heads, _, head_dim = q.shape
    q_blocks, kv_blocks = blocks.q_blocks, blocks.kv_blocks
    per_batch = routing_flops(
        kv_blocks.num_listed, head_dim, heads, q_blocks.num_blocks, kv_blocks.num_blocks
    )
    return batch * per_batch
