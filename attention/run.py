"""One sampling run of sparse attention: the only object that lives from call to call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.types import BlockMask
from .accounting import AttentionCost, dense_flops, sparse_flops
from .block_layout import TokenLayout
from .call import AttentionCall, LayerInputs
from .head_share import HeadShare
from .methods import Method, MethodOutput, create
from .methods.base import QKV, routing_cost
from .methods.calibration import Lesson
from .methods.precision import Precision
from .plan import ResolvedPlan
from .weighted_keys import merge_weighted


class Attention(Protocol):
    """What a host calls: an `AttentionRun`, or what stands in for one."""

    plan: ResolvedPlan

    @property
    def needs_x(self) -> bool: ...

    @property
    def needs_rope(self) -> bool: ...

    @property
    def always(self) -> bool:
        """Whether short videos and calls that drop nothing run by the method too."""
        ...

    @property
    def tells_mass(self) -> bool:
        """Whether layouts may have weighted keys."""
        ...

    def dense_reason(self, step: int, num_steps: int) -> str | None:
        """Why the method itself leaves a step of the schedule dense; None where it does not."""
        ...

    @property
    def lessons(self) -> Mapping[Hashable, Sequence[Lesson]]:
        """What has been learned so far, by layer."""
        ...

    @property
    def query_block(self) -> int:
        """Queries that keep the same key blocks, as far as that is known."""
        ...

    @property
    def precision(self) -> Precision:
        """How many calls attended in 8 bits, and which layers may."""
        ...

    def missing(self, inputs: LayerInputs) -> str | None:
        """What the method needs and inputs do not have, in words; None where all is there."""
        ...

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> tuple[Tensor, AttentionCost]:
        """Self-attention `(B, H, L, D)`, and what it cost."""
        ...

    def observe(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> float:
        """See a call that stays dense for now, to learn for the sparse ones: -> FLOPs of that."""
        ...


class AttentionRun:
    """Attends as a plan says; owns what its method remembers. Drop it to free that."""

    def __init__(self, plan: ResolvedPlan, share: HeadShare | None = None) -> None:
        """share: where other processes attend for the rest of the heads."""
        self.plan = plan
        self.method: Method = create(plan)
        if share is not None:
            self.method.share_heads(share)
        self.on_mask: Callable[[BlockMask], None] | None = None  # sees the kept blocks of each call

    @property
    def needs_x(self) -> bool:
        return self.method.needs_x

    @property
    def needs_rope(self) -> bool:
        return self.method.needs_rope

    @property
    def always(self) -> bool:
        return self.method.always

    @property
    def tells_mass(self) -> bool:
        return self.method.tells_mass

    @property
    def lessons(self) -> Mapping[Hashable, Sequence[Lesson]]:
        return self.method.lessons

    @property
    def query_block(self) -> int:
        return self.method.query_block

    @property
    def precision(self) -> Precision:
        return self.method.precision

    def dense_reason(self, step: int, num_steps: int) -> str | None:
        """See `Attention.dense_reason`."""
        return self.method.dense_reason(step, num_steps)

    def missing(self, inputs: LayerInputs) -> str | None:
        """See `Attention.missing`."""
        if self.needs_x and inputs.x is None:
            return (
                f"{self.plan.method}'s gate needs the hidden state that enters the attention, "
                "which is not available"
            )
        if self.needs_rope and inputs.rope is None:
            return (
                f"{self.plan.method}'s low-rank branch needs the model's RoPE angles, "
                "which are not available"
            )
        return None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> tuple[Tensor, AttentionCost]:
        """Sparse self-attention of one layer.

        q, k, v `(B, H, L, D)` after RoPE, any strides, L = call.layout.tokens -> out of q's shape,
        dtype and token order, and what it cost. Text and reference tokens attend densely; hidden
        tokens get 0. q may be the video's alone, and has to be where keys are weighted. Raises
        ValueError when the tensors do not fit the layout, or the method lacks an input.
        """
        layout = call.layout
        self._check_tokens(q, layout)
        call.conditionings(q.shape[0])
        missing = self.missing(call.inputs)
        if missing:
            raise ValueError(missing)
        self.method.begin(call)
        alone = q.shape[2] == layout.video_tokens
        video = layout.video_rows(q.shape[2])
        gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        # One tensor that every part is written into; gradients have to put the parts together.
        out = None if alone or gradients else ops.empty_nhd(q, q.shape[2])
        gate = self.method.gate(call)
        with _full_precision(q.device):
            own = None if out is None else out[:, :, video]
            found = self.method.attend(q[:, :, video], k, v, call, own)
            self.method.judge_precision(QKV(q[:, :, video], k, v), call)
            if self.on_mask is not None and found.mask is not None:
                self.on_mask(found.mask)
            if layout.weighted:
                assert found.mass is not None
                merged = merge_weighted(q, k, v, (found.out, found.mass), call, self.plan)
                found = found._replace(out=merged)
            if out is not None:
                self._attend_beside(q, k, v, call, out)
            elif not alone:
                out = self._with_beside(q, k, v, call, found.out)
            whole = found.out if out is None else out
            whole = self.method.add_branch(q, k, v, whole, gate, call)
        return whole, self._cost(q, call, found)

    def observe(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> float:
        """See `Attention.observe`."""
        call.conditionings(q.shape[0])
        if self.missing(call.inputs):
            return 0.0
        self.method.begin(call)
        video = call.layout.video_rows(q.shape[2])
        with _full_precision(q.device), torch.no_grad():
            return self.method.observe(q[:, :, video], k, v, call)

    def _check_tokens(self, q: Tensor, layout: TokenLayout) -> None:
        fits = (layout.video_tokens,) if layout.weighted else (layout.tokens, layout.video_tokens)
        if q.shape[2] not in fits:
            raise ValueError(f"q has {q.shape[2]} tokens; the layout {layout} has {fits[0]}")
        if layout.weighted and not self.tells_mass:
            raise ValueError(f"{self.plan.method} cannot take weighted keys; found {layout}")

    def _attend_beside(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, out: Tensor
    ) -> None:
        """Write the attention of the tokens around the video into `out`."""
        kv_blocks = self.method.seen_keys(call.layout, q.device)
        for part in _beside(call):
            ops.dense_attention(
                q[:, :, part],
                k,
                v,
                kv_blocks,
                scale=call.scale,
                backend=self.plan.backend,
                out=out[:, :, part],
            )
        for start, stop in call.layout.hidden:
            out[:, :, start:stop] = 0.0

    def _with_beside(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, video: Tensor
    ) -> Tensor:
        """The same as a new tensor, which autograd can follow."""
        kv_blocks, parts = self.method.seen_keys(call.layout, q.device), [video]
        for part in _beside(call):
            found, _ = ops.dense_attention(
                q[:, :, part], k, v, kv_blocks, scale=call.scale, backend=self.plan.backend
            )
            parts.insert(0 if part.start == 0 else len(parts), found)
        whole = torch.cat(parts, dim=2)
        if not call.layout.hidden:
            return whole
        hidden = torch.zeros(call.layout.tokens, 1, dtype=torch.bool, device=q.device)
        for start, stop in call.layout.hidden:
            hidden[start:stop] = True
        return whole.masked_fill(hidden, 0.0)  # not a product: hidden text may hold NaN

    def _cost(self, q: Tensor, call: AttentionCall, found: MethodOutput) -> AttentionCost:
        batch, heads, queries, head_dim = q.shape
        layout, tokens = call.layout, call.layout.attended_tokens
        # Where the video's queries come alone, the others are no part of this call.
        rows = tokens if queries == layout.tokens else layout.video_tokens
        share = layout.video_tokens / rows * layout.listed_tokens / tokens  # that is sparse at all
        density, batch = 1.0 - (1.0 - found.density) * share, batch * rows / tokens
        routing = 0.0
        if self.method.routes:
            routing = routing_cost(q, self.method.blocks(call.layout, q.device))
        return AttentionCost(
            density,
            batch * dense_flops(tokens, head_dim, heads),
            batch * sparse_flops(tokens, head_dim, heads, density),
            routing,
            found.background,
            found.calibration,
            found.recall,
            tuple(1.0 - (1.0 - each) * share for each in found.heads),
        )


def _beside(call: AttentionCall) -> list[slice]:
    """The tokens before and after the video."""
    video, tokens = call.layout.video, call.layout.tokens
    parts = [slice(0, video.start), slice(video.stop, tokens)]
    return [part for part in parts if part.stop > part.start]


def _full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast off: sums and solves choose their own precision."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
