"""RoPeSLR: block-sparse attention mixed by mass with a background that is exact to first order.

    O_i = (1 - g_i) O_s,i + g_i O_l,i                 O_s, LSE: softmax over the kept blocks
    g_i = sigmoid(c_h (T_I - LSE_i) + b_h + w . x_i)  T_I: pooled log-mass of the blocks that query
                                                      block I dropped
    O_l = mean(v) + (beta_h * q_i) C                  C = mean((k - mean k)^T v) over the video
        + eta_h (O_lr - mean(v))                      O_lr = phi_q mean(phi_k^T v) / (1e-5 + phi_q .
                                                      mean(phi_k)), phi = act(A_h x + E_h(p)), x = q
                                                      or k before RoPE

In code: c gate_slope, b gate_bias, w gate_weight, T dropped_lse, beta channel_scale, C cov, eta
low_rank_scale, A proj, E pe. Without an adapter w = eta = 0, and c, b, beta are solved in closed
form on a few exactly computed queries (see calibration.py); an adapter brings them all, and
`calibrate = refine` refines them the same way. Whoever calibrates also corrects: O_s,i (1 + M) and
(beta_h * q_i) C + q_i N replace O_s,i and (beta_h * q_i) C (see correction.py). Softmax attention
IS such a mix of its kept and its dropped part, and the first-order term of the dropped part keeps
relative position exactly, since q and k enter after RoPE. Source: RoPeSLR (arXiv 2605.20659) names
the parts, its formulas are not public; this form is our reconstruction.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import ops
from ...kernels.types import Background, FeatureMap, FirstOrder, Gate, LinearState, LowRank
from ..accounting import (
    calibration_flops,
    correction_flops,
    first_order_flops,
    low_rank_flops,
    mapping_flops,
)
from ..call import AttentionCall
from ..plan import CALIBRATE_EVERY, ResolvedPlan
from .adapter_terms import LearnedPositions, at_noise, gate_logits, layer_weights, used_rank
from .base import QKV, Method, MethodOutput, Probe, Routing
from .calibration import (
    Calibration,
    ExactQueries,
    Lesson,
    State,
    calibrate,
    mixed,
    strongest,
    untrained,
)
from .correction import LAMBDAS, correct

EPS = 1e-5  # beside the MEAN of phi(k)
MOST_LESSONS = 64  # of a layer; beyond them every second one is forgotten


class Trained(NamedTuple):
    """What an adapter adds to one call besides the values of a calibration."""

    start: Calibration  # its own gate and channel scale, on all channels
    gate_logits: Tensor | None = None  # (B, H, Lv)
    low_rank: LowRank | None = None


class Parts(NamedTuple):
    """What one call knows of its background."""

    routing: Routing
    state: State
    known: Calibration
    trained: Trained | None

    @property
    def background(self) -> Background:
        known, state = self.known, self.state
        own_logits = None if self.trained is None else self.trained.gate_logits
        low_rank = None if self.trained is None else self.trained.low_rank
        gate = Gate(self.routing.dropped_lse, known.gate_slope, known.gate_bias, own_logits)
        cov, scale = state.cov, known.channel_scale
        if known.query_map is not None:
            cov, scale = known.read(state), torch.ones_like(scale)
        first = FirstOrder(state.v_mean, cov, scale, known.channel_ids)
        return Background(gate, first, low_rank)


# Blocks that every head keeps; or each, by batch row.
Kept = int | tuple[tuple[int, ...], ...]


class Remembered(NamedTuple):
    """A calibration, the step and the window of a longer video that it was made at, and how many
    blocks the heads kept then."""

    step: int
    window: Hashable
    values: Calibration
    kept: Kept

    def at(self, call: AttentionCall) -> Calibration:
        """What holds for a call. A correction knows its own frames, as they were a while ago."""
        fits = self.window == call.window and abs(call.step - self.step) < CALIBRATE_EVERY
        return self.values if fits else self.values.plain


class RoPeSLR(Method):
    """Remembers, for each layer and conditioning of one run, its calibration."""

    fewest = 0

    def __init__(self, plan: ResolvedPlan) -> None:
        super().__init__(plan)
        adapter = plan.adapter
        self.learned = LearnedPositions(adapter.info) if adapter is not None else None
        self.needs_x = adapter is not None and adapter.has("gate_weight")
        self.needs_rope = adapter is not None and adapter.has("proj_q")
        self.memory: dict[tuple[Hashable, Hashable], Remembered] = {}

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, out: Tensor | None = None
    ) -> MethodOutput:
        """See `Method.attend`."""
        backend = self.plan.backend
        if self.plan.drops_nothing(q.shape[2]):
            routing = self.route(q, k, call)
            small = self.eight_bit(k, v, call, routing.pooled_k)
            found, mass = ops.block_sparse_attention(
                q, k, v, routing.mask, scale=call.scale, backend=backend, out=out, eight_bit=small
            )
            return MethodOutput(found, routing.mask, routing.density, mass=mass)

        batch, heads, tokens, head_dim = q.shape
        known, due = self._lookup(q, call)
        qkv, cost = QKV(q, k, v), 0.0
        parts = self._parts(qkv, call, known, due)
        routing, trained = parts.routing, parts.trained
        state_rank = head_dim if known is None else known.channel_scale.shape[2]
        background = batch * first_order_flops(
            tokens, head_dim, heads, parts.state.cov.shape[2], state_rank
        )
        if trained is not None and trained.low_rank is not None:
            rank = trained.low_rank.feature_map.rank(head_dim)
            background += batch * low_rank_flops(tokens, head_dim, heads, rank)
        if due or parts.known.kept_map is not None:
            background += batch * mapping_flops(tokens, head_dim, heads)
        for probe in self.probes(qkv, call, routing):
            cost += self._learn_calibrating(call, parts, probe)
        mass = None
        if known is None and not due:
            self._remember(q, call, parts.known)
        if due:
            found, mass, more = self._calibrating(qkv, call, parts, out)
            cost += more
        elif call.layout.weighted:
            found, mass = self._mix(q, self._kept_blocks(qkv, call, parts, out), call, parts, out)
        else:
            values = v
            if parts.known.kept_map is not None:
                values = ops.add_mapped(v, parts.known.kept_map, backend=backend)
            found = ops.block_sparse_mixed(
                q,
                k,
                values,
                routing.mask,
                parts.background,
                scale=call.scale,
                backend=backend,
                out=out,
                eight_bit=self.eight_bit(k, values, call, routing.pooled_k),
            )
        return MethodOutput(
            found, routing.mask, routing.density, background, cost, heads=routing.heads, mass=mass
        )

    def observe(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> float:
        """See `Method.observe`."""
        if not self.probe_due(q, call):
            return 0.0
        known, due = self._lookup(q, call)
        qkv = QKV(q, k, v)
        parts = self._parts(qkv, call, known, due)
        probes = self.probes(qkv, call, parts.routing)
        return sum(self._learn_calibrating(call, parts, probe) for probe in probes)

    def forget(self) -> None:
        """See `Method.forget`."""
        self.memory.clear()
        self.lessons.clear()

    def _parts(self, qkv: QKV, call: AttentionCall, known: Calibration | None, due: bool) -> Parts:
        """Routing, state, and the values that hold before this call's calibration."""
        q, k, v = qkv
        blocks, backend = self.blocks(call.layout, q.device), self.plan.backend
        channel_ids = None if known is None else known.channel_ids
        pooled_k, v_mean, cov = ops.block_pool_state(k, v, blocks, channel_ids, backend=backend)
        state = State(v_mean, cov, call.softmax_scale(q.shape[3]))
        routing = self.route(q, k, call, pooled_k)
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
            pooled_q = ops.block_pool(q, blocks.q_blocks, backend=backend)
            dropped = ops.dropped_mass(pooled_q, pooled_k, routing.mask, scale=call.scale)
            routing = routing._replace(dropped_lse=dropped)
        trained = self._trained(q, k, v, call)
        known, state = self._start(known, state, trained, due)
        return Parts(routing, state, known, trained)

    def _learn_calibrating(self, call: AttentionCall, parts: Parts, probe: Probe) -> float:
        """Learn from a probe: -> FLOPs. Each number of blocks has a calibration of its own."""
        found, outputs = probe.found, []
        with torch.no_grad():
            for out, lse, dropped_lse in zip(found.out, found.lse, found.dropped_lse):
                exact = ExactQueries(
                    probe.q,
                    found.exact_out,
                    found.exact_lse,
                    out,
                    lse,
                    dropped_lse,
                    *self._own_terms(probe.q, probe.queries.tokens, parts),
                )
                own = parts.known
                if self.plan.calibrates:
                    own = calibrate(exact, parts.state, own)
                outputs.append(mixed(exact, parts.state, own))
        return self.learn(call, probe, torch.stack(outputs))

    def _start(
        self, known: Calibration | None, state: State, trained: Trained | None, due: bool
    ) -> tuple[Calibration, State]:
        """The values that hold before this call's calibration, and the state of their channels."""
        if known is None:
            known = untrained(state) if trained is None else trained.start
            known = strongest(known, state.cov, self.plan.rank)
            return known, state.of_channels(known.channel_ids)
        if trained is not None and (due or not self.plan.calibrates):
            known = trained.start.on_channels(known.channel_ids)  # its noise bins follow the step
        return known, state

    def _calibrating(
        self, qkv: QKV, call: AttentionCall, parts: Parts, out: Tensor | None
    ) -> tuple[Tensor, Tensor | None, float]:
        """Compute some queries exactly and fit gate and channel scale by them.

        -> out, mass as of `_mix`, FLOPs.
        """
        sparse = self._kept_blocks(qkv, call, parts, out)
        with torch.no_grad():  # what is learned here outlives this call, and with it any graph
            exact = self._exact_queries(qkv, call, parts, sparse)
            known = calibrate(exact, parts.state, parts.known)
            known, left_out = correct(exact, parts.state, known)
            if self.precision.open(call.layer, qkv.q, self.query_block):
                lost = (left_out - exact.out).square().sum()
                self.judge_precision(qkv, call, (exact.q, exact.out), lost)
        batch, heads, count, head_dim = exact.q.shape
        known = known.stored_as(qkv.q.dtype)
        self._remember(qkv.q, call, known)
        self._learn(qkv.q, call, known)
        found, mass = self._mix(qkv.q, sparse, call, parts._replace(known=known), out)
        tokens, features = call.layout.attended_tokens, known.channel_scale.shape[2] + head_dim
        cost = calibration_flops(tokens, head_dim, heads, count)
        cost += correction_flops(head_dim, heads, count, features, len(LAMBDAS))
        return found, mass, batch * cost

    def _kept_blocks(
        self, qkv: QKV, call: AttentionCall, parts: Parts, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attention over the kept blocks and its LSE, to be mixed in place by `_mix`."""
        return ops.block_sparse_attention(
            *qkv,
            parts.routing.mask,
            scale=call.scale,
            backend=self.plan.backend,
            out=out,
            eight_bit=self.eight_bit(qkv.k, qkv.v, call, parts.routing.pooled_k),
        )

    def _mix(
        self,
        q: Tensor,
        sparse: tuple[Tensor, Tensor],
        call: AttentionCall,
        parts: Parts,
        out: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Kept blocks and background: -> out, and the mass where weighted keys are still to come.

        The kept part has 1 - g of it, so the whole has LSE - log(1 - g) = LSE + softplus(logit g).
        """
        background, q_blocks = parts.background, parts.routing.mask.q_blocks
        kept, lse = sparse
        backend, kept_map = self.plan.backend, parts.known.kept_map
        if kept_map is not None:
            own = None if kept.requires_grad else kept
            kept = ops.add_mapped(kept, kept_map, backend=backend, out=own)
        found = ops.mix_background(q, kept, lse, q_blocks, background, backend=backend, out=out)
        if not call.layout.weighted:
            return found, None
        gate = background.gate
        dropped = gate.dropped_lse.index_select(2, q_blocks.block_of_token)
        mass = lse + F.softplus(gate.logit(lse, dropped))
        return found, torch.where(lse == -torch.inf, dropped, mass)  # a head may keep nothing

    def _exact_queries(
        self, qkv: QKV, call: AttentionCall, parts: Parts, sparse: tuple[Tensor, Tensor]
    ) -> ExactQueries:
        """Exact attention of queries spread evenly over the blocks, the same for every head."""
        (q, k, v), (tokens, blocks) = qkv, self.some_queries(qkv.q, call, self.plan.calibrate_rows)
        some_q = q.index_select(2, tokens)
        seen = self.seen_keys(call.layout, q.device)
        out, lse = ops.dense_attention(
            some_q, k, v, seen, scale=call.scale, backend=self.plan.backend
        )
        return ExactQueries(
            some_q,
            out,
            lse,
            sparse[0].index_select(2, tokens),
            sparse[1].index_select(2, tokens),
            parts.routing.dropped_lse.index_select(2, blocks),
            *self._own_terms(some_q, tokens, parts),
        )

    def _own_terms(
        self, some_q: Tensor, tokens: Tensor, parts: Parts
    ) -> tuple[Tensor | None, Tensor | None]:
        """What an adapter adds to gate and background of some queries."""
        trained = parts.trained
        if trained is None:
            return None, None
        own_logits, branch = trained.gate_logits, None
        if own_logits is not None:
            own_logits = own_logits.index_select(2, tokens)
        if trained.low_rank is not None:
            branch = _branch(some_q, tokens, trained.low_rank, parts.state.v_mean)
        return own_logits, branch

    def _trained(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Trained | None:
        """What the adapter says about this call; what it lacks is as without an adapter."""
        adapter = self.plan.adapter
        if adapter is None:
            return None
        info, (batch, heads, _, head_dim) = adapter.info, q.shape
        weights = layer_weights(adapter, call.layer, q.device)

        def binned(name: str, initial: float, *shape: int) -> Tensor:
            if name not in weights:
                return q.new_full((batch, *shape), initial, dtype=torch.float32)
            found = at_noise(weights[name], len(shape), info.noise_levels, call.sigma)
            return found.expand(batch, *shape).contiguous()

        scale = binned("channel_scale", call.softmax_scale(head_dim), heads, head_dim // 2)
        start = Calibration(
            binned("gate_slope", 1.0, heads),
            binned("gate_bias", 0.0, heads),
            scale.repeat_interleave(2, dim=-1),
            None,
        )
        own_logits = None
        if "gate_weight" in weights:
            own_logits = gate_logits(call, weights["gate_weight"], heads)
        if "proj_q" not in weights:
            return Trained(start, own_logits)
        return Trained(start, own_logits, self._low_rank(k, v, call, weights))

    def _low_rank(
        self, k: Tensor, v: Tensor, call: AttentionCall, weights: dict[str, Tensor]
    ) -> LowRank:
        assert self.plan.adapter is not None and self.learned is not None
        info, rope = self.plan.adapter.info, call.inputs.rope
        assert rope is not None  # `needs_rope` keeps calls without it away
        rank = used_rank(self.plan, info)  # features lie in order of importance
        q_map, k_map = (
            FeatureMap(
                info.act,
                weights[f"proj_{x}"][:, :rank].float().contiguous(),
                *rope,
                *self.learned.tables(weights.get(f"pe_{x}"), call, rank),
            )
            for x in ("q", "k")
        )
        video = call.video
        kv_state, normalizer = ops.low_rank_state(
            k[:, :, video], v[:, :, video], k_map, backend=self.plan.backend
        )
        state = LinearState(kv_state, normalizer, EPS)
        return LowRank(q_map, state, weights["low_rank_scale"].float())

    def _lookup(self, q: Tensor, call: AttentionCall) -> tuple[Calibration | None, bool]:
        """What is known for all conditionings, None if any is new; and whether more is due."""
        parts = self._by_conditioning(q, call)
        found = [self.memory.get((call.layer, key)) for key, _, _ in parts]
        counts = [own.stop - own.start for _, own, _ in parts]
        known = [each for each in found if each is not None]
        if len(known) < len(found) or [x.values.gate_slope.shape[0] for x in known] != counts:
            return None, self.plan.calibrates
        values = Calibration.joined([each.at(call) for each in known])
        interval = self.plan.calibration_interval(call.num_steps)
        # Steps also run backwards: some samplers go up in noise again, and some graphs only go up.
        old = interval is not None and any(abs(call.step - x.step) >= interval for x in known)
        moved = any(x.kept != kept for x, (_, _, kept) in zip(known, parts))
        return values, self.plan.calibrates and (old or moved)

    def _remember(self, q: Tensor, call: AttentionCall, known: Calibration) -> None:
        for key, own, kept in self._by_conditioning(q, call):
            values = known.of_batch(own)
            self.memory[call.layer, key] = Remembered(call.step, call.window, values, kept)

    def _learn(self, q: Tensor, call: AttentionCall, known: Calibration) -> None:
        """Keep a calibration for whoever starts from this run."""
        lessons = self.lessons.setdefault(call.layer, [])
        if len(lessons) == MOST_LESSONS:
            del lessons[1::2]
        lessons.append(self._lesson(q, call, known))

    def _lesson(self, q: Tensor, call: AttentionCall, known: Calibration) -> Lesson:
        kept, blocks = self.kept(q, call), self.blocks(call.layout, q.device).num_ranked
        counts = None
        if not isinstance(kept, int):
            counts = torch.tensor(kept, dtype=torch.float32).view(q.shape[:2])
        scale = call.softmax_scale(q.shape[3])
        return Lesson(call.sigma, call.layout.grid, known.plain, counts, blocks, scale)

    def _by_conditioning(
        self, q: Tensor, call: AttentionCall
    ) -> list[tuple[Hashable, slice, Kept]]:
        """Each conditioning with its rows of the batch, and what its heads keep."""
        batch, kept = q.shape[0], self.kept_by_all(q, call)
        # Windows of a longer video may differ in length.
        blocks = self.blocks(call.layout, q.device).num_ranked
        parts = [((key, blocks), own) for key, own in call.conditionings(batch)]
        if isinstance(kept, int):
            return [(key, own, kept) for key, own in parts]
        return [(key, own, tuple(map(tuple, kept[own]))) for key, own in parts]


def _branch(some_q: Tensor, tokens: Tensor, low_rank: LowRank, v_mean: Tensor) -> Tensor:
    """What an adapter's low rank adds to the background of some queries."""
    fmap = low_rank.feature_map
    assert fmap.rope_cos is not None and fmap.rope_sin is not None
    fmap = fmap._replace(
        rope_cos=fmap.rope_cos[tokens],
        rope_sin=fmap.rope_sin[tokens],
        axis_ids=None if fmap.axis_ids is None else fmap.axis_ids[tokens],
    )
    read = ops.linear_read(some_q, fmap, low_rank.state)
    return low_rank.scale[:, None, None] * (read - v_mean[:, :, None])
