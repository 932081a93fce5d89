"""One sampling run of sparse attention: the only object that lives from call to call, made anew for every run."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import torch
from torch import Tensor

from ..kernels import dispatch, ops
from .accounting import AttentionCost, dense_flops, sparse_flops
from .adapters import Adapter
from .layout import BlockTables, TokenLayout
from .methods import LayerCall, LayerInputs, create
from .methods.base import routing_cost
from .plan import BLOCK, SparsePlan


def resolved(plan: SparsePlan, adapter: Adapter | None) -> SparsePlan:
    """The plan without an "auto", as it runs with an adapter. Raises ValueError where the two do not fit."""
    if adapter is None:
        return plan.resolve()
    plan = plan.resolve(adapter.info.method, adapter.info.block_order)
    return replace(plan, rank=plan.rank or adapter.use_rank)


def check_triton(plan: SparsePlan, device: torch.device, dtype: torch.dtype, width: int) -> None:
    """Raise TritonNotUsable where the plan demands Triton and its kernels cannot take such tensors, before any work."""
    reason = dispatch.why_not_triton(device, dtype, width, (BLOCK,)) if plan.backend == "triton" else None
    if reason:
        raise dispatch.TritonNotUsable(dispatch.explain(reason))


class AttentionRun:
    """Attends as a plan says; owns what the method remembers and the block tables. Drop it to free both.

    Raises ValueError when the plan asks for another method than the adapter was trained for.
    """

    def __init__(self, plan: SparsePlan, adapter: Adapter | None = None) -> None:
        self.plan = resolved(plan, adapter)
        self.method = create(self.plan, adapter)
        self._tables: dict[tuple[TokenLayout, torch.device], BlockTables] = {}

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, layer: Hashable = 0, step: int = 0,
        conditioning: tuple[tuple[Hashable, int], ...] | None = None, scale: float | None = None, steps: int = 1,
        noise: float | None = None, inputs: LayerInputs = LayerInputs(), part: Hashable = (),  # noqa: B008  a tuple
    ) -> tuple[Tensor, AttentionCost]:
        """Sparse self-attention of one layer.

        q, k, v `(B, H, L, D)` after RoPE, any strides, L = layout.tokens; layer and conditioning name what may be
        remembered for whom (conditioning: (key, batch rows) in batch order, by default one for the whole batch). step
        of steps and noise (1 = pure noise) place the call in the schedule; inputs are what some adapters need besides;
        part names the piece of a longer video that these tokens are.
        -> out `(B, H, L, D)` in q's dtype and token order, and what it cost. Text and reference tokens attend densely.
        Raises ValueError when the tensors do not fit the layout, or the method lacks an input.
        """
        batch, heads, tokens, width = q.shape
        if tokens != layout.tokens:
            raise ValueError(f"q has {tokens} tokens; the layout {layout} has {layout.tokens}")
        conditioning = conditioning or (("all", batch),)
        if sum(rows for _, rows in conditioning) != batch:
            raise ValueError(f"conditioning {conditioning} does not add up to a batch of {batch}")
        call = LayerCall(
            layer, step, conditioning, layout, self._block_tables(layout, q.device),
            width**-0.5 if scale is None else scale, self.plan.backend, steps, noise, inputs, part,
        )
        missing = self.missing(inputs)
        if missing:
            raise ValueError(missing)
        start, end = call.video.start, call.video.stop
        video = self.method.attend(q[:, :, start:end], k, v, call)
        parts = [video.out]
        if start:
            parts.insert(0, ops.dense_attention(q[:, :, :start], k, v, call.scale, call.backend)[0])
        if end < tokens:
            parts.append(ops.dense_attention(q[:, :, end:], k, v, call.scale, call.backend)[0])
        out = torch.cat(parts, dim=2) if len(parts) > 1 else video.out

        video_share = layout.video_tokens / tokens
        density = 1.0 - (1.0 - video.density) * video_share
        dense = batch * dense_flops(tokens, width, heads)
        cost = AttentionCost(
            density, dense, batch * sparse_flops(tokens, width, heads, density),
            routing_cost(q, call) if self.method.routes else 0.0, video.background, video.calibration, video.recall,
        )
        return out, cost

    def missing(self, inputs: LayerInputs) -> str | None:
        """What the method needs and inputs do not have, in words; None where all is there."""
        if self.method.needs_x and inputs.x is None:
            return f"{self.plan.method}'s gate needs the hidden state that enters the attention, which is not at hand"
        if self.method.needs_positions and inputs.positions is None:
            return f"{self.plan.method}'s low rank needs the model's RoPE angles, which are not at hand"
        return None

    def _block_tables(self, layout: TokenLayout, device: torch.device) -> BlockTables:
        key = (layout, device)
        if key not in self._tables:
            self._tables[key] = layout.tables(self.plan.keep_diagonal, self.plan.keep_first_frame, device)
        return self._tables[key]
