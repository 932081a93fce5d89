"""RoLA: kept blocks plus a normalised low-rank branch of the same size, weighed by a gate.

    O     = (O_s / s + g O_l) s               s = sqrt(mean_D(O_s^2) + 1e-5)
    O_l   = RMSNorm_D(phi_q sum(phi_k^T v))   no normaliser, no weight, eps = finfo(dtype).eps
    phi   = rope(silu(A x)), x before RoPE    A (r, D) shared by the heads; rope: the first r/2
                                              angles on pairs of features, rounded to the
                                              activations' dtype
    g     = sigmoid(x_h . w + b_h)            x_h: head h's slice of the hidden state that enters
                                              the attention

A video shorter than one query block has no sparse part: O = g O_l. Source: RoLA (arXiv 2609.06712)
as released.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from ...kernels import ops
from ...kernels.types import RmsLowRank, SiluMap
from ..accounting import low_rank_flops
from ..adapters import Adapter
from ..call import AttentionCall
from ..plan import BLOCK, ResolvedPlan
from ..rope import RopeTable, rounded_angles
from .adapter_terms import LearnedPositions, at_noise, gate_logits, layer_weights, used_rank
from .base import Method, MethodOutput

SAMPLED_QUERIES = 512  # on which features are weighed when not all are used


class RmsMethod(Method):
    """What RoLA and RoPeSLR's form "rms" share: all but the feature maps."""

    tells_mass = False  # the branch has none
    needs_x = True
    needs_rope = True

    def __init__(self, plan: ResolvedPlan) -> None:
        super().__init__(plan)
        assert plan.adapter is not None
        self.adapter: Adapter = plan.adapter

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, out: Tensor | None = None
    ) -> MethodOutput:
        """See `Method.attend`."""
        info, (batch, heads, tokens, head_dim) = self.adapter.info, q.shape
        weights = layer_weights(self.adapter, call.layer, q.device)
        own_k, own_v = k[:, :, call.video], v[:, :, call.video]
        branch = self._branch(weights, q, own_k, own_v, call)
        bias = weights["gate_bias"].reshape(-1, heads).squeeze(0)
        bias = at_noise(bias, 1, info.noise_levels, call.sigma)
        logits = gate_logits(call, weights["gate_weight"], heads)
        gate = torch.sigmoid(logits + bias[:, None])
        rank = branch.q_map.proj.shape[1]
        background = batch * low_rank_flops(tokens, head_dim, heads, rank)
        if tokens < BLOCK:
            found = (gate[..., None] * ops.rms_low_rank(q, own_k, own_v, branch)).to(q.dtype)
            found = found if out is None else out.copy_(found)
            return MethodOutput(found, None, 0.0, background)
        routing = self.route(q, k, call)
        small = self.eight_bit(k, v, call, routing.pooled_k)
        sparse, _ = ops.block_sparse_attention(
            q, k, v, routing.mask, scale=call.scale, backend=self.plan.backend, eight_bit=small
        )
        found = ops.add_rms_low_rank(
            q, own_k, own_v, sparse, gate, branch, backend=self.plan.backend, out=out
        )
        return MethodOutput(found, routing.mask, routing.density, background)

    def _branch(
        self, weights: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> RmsLowRank:
        """Feature maps of the video's queries and keys."""
        raise NotImplementedError


class RoLA(RmsMethod):
    """Remembers the features' angles of one model call, and which features a lower rank keeps."""

    def __init__(self, plan: ResolvedPlan) -> None:
        super().__init__(plan)
        self._feature_rope: tuple[RopeTable, torch.dtype, Tensor, Tensor] | None = None
        self._kept: dict[Hashable, tuple[Tensor, Tensor]] = {}  # features, and the pairs that turn

    def _branch(
        self, weights: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> RmsLowRank:
        rope, info = call.inputs.rope, self.adapter.info
        assert rope is not None
        cos, sin = self._feature_angles(rope, call, q.dtype)
        q_map, k_map = (
            SiluMap(
                weights[f"proj_{x}"].float().expand(q.shape[1], -1, -1),
                *rope,
                feature_cos=cos,
                feature_sin=sin,
            )
            for x in ("q", "k")
        )
        branch = RmsLowRank(q_map, k_map, torch.finfo(q.dtype).eps)
        rank = used_rank(self.plan, info)
        if rank == info.rank:
            return branch
        if call.layer not in self._kept:
            self._kept[call.layer] = self._strongest_pairs(q, k, v, branch, (rank + 1) // 2)
        features, pairs = self._kept[call.layer]
        return branch._replace(
            q_map=_only(q_map, features, pairs), k_map=_only(k_map, features, pairs)
        )

    def _feature_angles(
        self, rope: RopeTable, call: AttentionCall, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        known = self._feature_rope
        if known is None or known[0] is not rope or known[1] != dtype:
            angles = rounded_angles(rope, call.layout.grid, dtype)
            angles = angles[:, : self.adapter.info.rank // 2]
            known = self._feature_rope = (rope, dtype, angles.cos(), angles.sin())
        return known[2:]

    def _strongest_pairs(
        self, q: Tensor, k: Tensor, v: Tensor, branch: RmsLowRank, count: int
    ) -> tuple[Tensor, Tensor]:
        """The `count` pairs of features that add most to O_l over all heads, by some queries.

        -> their features `(2 count,)` and those pairs of them that turn, int64.
        """
        sampled = min(SAMPLED_QUERIES, q.shape[2])
        tokens = torch.arange(sampled, device=q.device) * q.shape[2] // sampled
        q_map = branch.q_map
        some = q_map._replace(
            **{
                name: getattr(q_map, name)[tokens]
                for name in ("rope_cos", "rope_sin", "feature_cos", "feature_sin")
            }
        )
        energy = ops.feature_energy(q.index_select(2, tokens), k, v, branch._replace(q_map=some))
        least = torch.finfo(energy.dtype).tiny
        share = energy / energy.sum(dim=-1, keepdim=True).clamp(min=least)
        pairs = share.sum(dim=(0, 1)).view(-1, 2).sum(dim=-1)
        if self.share is not None:
            pairs = self.share.total(pairs)
        kept = pairs.topk(min(count, pairs.numel())).indices.sort().values
        features = torch.stack((2 * kept, 2 * kept + 1), dim=-1).flatten()
        assert q_map.feature_cos is not None
        return features, kept[kept < q_map.feature_cos.shape[1]]


class RmsRoPeSLR(RmsMethod):
    """RoPeSLR's form "rms" (ours): A per head, positions inside the SiLU, no feature RoPE."""

    def __init__(self, plan: ResolvedPlan) -> None:
        super().__init__(plan)
        self.learned = LearnedPositions(self.adapter.info)

    def _branch(
        self, weights: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> RmsLowRank:
        rope = call.inputs.rope
        assert rope is not None
        rank = used_rank(self.plan, self.adapter.info)  # features lie in order of importance
        q_map, k_map = (
            SiluMap(
                weights[f"proj_{x}"][:, :rank].float(),
                *rope,
                *self.learned.tables(weights.get(f"pe_{x}"), call, rank),
            )
            for x in ("q", "k")
        )
        return RmsLowRank(q_map, k_map, torch.finfo(q.dtype).eps)


def _only(silu_map: SiluMap, features: Tensor, pairs: Tensor) -> SiluMap:
    assert silu_map.feature_cos is not None and silu_map.feature_sin is not None
    return silu_map._replace(
        proj=silu_map.proj.index_select(1, features),
        feature_cos=silu_map.feature_cos.index_select(1, pairs),
        feature_sin=silu_map.feature_sin.index_select(1, pairs),
    )
