"""Attention that is trained through: what it finds out is fixed before the graph is made.

A layer is attended to twice, first without gradients: that calibrates, searches and probes. The
second time changes nothing, and neither does a third, by which gradient checkpointing makes the
graph anew. What was found belongs to one model call and lives as long as its graph. How many blocks
heads keep, an adapter's table says; without one it is carried on from call to call, whatever each
trains on, since no two may be alike.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import torch
from torch import Tensor

from .accounting import AttentionCost
from .allocation import Allocation, Curve, Parts
from .call import AttentionCall
from .plan import BLOCK, ResolvedPlan
from .run import AttentionRun


class TrainingRun:
    """Makes the attention of one model call after the other; owns what they share."""

    def __init__(self, plan: ResolvedPlan) -> None:
        query_block = str(BLOCK) if plan.query_block == "auto" else plan.query_block
        self.plan = replace(plan, query_block=query_block, precision="16-bit")
        self.allocation = Allocation(plan.probe_interval, plan.error_target)
        # Of the model call, where whoever trains tells it: the same number finds the same lists.
        self.number: int | None = None

    def model_call(self) -> AttentionRun:
        """The attention of the next model call, for all of its layers."""
        return _CallAttention(self.plan, self.allocation)


class _CallAttention(AttentionRun):
    def __init__(self, plan: ResolvedPlan, shared: Allocation) -> None:
        super().__init__(plan)
        table = plan.adapter is not None and plan.adapter.has("allocation")
        if self.method.allocation is not None:
            self.method.allocation = _FixedAllocation(shared, not table)
        self._prepares = self.method.remembers or self.method.allocation is not None
        self._prepared: set[Hashable] = set()

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> tuple[Tensor, AttentionCost]:
        """See `AttentionRun.attend`; differentiable in q, k, v and the layer's inputs."""
        key = call.layer, call.conditioning, call.window
        if self._prepares and key not in self._prepared:
            with torch.no_grad():
                super().attend(q.detach(), k.detach(), v.detach(), call)
            self._prepared.add(key)
        return super().attend(q, k, v, call)


ANY = [("training", slice(0, 1))]  # the first batch row speaks for all


class _FixedAllocation(Allocation):
    """A shared allocation as one model call has found it; what it probes is for the next.

    probes: whether it may; else an adapter's table says what there is to know.
    """

    def __init__(self, shared: Allocation, probes: bool) -> None:
        super().__init__(shared.interval, shared.error)
        self._shared = shared
        self._probes = probes
        self._fixed: dict[Hashable, list[int] | None] = {}
        self._probed: set[Hashable] = set()

    def due(self, layer: Hashable, step: int, parts: Parts, counts: tuple[int, ...]) -> bool:
        """See `Allocation.due`; once is enough for a model call."""
        asks = self._probes and layer not in self._probed
        return asks and self._shared.due(layer, step, ANY, counts)

    def add(self, layer: Hashable, step: int, parts: Parts, curve: Curve) -> None:
        """See `Allocation.add`."""
        self._probed.add(layer)
        self._shared.add(layer, step, ANY, curve)

    def kept(
        self, layer: Hashable, step: int, parts: Parts, counts: tuple[int, ...]
    ) -> list[list[int] | None]:
        """See `Allocation.kept`; the same to whoever asks again."""
        if (layer, counts) not in self._fixed:
            (self._fixed[layer, counts],) = self._shared.kept(layer, step, ANY, counts)
        return [self._fixed[layer, counts]] * max(own.stop for _, own in parts)
