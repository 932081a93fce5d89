"""RoPeSLR, training-free: block-sparse attention mixed by mass with a first-order background that calibrates itself.

    O_i = (1 - g_i) O_s,i + g_i O_l,i                 O_s, LSE: softmax over the kept blocks
    g_i = sigmoid(c_h (T_I - LSE_i) + b_h)            T_I: pooled log-mass of the blocks that query block I dropped
    O_l = mean(v) + (beta_h * q_i) C                  C = mean((k - mean k)^T v) over the video's tokens
    c, b, beta: solved in closed form on a few exactly computed rows (see calibration.py)

Softmax attention IS such a mix of its kept and its dropped part, and the first-order term of the dropped part keeps
relative position exactly, since q and k enter after RoPE. Source: RoPeSLR (arXiv 2605.20659) names the parts, its
formulas are not public; this form is our reconstruction.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from ...kernels import ops
from ...kernels.background import FirstOrder, Gate
from ..accounting import calibration_flops, first_order_flops
from ..plan import CALIBRATE_EVERY, SparsePlan
from .base import LayerCall, Routing, VideoOutput, route
from .calibration import Calibration, ExactRows, calibrate, untrained


class RoPeSLR:
    """Remembers, for each layer and conditioning of one run, its calibration and the step it was made at."""

    def __init__(self, plan: SparsePlan) -> None:
        self.plan = plan
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
        if known is None:
            known = untrained(cov, self.plan.rank, call.scale)
            if known.features is not None:
                cov = cov.gather(2, known.features[..., None].expand(-1, -1, -1, cov.shape[-1]))
        calibration_cost = 0.0
        if due:
            out, lse = ops.block_sparse_attention(*sparse, **lists)
            rows = _exact_rows(q, k, v, out, lse, routing, call, self.plan.calibrate_rows)
            known = calibrate(rows, v_mean, cov, known, call.scale)
            calibration_cost = q.shape[0] * calibration_flops(k.shape[2], q.shape[3], q.shape[1], rows.q.shape[2])
        self._remember(call, known, made_now=due)

        gate, first = Gate(known.gate_c, known.gate_b), FirstOrder(v_mean, cov, known.beta, known.features)
        if due:
            mixed = ops.mix_background(q, out, lse, routing.tail, tables.video, gate, first)
        else:
            mixed = ops.block_sparse_mixed(*sparse, routing.tail, gate, first, **lists)
        batch, heads, tokens, width = q.shape
        background = batch * first_order_flops(tokens, width, heads, cov.shape[2], state_rank)
        return VideoOutput(mixed, routing.density, background, calibration_cost)

    def _recall(self, call: LayerCall) -> tuple[Calibration | None, bool]:
        """What is known for all conditionings of the call, None where any is new; and whether new rows are due."""
        parts = [self.memory.get((call.layer, key)) for key, _ in call.conditioning]
        rows = [count for _, count in call.conditioning]
        if any(part is None for part in parts) or [part.gate_c.shape[0] for _, part in parts] != rows:
            return None, self.plan.calibrate != "off"
        known = Calibration(*(
            None if field[0] is None else torch.cat(field) for field in zip(*(part for _, part in parts))
        ))
        every = {"every step": 1, "auto": CALIBRATE_EVERY}.get(self.plan.calibrate)
        # Steps also run backwards: some samplers go up in noise again, and some graphs only go up.
        return known, every is not None and any(abs(call.step - made) >= every for made, _ in parts)

    def _remember(self, call: LayerCall, known: Calibration, made_now: bool) -> None:
        start = 0
        for key, rows in call.conditioning:
            part = Calibration(*(None if field is None else field[start : start + rows] for field in known))
            made, _ = self.memory.get((call.layer, key), (call.step, None))
            self.memory[call.layer, key] = (call.step if made_now else made, part)
            start += rows


def _exact_rows(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, routing: Routing, call: LayerCall, wanted: int
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
    return ExactRows(
        row_q, row_out, row_lse, out.index_select(2, rows), lse.index_select(2, rows),
        routing.tail.index_select(2, place // table.shape[1]),
    )
