"""RoLA: kept blocks plus a normalised low-rank branch of the same size, weighed by a gate from the hidden state.

    O     = (O_s / s + g O_l) s                      s = sqrt(mean_D(O_s^2) + 1e-5)
    O_l   = RMSNorm_D(phi_q sum(phi_k^T v))          no normaliser, no weight, eps = finfo(dtype).eps
    phi   = turn(silu(A x)), x = q or k before RoPE  A (r, D) shared by the heads; turn: RoPE of the first r/2 angles on
                                                     pairs of features, the angles rounded to the activations' dtype
    g     = sigmoid(x_h . w + b_h)                   x_h: head h's slice of the hidden state that enters the attention

A video shorter than one block has no sparse part: O = g O_l. Source: RoLA (arXiv 2609.06712) as released.
With per-head A, learned positions inside the SiLU and no turning it is RoPeSLR's form "rms" (ours).
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from ...kernels import ops
from ...kernels.background import SiluMap
from ..accounting import low_rank_flops
from ..adapters import Adapter
from ..plan import BLOCK, SparsePlan
from ..positions import Positions, rounded_angles
from .base import LayerCall, Method, VideoOutput, route
from .weights import LearnedPositions, at_noise, gate_term, layer_weights, used_rank

SAMPLED_ROWS = 512                          # on which features are weighed when not all are used


class RoLA(Method):
    """Remembers the turned features' angles of one model call, and which features of a layer a lower rank keeps."""

    needs_x = True
    needs_positions = True

    def __init__(self, plan: SparsePlan, adapter: Adapter) -> None:
        self.plan = plan
        self.adapter = adapter
        self.learned = LearnedPositions(adapter)
        self._turn: tuple[Positions, torch.dtype, Tensor, Tensor] | None = None
        self._kept: dict[Hashable, tuple[Tensor, Tensor]] = {}                # features, and the pairs that turn

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> VideoOutput:
        """See `Method.attend`."""
        info, (batch, heads, tokens, width) = self.adapter.info, q.shape
        weights = layer_weights(self.adapter, call.layer, q.device)
        video_k, video_v = k[:, :, call.video], v[:, :, call.video]
        q_map, k_map = self._maps(weights, q, video_k, video_v, call)
        bias = at_noise(weights["gate_b"].reshape(-1, heads).squeeze(0), 1, info.noise_levels, call.noise)
        gate = torch.sigmoid(gate_term(call.inputs.x, weights["gate_w"], heads, call) + bias[:, None])
        eps = torch.finfo(q.dtype).eps
        background = batch * low_rank_flops(tokens, width, heads, q_map.a.shape[1])
        if tokens < BLOCK:
            out = gate[..., None] * ops.rms_low_rank(q, video_k, video_v, q_map, k_map, eps)
            return VideoOutput(out.to(q.dtype), 0.0, background)
        routing = route(q, k, call, self.plan)
        out, _ = ops.block_sparse_attention(
            q, k, v, call.tables.video, call.tables.keys, routing.indices, routing.counts, scale=call.scale,
            backend=call.backend, trusted=True,
        )
        out = ops.add_rms_low_rank(q, video_k, video_v, out, gate, q_map, k_map, eps)
        return VideoOutput(out, routing.density, background)

    def _maps(self, weights, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> tuple[SiluMap, SiluMap]:
        heads, positions = q.shape[1], call.inputs.positions
        wanted = used_rank(self.plan, self.adapter.info)
        if self.adapter.info.method == "ropeslr":                             # features lie in order of importance
            return tuple(
                SiluMap(weights[f"a_{x}"][:, :wanted].float(), *positions,
                        *self.learned.tables(weights, f"pe_{x}", call, wanted))
                for x in ("q", "k")
            )
        turn = self._turn_angles(positions, call, q.dtype)
        maps = tuple(
            SiluMap(weights[f"a_{x}"].float().expand(heads, -1, -1), *positions, turn_cos=turn[0], turn_sin=turn[1])
            for x in ("q", "k")
        )
        if wanted == self.adapter.info.rank:
            return maps
        if call.layer not in self._kept:
            self._kept[call.layer] = _strongest_pairs(q, k, v, *maps, (wanted + 1) // 2)
        return tuple(_only(map, *self._kept[call.layer]) for map in maps)

    def _turn_angles(self, positions: Positions, call: LayerCall, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._turn is None or self._turn[0] is not positions or self._turn[1] != dtype:
            angles = rounded_angles(positions, call.layout.grid, dtype)[:, : self.adapter.info.rank // 2]
            self._turn = (positions, dtype, angles.cos(), angles.sin())
        return self._turn[2:]


def _strongest_pairs(q: Tensor, k: Tensor, v: Tensor, q_map: SiluMap, k_map: SiluMap, count: int):
    """The `count` pairs of features that add most to O_l over all heads, measured on some rows: -> their features
    `(2 count,)` and those pairs of them that turn, int64."""
    count_rows = min(SAMPLED_ROWS, q.shape[2])
    rows = torch.arange(count_rows, device=q.device) * q.shape[2] // count_rows
    some = q_map._replace(**{
        name: getattr(q_map, name)[rows] for name in ("cos", "sin", "turn_cos", "turn_sin")
    })
    energy = ops.feature_energy(q.index_select(2, rows), k, v, some, k_map)
    share = energy / energy.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(energy.dtype).tiny)
    pairs = share.sum(dim=(0, 1)).view(-1, 2).sum(dim=-1)
    kept = pairs.topk(min(count, pairs.numel())).indices.sort().values
    return torch.stack((2 * kept, 2 * kept + 1), dim=-1).flatten(), kept[kept < q_map.turn_cos.shape[1]]


def _only(map: SiluMap, features: Tensor, turned: Tensor) -> SiluMap:
    return map._replace(
        a=map.a.index_select(1, features), turn_cos=map.turn_cos.index_select(1, turned),
        turn_sin=map.turn_sin.index_select(1, turned),
    )
