"""Every method beside dense attention on the same q, k, v: how far off each is, layer by layer, and what it costs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor

from ..kernels import ops
from .accounting import AttentionCost, dense_flops
from .adapters import Adapter
from .layout import TokenLayout
from .methods.base import LayerCall, LayerInputs, route
from .plan import SparsePlan
from .run import AttentionRun

SAMPLED_ROWS = 2048                         # of the video, spread evenly
STEPS = 8                                   # a run of so many steps is learned for once, in its first


@dataclass(frozen=True)
class Look:
    """Whose kept blocks are to be drawn: a layer, the number it has for people, and a head."""

    layer: Hashable
    number: int
    head: int


class Probe:
    """Stands in for an `AttentionRun`: gives out dense attention, so that every layer sees what it always sees.

    plans: the methods to try, by name; all are resolved with the adapter where it is theirs. look: whose kept blocks
    are drawn, or None; a head that the model lacks means its last. After the calls: `errors[name][layer]` relative to
    dense attention on some rows, `saved[name]` the share of FLOPs, `kept` the map `(Nq, Nk)` bool of the video's blocks
    (the first plan's).
    """

    def __init__(self, plans: Mapping[str, SparsePlan], adapter: Adapter | None, look: Look | None):
        def fitting(plan: SparsePlan) -> Adapter | None:
            return adapter if adapter is not None and adapter.info.method == plan.method else None

        self.runs = {name: AttentionRun(plan, fitting(plan)) for name, plan in plans.items()}
        self.plan = next(iter(self.runs.values())).plan
        methods = [run.method for run in self.runs.values()]
        self.method = SimpleNamespace(
            needs_x=any(method.needs_x for method in methods), needs_positions=any(m.needs_positions for m in methods),
            dense_reason=lambda step, steps: None,
        )
        self.look = look
        self.errors: dict[str, dict[Hashable, float]] = {name: {} for name in plans}
        self.kept: Tensor | None = None
        self._costs: dict[str, list[AttentionCost]] = {name: [] for name in plans}

    @property
    def saved(self) -> dict[str, float]:
        """Share of the self-attention FLOPs that each method saves in a call that learns nothing."""
        return {
            name: 1 - sum(cost.total for cost in costs) / sum(cost.dense for cost in costs)
            for name, costs in self._costs.items() if costs
        }

    def missing(self, inputs: LayerInputs) -> None:
        """Nothing: a method that lacks an input is left out of that call."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, layer: Hashable, step: int, conditioning,
        scale: float | None, steps: int, noise: float | None, inputs: LayerInputs, part: Hashable,
    ) -> tuple[Tensor, AttentionCost]:
        """The arguments and shapes of `AttentionRun.attend`; -> dense attention of all rows."""
        batch, heads, tokens, width = q.shape
        dense, _ = ops.dense_attention(q, k, v, scale, self.plan.backend)
        count = min(SAMPLED_ROWS, layout.video_tokens)
        rows = layout.before + torch.arange(count, device=q.device) * layout.video_tokens // count
        exact = dense.index_select(2, rows).float()
        for name, run in self.runs.items():
            if run.missing(inputs):
                continue
            own = replace(layout, order=run.plan.block_order)
            out, cost = run.attend(q, k, v, own, layer, 0, conditioning, scale, STEPS, noise, inputs, part)
            if cost.calibration:            # it has just learned, which is dearer, or dense; this is how it goes on
                del out
                out, cost = run.attend(q, k, v, own, layer, 1, conditioning, scale, STEPS, noise, inputs, part)
            off = (out.index_select(2, rows).float() - exact).norm() / exact.norm()
            self.errors[name][layer] = off.item()
            self._costs[name].append(cost)
        if self.look is not None and layer == self.look.layer and self.kept is None:
            self.look = replace(self.look, head=min(self.look.head, heads - 1))
            self.kept = self._kept_blocks(q, k, layout, layer, conditioning, scale)
        flops = batch * dense_flops(tokens, width, heads)
        return dense, AttentionCost(1.0, flops, flops)

    def _kept_blocks(self, q: Tensor, k: Tensor, layout: TokenLayout, layer: Hashable, conditioning, scale) -> Tensor:
        """Which blocks routing keeps for one head of the first batch row; on the CPU."""
        run = next(iter(self.runs.values()))
        layout = replace(layout, order=run.plan.block_order)
        tables = layout.tables(run.plan.keep_diagonal, run.plan.keep_first_frame, q.device)
        call = LayerCall(
            layer, 0, conditioning, layout, tables, q.shape[-1] ** -0.5 if scale is None else scale, run.plan.backend,
        )
        routing = route(q[:, :, call.video], k, call, run.plan)
        indices = routing.indices[0, self.look.head].cpu().long()
        counts = routing.counts[0, self.look.head].cpu()
        blocks = tables.video.shape[0]
        kept = torch.zeros(blocks, tables.keys.shape[0], dtype=torch.bool)
        real = torch.arange(indices.shape[1]) < counts[:, None]
        kept[torch.arange(blocks)[:, None].expand_as(indices)[real], indices[real]] = True
        return kept[:, :blocks]
