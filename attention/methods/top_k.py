"""Block top-k: softmax over the kept blocks, with or without one pooled key per dropped block.

    plain   O_i = softmax over kept tokens of (q_i k^T / sqrt D) v
    pooled  the same softmax also holds, for every dropped block j, the logit
            q_i mean(k_j) / sqrt D + log n_j with the value mean(v_j); n_j is the block's number
            of tokens

Source: the pooled keys are those of sol-attn (arXiv 2607.24027); no state, no training.
"""

from __future__ import annotations

from torch import Tensor

from ...kernels import ops
from ...kernels.types import PooledKV
from ..accounting import pooled_flops
from ..call import AttentionCall
from .base import Method, MethodOutput


class TopK(Method):
    """The kept blocks and nothing else."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, out: Tensor | None = None
    ) -> MethodOutput:
        """See `Method.attend`."""
        routing = self.route(q, k, call)
        found, _ = ops.block_sparse_attention(
            q, k, v, routing.mask, scale=call.scale, backend=self.plan.backend, out=out
        )
        return MethodOutput(found, routing.mask, routing.density)


class PooledTopK(Method):
    """The kept blocks, and every other one as a single key."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, out: Tensor | None = None
    ) -> MethodOutput:
        """See `Method.attend`."""
        routing, backend = self.route(q, k, call), self.plan.backend
        kv_blocks = routing.mask.kv_blocks
        pooled = PooledKV(routing.pooled_k, ops.block_pool(v, kv_blocks, backend=backend))
        found, _ = ops.block_sparse_attention(
            q, k, v, routing.mask, pooled, scale=call.scale, backend=backend, out=out
        )
        batch, heads, tokens, head_dim = q.shape
        background = batch * pooled_flops(tokens, head_dim, heads, kv_blocks.num_blocks)
        return MethodOutput(found, routing.mask, routing.density, background)
