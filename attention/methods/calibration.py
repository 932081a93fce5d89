"""Self-calibration of RoPeSLR: a few exact queries set the scale of the gate and the low rank.

T, the dropped blocks' log-mass taken from pooled keys, is biased low, and the bias is nearly one
number per head. On R queries with exact attention (LSE, out) and sparse attention (LSE_s, out_s):

    y = log(exp(LSE - LSE_s) - 1)          the true log-odds of the dropped mass
    u = T - LSE_s                          its estimate
    c = (cov(u, y) + .1 c0) / (var(u) + .1),  b = mean(y) - c mean(u),  g = sigmoid(c u + b)
    beta = ridge solution of  g (v_mean + (beta q) C) = out - (1 - g) out_s,
           one number per RoPE pair, prior beta0

Untrained, c0 = 1 and beta0 = 1/sqrt D; an adapter brings its own, and what it adds to gate and
background besides (a term of the hidden state, a low-rank branch) is taken off before the fit.

The normal equations of beta need no query-by-query design matrix: with p, p' RoPE pairs and a, b
channels, G_pp' = sum over a in p, b in p' of (C C^T)_ab (sum_i g_i^2 q_ia q_ib), and likewise for
the right-hand side. Source: our own (a reconstruction; see the README).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SHRINK = 0.1  # pulls the slope c to 1 where the queries hardly differ
RIDGE = 0.05  # of the mean diagonal of the normal equations
MIN_LOG_ODDS_GAP = 1e-4  # LSE - LSE_s below this is rounding, not mass
MAX_LOG_ODDS = 30.0
MAX_GATE_SLOPE = 4.0
MAX_GATE_BIAS = 20.0
MAX_CHANNEL_SCALE = 4.0  # times the attention's scale, 1/sqrt D


class Calibration(NamedTuple):
    """What one layer knows for one conditioning."""

    gate_slope: Tensor  # (B, H)
    gate_bias: Tensor  # (B, H)
    channel_scale: Tensor  # (B, H, r)
    channel_ids: Tensor | None  # (B, H, r): which channels those are; None: all
    # See correction.py; None: no correction.
    query_map: Tensor | None = None  # (B, H, r, D)
    kept_map: Tensor | None = None  # (B, H, D, D)

    @property
    def plain(self) -> Calibration:
        """Without the correction."""
        return self._replace(query_map=None, kept_map=None)

    def stored_as(self, dtype: torch.dtype) -> Calibration:
        """With its large parts, D x D for each head, in a dtype."""
        if self.query_map is None or self.kept_map is None:
            return self
        most = torch.finfo(dtype).max
        query_map, kept_map = (
            x.clamp(-most, most).to(dtype) for x in (self.query_map, self.kept_map)
        )
        return self._replace(query_map=query_map, kept_map=kept_map)

    def channels(self, q: Tensor) -> Tensor:
        """Those channels `(B, H, L, r)` of q."""
        if self.channel_ids is None:
            return q
        return q.gather(-1, self.channel_ids[:, :, None].expand(-1, -1, q.shape[2], -1))

    def of_batch(self, own: slice) -> Calibration:
        """Those of some batch rows."""
        return Calibration(*(None if x is None else x[own] for x in self))  # type: ignore[arg-type]

    def on_channels(self, channel_ids: Tensor | None) -> Calibration:
        """Those of some channels, where the values are of all."""
        if channel_ids is None:
            return self
        return self._replace(
            channel_scale=self.channel_scale.gather(-1, channel_ids), channel_ids=channel_ids
        )

    @staticmethod
    def joined(parts: Sequence[Calibration]) -> Calibration:
        """Those of several conditionings as one batch."""
        if len(parts) == 1:
            return parts[0]
        if any(each.kept_map is None for each in parts):
            parts = [each.plain for each in parts]
        columns = zip(*parts)
        return Calibration(*(None if xs[0] is None else torch.cat(xs) for xs in columns))  # type: ignore[arg-type]

    def read(self, state: State) -> Tensor:
        """What reads the background, v_mean + q read, from the query's channels `(B, H, r, D)`."""
        first_order = state.cov * self.channel_scale[..., None]
        return first_order if self.query_map is None else first_order + self.query_map


class Lesson(NamedTuple):
    """A calibration as one call made it."""

    sigma: float | None  # 1 = pure noise
    grid: tuple[int, int, int]  # of the video, in tokens
    values: Calibration
    kept: Tensor | None  # (B, H): blocks that each head kept; None where all kept as many
    blocks: int  # how many there were to keep
    scale: float  # of the attention, which channels have that no calibration chose


class State(NamedTuple):
    """The first-order background's state, and the scale of the attention."""

    v_mean: Tensor  # (B, H, D)
    cov: Tensor  # (B, H, r, D)
    scale: float

    def of_channels(self, channel_ids: Tensor | None) -> State:
        """That of some channels, where it is of all."""
        if channel_ids is None:
            return self
        picked = channel_ids[..., None].expand(-1, -1, -1, self.cov.shape[-1])
        return self._replace(cov=self.cov.gather(2, picked))


class ExactQueries(NamedTuple):
    """R sampled queries with their exact and their sparse attention; log-masses `(B, H, R)`."""

    q: Tensor  # (B, H, R, D)
    out: Tensor  # (B, H, R, D)
    lse: Tensor
    sparse_out: Tensor  # (B, H, R, D)
    sparse_lse: Tensor
    dropped_lse: Tensor
    gate_logits: Tensor | None = None  # (B, H, R): an adapter's term of the gate
    branch: Tensor | None = None  # (B, H, R, D): what an adapter's low rank adds to the background


def untrained(state: State) -> Calibration:
    """The first-order expansion itself: slope 1, bias 0, every channel scaled as attention is."""
    ones = state.cov.new_ones(state.cov.shape[:2])
    channel_scale = state.cov.new_full(state.cov.shape[:3], state.scale)
    return Calibration(ones, torch.zeros_like(ones), channel_scale, None)


def strongest(known: Calibration, cov: Tensor, rank: int) -> Calibration:
    """The `rank` channels whose share of the background is largest, by |beta| |C row|; 0 = all.

    Channels come in RoPE pairs.
    """
    batch, heads, head_dim, _ = cov.shape
    if not 0 < rank < head_dim:
        return known
    strength = (cov * known.channel_scale[..., None]).square().sum(dim=-1)
    strength = strength.view(batch, heads, head_dim // 2, 2).sum(dim=-1)
    pairs = strength.topk((rank + 1) // 2, dim=-1).indices
    return known.on_channels(torch.stack((2 * pairs, 2 * pairs + 1), dim=-1).flatten(-2))


def calibrate(exact: ExactQueries, state: State, start: Calibration) -> Calibration:
    """Solve for gate and channel scale; heads whose solution is not finite keep `start`.

    state: of the channels that `start` names; everything in float32 or wider.
    """
    dtype, cov = state.cov.dtype, state.cov
    slope, bias, gate = _fit_gate(exact, start, dtype)
    q, out, sparse_out = (x.to(dtype) for x in (exact.q, exact.out, exact.sparse_out))
    known_part = state.v_mean[:, :, None]
    if exact.branch is not None:
        known_part = known_part + exact.branch.to(dtype)
    wanted = out - (1 - gate) * sparse_out - gate * known_part
    weighted = gate * start.channels(q)
    normal = _pair_sums(_pair_sums((weighted.mT @ weighted) * (cov @ cov.mT), -1), -2)
    right = _pair_sums((weighted * (wanted @ cov.mT)).sum(dim=2), -1)
    ridge = RIDGE * normal.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None]
    prior = start.channel_scale[..., ::2]
    matrix = normal + torch.diag_embed(ridge.expand_as(right))
    solved, failed = torch.linalg.solve_ex(matrix, right + ridge * prior)
    most = MAX_CHANNEL_SCALE * state.scale
    channel_scale = solved.clamp(-most, most).repeat_interleave(2, dim=-1)

    good = (failed == 0) & torch.isfinite(solved).all(dim=-1)
    good = good & torch.isfinite(slope) & torch.isfinite(bias)
    return Calibration(
        torch.where(good, slope, start.gate_slope),
        torch.where(good, bias, start.gate_bias),
        torch.where(good[..., None], channel_scale, start.channel_scale),
        start.channel_ids,
    )


def gate_of(exact: ExactQueries, known: Calibration) -> Tensor:
    """The dropped blocks' share of the sampled queries `(B, H, R)`, as `known` estimates it."""
    own = 0.0 if exact.gate_logits is None else exact.gate_logits
    gap = exact.dropped_lse - exact.sparse_lse.clamp(min=-1e30)
    gate = torch.sigmoid(known.gate_slope[..., None] * gap + known.gate_bias[..., None] + own)
    gate = gate.masked_fill(exact.sparse_lse == -torch.inf, 1.0)
    return gate.masked_fill(exact.dropped_lse == -torch.inf, 0.0)


def mixed(exact: ExactQueries, state: State, known: Calibration) -> Tensor:
    """The sampled queries' outputs `(B, H, R, D)` as `known` mixes them, background included."""
    gate = gate_of(exact, known)[..., None]
    read = known.read(state)
    background = state.v_mean[:, :, None] + known.channels(exact.q.to(read.dtype)) @ read
    if exact.branch is not None:
        background = background + exact.branch
    kept = exact.sparse_out.to(background.dtype)
    if known.kept_map is not None:
        kept = kept + kept @ known.kept_map
    return torch.lerp(kept, background, gate)


def _fit_gate(
    exact: ExactQueries, start: Calibration, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """-> slope and bias `(B, H)`, and the gate `(B, H, R, 1)` that they give."""
    own = 0.0 if exact.gate_logits is None else exact.gate_logits.to(dtype)
    gap = (exact.lse - exact.sparse_lse).clamp(min=MIN_LOG_ODDS_GAP)
    y = (gap + torch.log(-torch.expm1(-gap))).clamp(max=MAX_LOG_ODDS)  # exp(gap) would overflow
    # -inf where a query's block drops nothing.
    u = (exact.dropped_lse - exact.sparse_lse).clamp(-MAX_LOG_ODDS, MAX_LOG_ODDS)
    y = y - own
    u_dev, y_dev = (x - x.mean(dim=-1, keepdim=True) for x in (u, y))
    slope = (u_dev * y_dev).mean(dim=-1) + SHRINK * start.gate_slope
    slope = (slope / (u_dev.square().mean(dim=-1) + SHRINK)).clamp(0.0, MAX_GATE_SLOPE)
    bias = y.mean(dim=-1) - slope * u.mean(dim=-1)
    bias = bias.clamp(-MAX_GATE_BIAS, MAX_GATE_BIAS)
    # A head that keeps nothing shows nothing of how to weigh what is kept.
    nothing = exact.sparse_lse == -torch.inf
    empty = nothing.all(dim=-1)
    slope = torch.where(empty, start.gate_slope.to(dtype), slope)
    bias = torch.where(empty, start.gate_bias.to(dtype), bias)
    gate = torch.sigmoid(slope[..., None] * u + bias[..., None] + own).masked_fill(nothing, 1.0)
    return slope, bias, gate[..., None]


def _pair_sums(x: Tensor, dim: int) -> Tensor:
    return x.unflatten(dim, (-1, 2)).sum(dim=dim)  # dim counts from the end
