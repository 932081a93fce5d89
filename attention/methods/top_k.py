"""Block top-k: softmax over the kept blocks, with or without one pooled pseudo-key for every block that was dropped.

    plain   O_i = softmax over kept tokens of (q_i k^T / sqrt D) v
    pooled  the same softmax also holds, for every dropped block j, the logit q_i mean(k_j) / sqrt D + log n_j
            with the value mean(v_j); n_j is the number of tokens of the block

Source: the pooled tail is that of sol-attn (arXiv 2607.24027); no state, no training.
"""

from __future__ import annotations

from torch import Tensor

from ...kernels import ops
from ..accounting import pooled_tail_flops
from ..plan import SparsePlan
from .base import LayerCall, Method, VideoOutput, route


class TopK(Method):
    """Block top-k; `tail` adds the pooled blocks."""

    def __init__(self, plan: SparsePlan, tail: bool) -> None:
        self.plan = plan
        self.tail = tail

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> VideoOutput:
        """See `Method.attend`."""
        routing = route(q, k, call, self.plan)
        pooled_v = ops.block_pool(v, call.tables.keys, call.backend) if self.tail else None
        out, _ = ops.block_sparse_attention(
            q, k, v, call.tables.video, call.tables.keys, routing.indices, routing.counts,
            routing.pooled_k if self.tail else None, pooled_v, call.scale, call.backend, trusted=True,
        )
        batch, heads, tokens, width = q.shape
        blocks = call.tables.keys.shape[0]
        background = batch * pooled_tail_flops(tokens, width, heads, blocks) if self.tail else 0.0
        return VideoOutput(out, routing.density, background)
