"""SLA: kept blocks plus a linear branch behind a learned projection.

    released   O = O_s + W O_l + b,  O_l = phi(q) sum(phi(k)^T v) / (1e-5 + phi(q) . sum(phi(k))), over ALL tokens
    paper      the same with O_l over a row's marginal blocks only: neither kept nor among its worst 10 %
               phi = softmax over the channels of the rotated q and k; W (D, D), b (D) shared by a layer's heads

Exact saving of the released form: W is folded into the state, sum(phi(k)^T v) W^T, once per head.
Source: SLA (arXiv 2509.24006), thu-ml/SLA and thu-ml/TurboDiffusion, whose checkpoints are of the released form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...kernels import ops
from ...kernels.background import FeatureMap, LinearState
from ..accounting import linear_flops, marginal_flops
from ..adapters import Adapter
from ..plan import SparsePlan
from .base import LayerCall, Method, Routing, VideoOutput, route
from .weights import layer_weights

EPS = 1e-5                                  # beside the SUM of phi(k)
NEGLIGIBLE = 0.10                           # of the blocks of a row, in the paper's form


class SLA(Method):
    """Stateless: everything follows from the call and the weights."""

    def __init__(self, plan: SparsePlan, adapter: Adapter) -> None:
        self.plan = plan
        self.adapter = adapter

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> VideoOutput:
        """See `Method.attend`."""
        weights = layer_weights(self.adapter, call.layer, q.device)
        project, bias = weights["weight"].float(), weights["bias"].float()
        routing = route(q, k, call, self.plan)
        sparse = (q, k, v, call.tables.video, call.tables.keys, routing.indices, routing.counts)
        lists = {"scale": call.scale, "backend": call.backend, "trusted": True}
        batch, heads, tokens, width = q.shape
        if self.plan.sla_variant == "paper":
            out, _ = ops.block_sparse_attention(*sparse, **lists)
            marginal = _marginal(routing)
            linear = ops.marginal_linear(q, k, v, call.tables.video, call.tables.keys, marginal, EPS)
            out = (out.float() + linear.float() @ project.T + bias).to(q.dtype)
            n_q, n_k = call.tables.video.shape[0], call.tables.keys.shape[0]
            return VideoOutput(out, routing.density, batch * marginal_flops(tokens, width, heads, n_q, n_k))
        map = FeatureMap("softmax")
        state, norm = ops.low_rank_state(k, v, map, call.backend)
        linear = LinearState(state @ project.T.to(state.dtype), norm, EPS / k.shape[2])   # the states are means
        out = ops.block_sparse_linear(*sparse, map, linear, bias, **lists)
        return VideoOutput(out, routing.density, batch * linear_flops(tokens, width, heads))


def _marginal(routing: Routing) -> Tensor:
    """Blocks neither kept nor among the worst of their row: -> `(B, H, Nq, Nk)` bool."""
    scores = routing.pooled_q @ routing.pooled_k.mT
    blocks = scores.shape[-1]
    kept = torch.zeros(*scores.shape[:-1], blocks + 1, dtype=torch.bool, device=scores.device)
    kept = kept.scatter_(-1, routing.indices.long(), True)[..., :blocks]
    worst = math.floor(NEGLIGIBLE * blocks + 1e-6)
    if worst == 0:
        return ~kept
    negligible = torch.zeros_like(kept).scatter_(-1, scores.topk(worst, dim=-1, largest=False).indices, True)
    return ~kept & ~negligible
