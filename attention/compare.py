"""Every method beside dense attention on the same q, k, v: error by layer, and cost."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.types import BlockLayout, BlockMask
from .accounting import AttentionCost, dense_flops
from .call import AttentionCall, LayerInputs
from .methods.calibration import Lesson
from .methods.precision import Precision
from .plan import ResolvedPlan
from .run import AttentionRun
from .weighted_keys import merge_weighted

SAMPLED_QUERIES = 2048  # of the video, spread evenly
STEPS = 8  # AdaSpa searches once in a run of so many


@dataclass(frozen=True)
class MapSelection:
    """Whose kept blocks are drawn: a layer, the number it has for people, and a head."""

    layer: Hashable
    number: int
    head: int


class Error(NamedTuple):
    """How far a layer's attention is from dense attention."""

    relative: float  # to the norm of dense attention
    absolute: float  # root mean square


class MethodComparison:
    """Stands in for an `AttentionRun` and returns dense attention, so that layers see no change.

    plans: the methods to try, by name. selection: whose kept blocks are drawn, or None; a head that
    the model lacks means its last. Where `learns`, the model is called twice: with `learning` set,
    in which methods see every layer, and without. After the calls: `errors[name][layer]` on some
    queries, relative and absolute, `saved[name]` the share of FLOPs, `kept` the map `(Nq, Nk)` bool
    of the video's blocks that the first plan's method kept.
    """

    def __init__(
        self, plans: Mapping[str, ResolvedPlan], selection: MapSelection | None = None
    ) -> None:
        self.runs = {name: AttentionRun(plan) for name, plan in plans.items()}
        self.plan = next(iter(plans.values()))
        self.needs_x = any(run.needs_x for run in self.runs.values())
        self.needs_rope = any(run.needs_rope for run in self.runs.values())
        self.always = True  # everything is compared
        self.tells_mass = True  # a method that cannot take weighted keys is left out of that call
        self.selection = selection
        self.learns = any(plan.probes for plan in plans.values())
        self.learning = False
        self.errors: dict[str, dict[Hashable, Error]] = {name: {} for name in plans}
        self.kept: Tensor | None = None
        self._costs: dict[str, list[AttentionCost]] = {name: [] for name in plans}

    @property
    def saved(self) -> dict[str, float]:
        """Share of the self-attention FLOPs that each method saves in a steady call."""
        return {
            name: 1 - sum(cost.total for cost in costs) / sum(cost.dense for cost in costs)
            for name, costs in self._costs.items()
            if costs
        }

    @property
    def lessons(self) -> dict[Hashable, list[Lesson]]:
        """None: what is learned here serves the comparison."""
        return {}

    @property
    def query_block(self) -> int:
        """That of the first method."""
        return next(iter(self.runs.values())).query_block

    @property
    def precision(self) -> Precision:
        """That of the first method."""
        return next(iter(self.runs.values())).precision

    def dense_reason(self, step: int, num_steps: int) -> None:
        """Nothing: every step is compared."""

    def missing(self, inputs: LayerInputs) -> None:
        """Nothing: a method that lacks an input is left out of that call."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> tuple[Tensor, AttentionCost]:
        """As `AttentionRun.attend`, with dense attention of all queries as its result."""
        batch, heads, _, head_dim = q.shape
        first = next(iter(self.runs.values()))
        call = replace(call, step=0, num_steps=STEPS)
        seen = first.method.seen_keys(call.layout, q.device)
        layout, plan = call.layout, self.plan
        found = ops.dense_attention(q, k, v, seen, scale=call.scale, backend=plan.backend)
        dense = merge_weighted(q, k, v, found, call, plan)
        flops = batch * dense_flops(layout.attended_tokens, head_dim, heads)
        if self.learning:
            for run in self.runs.values():
                run.observe(q, k, v, _own_order(run, call))
            return dense, AttentionCost(1.0, flops, flops)
        count = min(SAMPLED_QUERIES, layout.video_tokens)
        positions = torch.arange(count, device=q.device) * layout.video_tokens // count
        tokens = layout.video_rows(q.shape[2]).start + positions
        exact = dense.index_select(2, tokens).float()
        self._watch_kept_blocks(first, call, heads)
        for name, run in self.runs.items():
            if run.missing(call.inputs) or (layout.weighted and not run.tells_mass):
                continue
            out, cost = self._tried(run, q, k, v, call)
            off = (out.index_select(2, tokens).float() - exact).norm().item()
            self.errors[name][call.layer] = Error(
                off / exact.norm().item(), off / exact.numel() ** 0.5
            )
            self._costs[name].append(cost)
        first.on_mask = None
        return dense, AttentionCost(1.0, flops, flops)

    def observe(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> float:
        """Nothing is learned from dense calls."""
        return 0.0

    def _watch_kept_blocks(self, run: AttentionRun, call: AttentionCall, heads: int) -> None:
        """Let the selected layer's first call note which of the video's blocks are kept."""
        selection = self.selection
        if selection is None or call.layer != selection.layer or self.kept is not None:
            return
        self.selection = selection = replace(selection, head=min(selection.head, heads - 1))

        def note(mask: BlockMask) -> None:
            own = BlockLayout(mask.q_blocks, mask.kv_blocks).num_ranked
            self.kept = mask.to_dense()[0, selection.head, :, :own].cpu()

        run.on_mask = note

    def _tried(
        self, run: AttentionRun, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> tuple[Tensor, AttentionCost]:
        # What was seen of all layers counts from the next step on.
        call = _own_order(run, replace(call, step=1) if run.plan.probes else call)
        out, cost = run.attend(q, k, v, call)
        # It has just learned, which costs more, or is dense; this is how it goes on.
        if cost.calibration:
            del out
            out, cost = run.attend(q, k, v, call)
        return out, cost


def _own_order(run: AttentionRun, call: AttentionCall) -> AttentionCall:
    return replace(call, layout=replace(call.layout, order=run.plan.block_order))
