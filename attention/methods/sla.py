"""SLA: kept blocks plus a linear branch with a learned projection.

    released   O = O_s + W O_l + b,  O_l = phi(q) sum(phi(k)^T v) / (1e-5 + phi(q) . sum(phi(k))),
               over ALL tokens
    paper      the same with O_l over a row's marginal blocks only: neither kept nor among its worst
               10 %; phi = softmax over the channels of the rotated q and k; W (D, D), b (D) shared
               by a layer's heads

Exact saving of the released form: W is folded into the state, sum(phi(k)^T v) W^T, once per head.
Source: SLA (arXiv 2509.24006), thu-ml/SLA and thu-ml/TurboDiffusion, whose checkpoints are of the
released form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...kernels import ops
from ...kernels.types import FeatureMap, LinearBranch, LinearState
from ..accounting import linear_flops, marginal_flops
from ..call import AttentionCall
from .adapter_terms import layer_weights
from .base import Method, MethodOutput, Routing

EPS = 1e-5  # beside the SUM of phi(k)
NEGLIGIBLE = 0.10  # of the blocks of a row, in the paper's form
FEATURES = FeatureMap("softmax")


class SLA(Method):
    """Stateless: everything follows from the call and the weights."""

    remembers = False
    tells_mass = False  # the linear branch has none

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, out: Tensor | None = None
    ) -> MethodOutput:
        """See `Method.attend`."""
        assert self.plan.adapter is not None
        weights = layer_weights(self.plan.adapter, call.layer, q.device)
        wide = torch.promote_types(q.dtype, torch.float32)
        weight, bias = weights["weight"].to(wide), weights["bias"].to(wide)
        routing = self.route(q, k, call)
        small = self.eight_bit(k, v, call, routing.pooled_k)
        options = {"scale": call.scale, "backend": self.plan.backend, "eight_bit": small}
        batch, heads, tokens, head_dim = q.shape
        if self.plan.sla_variant == "paper":
            blocks = self.blocks(call.layout, q.device)
            near, _ = ops.block_sparse_attention(q, k, v, routing.mask, **options)
            far = ops.marginal_linear(q, k, v, blocks, _marginal(routing), eps=EPS)
            found = (near.to(wide) + far.to(wide) @ weight.T + bias).to(q.dtype)
            counts = blocks.q_blocks.num_blocks, blocks.kv_blocks.num_blocks
            flops = marginal_flops(tokens, head_dim, heads, *counts)
            found = found if out is None else out.copy_(found)
            return MethodOutput(found, routing.mask, routing.density, batch * flops)
        k_seen, v_seen = self._seen(k, v, call)
        kv_state, normalizer = ops.low_rank_state(
            k_seen, v_seen, FEATURES, backend=self.plan.backend
        )
        # The states are means over the keys.
        kv_state = kv_state @ weight.T.to(kv_state.dtype)
        state = LinearState(kv_state, normalizer, EPS / k_seen.shape[2])
        branch = LinearBranch(FEATURES, state, bias)
        found = ops.block_sparse_linear(q, k, v, routing.mask, branch, **options, out=out)
        flops = batch * linear_flops(tokens, head_dim, heads)
        return MethodOutput(found, routing.mask, routing.density, flops)

    def _seen(self, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Keys and values without hidden ones, which no model that SLA has weights for has."""
        seen = self.seen_keys(call.layout, k.device)
        if seen is None:
            return k, v
        listed = seen.tokens[~seen.empty].long()
        return k.index_select(2, listed), v.index_select(2, listed)


def _marginal(routing: Routing) -> Tensor:
    """Blocks neither kept nor among the worst of their row: -> `(B, H, Nq, Nk)` bool."""
    scores = routing.pooled_q @ routing.pooled_k.mT
    kept = routing.mask.to_dense()
    worst = math.floor(NEGLIGIBLE * scores.shape[-1] + 1e-6)
    if worst == 0:
        return ~kept
    lowest = scores.topk(worst, dim=-1, largest=False).indices
    return ~kept & ~torch.zeros_like(kept).scatter_(-1, lowest, True)
