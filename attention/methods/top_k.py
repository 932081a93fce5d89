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
from .base import QKV, Method, MethodOutput, Routing


class TopK(Method):
    """The kept blocks and nothing else."""

    remembers = False

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, out: Tensor | None = None
    ) -> MethodOutput:
        """See `Method.attend`."""
        routing = self.route(q, k, call)
        found, mass = ops.block_sparse_attention(
            q,
            k,
            v,
            routing.mask,
            scale=call.scale,
            backend=self.plan.backend,
            out=out,
            eight_bit=self.eight_bit(k, v, call, routing.pooled_k),
        )
        cost = self.look(QKV(q, k, v), call, routing)
        return MethodOutput(
            found, routing.mask, routing.density, calibration=cost, heads=routing.heads, mass=mass
        )

    def observe(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> float:
        """See `Method.observe`."""
        if not self.probe_due(q, call):
            return 0.0
        return self.look(QKV(q, k, v), call, self.route(q, k, call))


class PooledTopK(Method):
    """The kept blocks, and every other one as a single key."""

    remembers = False

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, out: Tensor | None = None
    ) -> MethodOutput:
        """See `Method.attend`."""
        routing, backend = self.route(q, k, call), self.plan.backend
        pooled = self._pooled(v, routing)
        found, mass = ops.block_sparse_attention(
            q,
            k,
            v,
            routing.mask,
            pooled,
            scale=call.scale,
            backend=backend,
            out=out,
            eight_bit=self.eight_bit(k, v, call, routing.pooled_k),
        )
        cost = self.look(QKV(q, k, v), call, routing, pooled)
        batch, heads, tokens, head_dim = q.shape
        background = batch * pooled_flops(tokens, head_dim, heads, pooled.k.shape[2])
        return MethodOutput(
            found, routing.mask, routing.density, background, cost, heads=routing.heads, mass=mass
        )

    def observe(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> float:
        """See `Method.observe`."""
        if not self.probe_due(q, call):
            return 0.0
        routing = self.route(q, k, call)
        return self.look(QKV(q, k, v), call, routing, self._pooled(v, routing))

    def _pooled(self, v: Tensor, routing: Routing) -> PooledKV:
        blocks = routing.mask.kv_blocks
        return PooledKV(routing.pooled_k, ops.block_pool(v, blocks, backend=self.plan.backend))
