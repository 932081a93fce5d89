"""RoPeSLR: block-sparse attention mixed by mass with a background that is exact to first order.

    O_i = (1 - g_i) O_s,i + g_i O_l,i                 O_s, LSE: softmax over the kept blocks
    g_i = sigmoid(c_h (T_I - LSE_i) + b_h + w . x_i)  T_I: pooled log-mass of the blocks that query block I dropped
    O_l = mean(v) + (beta_h * q_i) C                  C = mean((k - mean k)^T v) over the video's tokens
        + eta_h (O_lr - mean(v))                      O_lr = phi_q mean(phi_k^T v) / (1e-5 + phi_q . mean(phi_k)),
                                                      phi = act(A_h x + E_h(p)), x = q or k before RoPE

Without an adapter w = eta = 0, and c, b, beta are solved in closed form on a few exactly computed rows (see
calibration.py); an adapter brings them all, and `calibrate = on top` refines them the same way. Softmax attention IS
such a mix of its kept and its dropped part, and the first-order term of the dropped part keeps relative position
exactly, since q and k enter after RoPE. Source: RoPeSLR (arXiv 2605.20659) names the parts, its formulas are not
public; this form is our reconstruction.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels import ops
from ...kernels.background import FeatureMap, FirstOrder, Gate, LinearState, LowRank
from ..accounting import calibration_flops, first_order_flops, low_rank_flops
from ..adapters import Adapter
from ..plan import CALIBRATE_EVERY, SparsePlan
from .base import LayerCall, Method, Routing, VideoOutput, route
from .calibration import Calibration, ExactRows, calibrate, strongest, untrained
from .weights import LearnedPositions, at_noise, gate_term, layer_weights, used_rank

EPS = 1e-5                                  # beside the MEAN of phi(k)


class Trained(NamedTuple):
    """What an adapter adds to one call besides the values of a calibration."""

    start: Calibration                      # its own c, b, beta on all channels
    gate_x: Tensor | None = None            # (B, H, Lv)
    low_rank: LowRank | None = None


class RoPeSLR(Method):
    """Remembers, for each layer and conditioning of one run, its calibration and the step it was made at."""

    def __init__(self, plan: SparsePlan, adapter: Adapter | None = None) -> None:
        self.plan = plan
        self.adapter = adapter
        self.learned = LearnedPositions(adapter) if adapter is not None else None
        self.needs_x = adapter is not None and adapter.has("gate_w")
        self.needs_positions = adapter is not None and adapter.has("a_q")
        self.memory: dict[tuple[Hashable, Hashable], tuple[int, Calibration]] = {}   # step made at, values

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> VideoOutput:
        """See `Method.attend`."""
        tables, backend = call.tables, call.backend
        lists = {"scale": call.scale, "backend": backend, "trusted": True}
        blocks = tables.video.shape[0]                                        # the video's come first among the keys
        if self.plan.kept_blocks(blocks) >= blocks:                           # nothing is dropped
            routing = route(q, k, call, self.plan)
            out, _ = ops.block_sparse_attention(
                q, k, v, tables.video, tables.keys, routing.indices, routing.counts, **lists
            )
            return VideoOutput(out, routing.density, 0.0)

        known, due = self._recall(call)
        features = None if known is None else known.features
        pooled_k, v_mean, cov = ops.block_pool_state(k, v, tables.keys, blocks, features, backend)
        routing = route(q, k, call, self.plan, pooled_k)
        sparse = (q, k, v, tables.video, tables.keys, routing.indices, routing.counts)
        state_rank = cov.shape[2]
        trained = self._trained(q, k, v, call)
        if known is None:
            start = untrained(cov, call.scale) if trained is None else trained.start
            known = strongest(start, cov, self.plan.rank)
            if known.features is not None:
                cov = cov.gather(2, known.features[..., None].expand(-1, -1, -1, cov.shape[-1]))
        elif trained is not None and (due or self.plan.calibrate == "off"):   # its noise bins follow the step
            beta = trained.start.beta
            beta = beta if known.features is None else beta.gather(-1, known.features)
            known = Calibration(trained.start.gate_c, trained.start.gate_b, beta, known.features)
        gate_x, low_rank = (None, None) if trained is None else trained[1:]
        calibration_cost = 0.0
        if due:
            out, lse = ops.block_sparse_attention(*sparse, **lists)
            rows = _exact_rows(q, k, v, out, lse, routing, call, self.plan.calibrate_rows, gate_x, low_rank, v_mean)
            known = calibrate(rows, v_mean, cov, known, call.scale)
            calibration_cost = q.shape[0] * calibration_flops(k.shape[2], q.shape[3], q.shape[1], rows.q.shape[2])
        self._remember(call, known, made_now=due)

        gate, first = Gate(known.gate_c, known.gate_b, gate_x), FirstOrder(v_mean, cov, known.beta, known.features)
        if due:
            mixed = ops.mix_background(q, out, lse, routing.tail, tables.video, gate, first, low_rank)
        else:
            mixed = ops.block_sparse_mixed(*sparse, routing.tail, gate, first, low_rank, **lists)
        batch, heads, tokens, width = q.shape
        background = batch * first_order_flops(tokens, width, heads, cov.shape[2], state_rank)
        if low_rank is not None:
            background += batch * low_rank_flops(tokens, width, heads, low_rank.map.a.shape[1])
        return VideoOutput(mixed, routing.density, background, calibration_cost)

    def _trained(self, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Trained | None:
        """What the adapter says about this call; what it does not have is as in a run without one."""
        if self.adapter is None:
            return None
        info, (batch, heads, _, width) = self.adapter.info, q.shape
        weights = layer_weights(self.adapter, call.layer, q.device)

        def binned(name: str, dims: int, initial: float, *shape: int) -> Tensor:
            if name not in weights:
                return q.new_full((batch, *shape), initial, dtype=torch.float32)
            return at_noise(weights[name], dims, info.noise_levels, call.noise).expand(batch, *shape).contiguous()

        beta = binned("beta", 2, call.scale, heads, width // 2).repeat_interleave(2, dim=-1)
        start = Calibration(binned("gate_c", 1, 1.0, heads), binned("gate_b", 1, 0.0, heads), beta, None)
        gate_x = None
        if "gate_w" in weights:
            gate_x = gate_term(call.inputs.x, weights["gate_w"], heads, call)
        if "a_q" not in weights:
            return Trained(start, gate_x)
        rank = used_rank(self.plan, info)                                     # features lie in order of importance
        q_map, k_map = (
            FeatureMap(info.act, weights[f"a_{x}"][:, :rank].float().contiguous(), *call.inputs.positions,
                       *self.learned.tables(weights, f"pe_{x}", call, rank))
            for x in ("q", "k")
        )
        state, norm = ops.low_rank_state(k[:, :, call.video], v[:, :, call.video], k_map, call.backend)
        return Trained(start, gate_x, LowRank(q_map, LinearState(state, norm, EPS), weights["eta"].float()))

    def _recall(self, call: LayerCall) -> tuple[Calibration | None, bool]:
        """What is known for all conditionings of the call, None where any is new; and whether new rows are due."""
        parts = [self.memory.get((call.layer, key)) for key, _ in call.conditioning]
        rows = [count for _, count in call.conditioning]
        if any(part is None for part in parts) or [part.gate_c.shape[0] for _, part in parts] != rows:
            return None, self.plan.calibrate != "off"
        known = Calibration(*(
            None if field[0] is None else torch.cat(field) for field in zip(*(part for _, part in parts))
        ))
        every = {"every step": 1, "auto": CALIBRATE_EVERY, "on top": CALIBRATE_EVERY}.get(self.plan.calibrate)
        # Steps also run backwards: some samplers go up in noise again, and some graphs only go up.
        return known, every is not None and any(abs(call.step - made) >= every for made, _ in parts)

    def _remember(self, call: LayerCall, known: Calibration, made_now: bool) -> None:
        for key, own in call.rows:
            part = Calibration(*(None if field is None else field[own] for field in known))
            made, _ = self.memory.get((call.layer, key), (call.step, None))
            self.memory[call.layer, key] = (call.step if made_now else made, part)


def _exact_rows(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, routing: Routing, call: LayerCall, wanted: int,
    gate_x: Tensor | None, low_rank: LowRank | None, v_mean: Tensor,
) -> ExactRows:
    """Compute exact attention for rows spread evenly over the query blocks, the same ones for every head."""
    table = call.tables.video
    walk = table.flatten()[: q.shape[2]]                                      # only the last slots are empty
    count = min(wanted, walk.numel())
    generator = torch.Generator().manual_seed(call.step)
    inside = torch.rand(count, generator=generator, dtype=torch.float64)
    place = ((torch.arange(count) + inside) * (walk.numel() / count)).long().to(q.device, non_blocking=True)
    rows = walk[place]
    row_q = q.index_select(2, rows)
    row_out, row_lse = ops.dense_attention(row_q, k, v, call.scale, call.backend)
    branch = None
    if low_rank is not None:
        map = low_rank.map
        places = None if map.places is None else map.places[rows]
        map = map._replace(cos=map.cos[rows], sin=map.sin[rows], places=places)
        branch = low_rank.eta[:, None, None] * (ops.linear_read(row_q, map, low_rank.linear) - v_mean[:, :, None])
    return ExactRows(
        row_q, row_out, row_lse, out.index_select(2, rows), lse.index_select(2, rows),
        routing.tail.index_select(2, place // table.shape[1]),
        None if gate_x is None else gate_x.index_select(2, rows), branch,
    )
