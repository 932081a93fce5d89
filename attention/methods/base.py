"""The contract of a method, and the routing that all methods share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels import ops
from ...kernels.types import BlockLayout, BlockMask, TokenBlocks
from ..accounting import routing_flops
from ..block_layout import TokenLayout
from ..call import AttentionCall
from ..plan import ResolvedPlan


class MethodOutput(NamedTuple):
    """What a method returns for the video's queries."""

    out: Tensor  # (B, H, Lv, D)
    mask: BlockMask | None  # the kept blocks; None where all or none were computed
    density: float  # kept blocks / all blocks, mean over query blocks
    background: float = 0.0  # FLOPs of the background
    calibration: float = 0.0  # FLOPs of calibration or search in this call
    recall: float | None = None  # softmax mass kept, where this call measured it


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


class Method:
    """One instance serves one sampling run and owns whatever it remembers between calls."""

    routes = True  # scores blocks in every call
    needs_x = False  # calls without inputs.x cannot run
    needs_rope = False  # calls without inputs.rope cannot run

    def __init__(self, plan: ResolvedPlan) -> None:
        self.plan = plan
        self._blocks: dict[tuple[TokenLayout, torch.device], BlockLayout] = {}

    def dense_reason(self, step: int, num_steps: int) -> str | None:
        """Why the method itself leaves a step of the schedule dense; None where it does not."""
        return None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, out: Tensor | None = None
    ) -> MethodOutput:
        """q `(B, H, Lv, D)` of the video; k, v `(B, H, L, D)` of the whole sequence, after RoPE.

        out `(B, H, Lv, D)`: where to write; without one, a new tensor.
        """
        raise NotImplementedError

    def blocks(self, layout: TokenLayout, device: torch.device) -> BlockLayout:
        """Blocks of a token layout, made once for a run."""
        key = (layout, device)
        if key not in self._blocks:
            plan = self.plan
            self._blocks[key] = layout.blocks(
                plan.keep_diagonal, plan.keep_first_frame, device, plan.key_tokens
            )
        return self._blocks[key]

    def seen_keys(self, layout: TokenLayout, device: torch.device) -> TokenBlocks | None:
        """The keys that are not hidden; None for all."""
        return self.blocks(layout, device).kv_blocks if layout.hidden else None

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
        topk = self.plan.topk(blocks.num_ranked)
        mask, dropped_lse = ops.block_select(
            pooled_q, pooled_k, blocks, topk, scale=call.scale, backend=backend
        )
        return Routing(mask, dropped_lse, pooled_q, pooled_k, blocks.density(topk))


def routing_cost(q: Tensor, blocks: BlockLayout) -> float:
    """FLOPs of `Method.route` for all batch rows."""
    batch, heads, _, head_dim = q.shape
    q_blocks, kv_blocks = blocks.q_blocks, blocks.kv_blocks
    per_batch = routing_flops(
        kv_blocks.num_listed, head_dim, heads, q_blocks.num_blocks, kv_blocks.num_blocks
    )
    return batch * per_batch
