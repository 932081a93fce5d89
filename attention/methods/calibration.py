"""Self-calibration of RoPeSLR: a few exactly computed rows tell how the tail's mass and the background must be scaled.

T, the tail's log-mass taken from pooled keys, is biased low, and the bias is nearly one number per head. On R rows with
exact attention (LSE, out) and sparse attention (LSE_s, out_s):

    y = log(exp(LSE - LSE_s) - 1)          the true log-odds of the dropped mass
    u = T - LSE_s                          its estimate
    c = (cov(u, y) + .1 c0) / (var(u) + .1),  b = mean(y) - c mean(u),  g = sigmoid(c u + b)
    beta = ridge solution of  g (v_mean + (beta q) C) = out - (1 - g) out_s,  one number per RoPE pair, prior beta0

Untrained, c0 = 1 and beta0 = 1/sqrt D; an adapter brings its own, and what it adds to gate and background besides
(a term of the hidden state, a low-rank branch) is taken off before the fit.

The normal equations of beta need no row-by-row design matrix: with p, p' RoPE pairs and a, b channels,
G_pp' = sum over a in p, b in p' of (C C^T)_ab (sum_i g_i^2 q_ia q_ib), and likewise for the right-hand side.
Source: our own (a reconstruction; see the README).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SHRINK = 0.1                                # pulls the slope c to 1 where the rows hardly differ
RIDGE = 0.05                                # of the mean diagonal of the normal equations
MIN_LOG_ODDS_GAP = 1e-4                     # LSE - LSE_s below this is rounding, not mass
MAX_LOG_ODDS = 30.0
MAX_GATE_C = 4.0
MAX_GATE_B = 20.0
MAX_BETA = 4.0                              # times the attention's scale, 1/sqrt D


class Calibration(NamedTuple):
    """What one layer knows for one conditioning: gate `(B, H)`, beta per channel `(B, H, R)`, channels `(B, H, R)`."""

    gate_c: Tensor
    gate_b: Tensor
    beta: Tensor
    features: Tensor | None


class ExactRows(NamedTuple):
    """Sampled query rows `(B, H, R, D)` with their exact and their sparse attention; log-masses `(B, H, R)`."""

    q: Tensor
    out: Tensor
    lse: Tensor
    sparse_out: Tensor
    sparse_lse: Tensor
    tail: Tensor
    gate_x: Tensor | None = None            # (B, H, R): an adapter's term of the gate
    branch: Tensor | None = None            # (B, H, R, D): what an adapter's low rank adds to the background


def untrained(cov: Tensor, scale: float) -> Calibration:
    """The first-order expansion itself: c = 1, b = 0, beta = scale on all channels; cov `(B, H, D, D)`."""
    ones = cov.new_ones(cov.shape[:2])
    return Calibration(ones, torch.zeros_like(ones), cov.new_full(cov.shape[:3], scale), None)


def strongest(known: Calibration, cov: Tensor, rank: int) -> Calibration:
    """The `rank` channels whose share of the background is largest, in RoPE pairs, by |beta| |C row|; 0 = all."""
    batch, heads, width, _ = cov.shape
    if not 0 < rank < width:
        return known
    strength = (cov * known.beta[..., None]).square().sum(dim=-1).view(batch, heads, width // 2, 2).sum(dim=-1)
    pairs = strength.topk((rank + 1) // 2, dim=-1).indices
    features = torch.stack((2 * pairs, 2 * pairs + 1), dim=-1).flatten(-2)
    return known._replace(beta=known.beta.gather(-1, features), features=features)


def calibrate(rows: ExactRows, v_mean: Tensor, cov: Tensor, start: Calibration, scale: float) -> Calibration:
    """Solve for gate and beta on the sampled rows; heads whose solution is not finite keep `start`.

    v_mean `(B, H, D)`, cov `(B, H, R, D)` of the channels that `start` names; everything in float32 or wider.
    """
    wide = cov.dtype
    q, out, sparse_out = (x.to(wide) for x in (rows.q, rows.out, rows.sparse_out))
    own_odds = 0.0 if rows.gate_x is None else rows.gate_x.to(wide)
    known_part = v_mean[:, :, None] if rows.branch is None else v_mean[:, :, None] + rows.branch.to(wide)

    gap = (rows.lse - rows.sparse_lse).clamp(min=MIN_LOG_ODDS_GAP)
    y = (gap + torch.log(-torch.expm1(-gap))).clamp(max=MAX_LOG_ODDS)         # exp(gap) alone would overflow
    u = (rows.tail - rows.sparse_lse).clamp(-MAX_LOG_ODDS, MAX_LOG_ODDS)         # -inf where a row drops nothing
    y = y - own_odds
    u_dev, y_dev = (x - x.mean(dim=-1, keepdim=True) for x in (u, y))
    c = ((u_dev * y_dev).mean(dim=-1) + SHRINK * start.gate_c) / (u_dev.square().mean(dim=-1) + SHRINK)
    c = c.clamp(0.0, MAX_GATE_C)
    b = (y.mean(dim=-1) - c * u.mean(dim=-1)).clamp(-MAX_GATE_B, MAX_GATE_B)

    gate = torch.sigmoid(c[..., None] * u + b[..., None] + own_odds)[..., None]
    picked = q
    if start.features is not None:
        picked = q.gather(-1, start.features[:, :, None].expand(-1, -1, q.shape[2], -1))
    wanted = out - (1 - gate) * sparse_out - gate * known_part
    weighted = gate * picked
    normal = _pair_sums(_pair_sums((weighted.mT @ weighted) * (cov @ cov.mT), -1), -2)
    right = _pair_sums((weighted * (wanted @ cov.mT)).sum(dim=2), -1)
    ridge = RIDGE * normal.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None]
    prior = start.beta[..., ::2]
    solved, failed = torch.linalg.solve_ex(normal + torch.diag_embed(ridge.expand_as(right)), right + ridge * prior)
    beta = solved.clamp(-MAX_BETA * scale, MAX_BETA * scale).repeat_interleave(2, dim=-1)

    good = (failed == 0) & torch.isfinite(solved).all(dim=-1) & torch.isfinite(c) & torch.isfinite(b)
    return Calibration(
        torch.where(good, c, start.gate_c), torch.where(good, b, start.gate_b),
        torch.where(good[..., None], beta, start.beta), start.features,
    )


def _pair_sums(x: Tensor, dim: int) -> Tensor:
    return x.unflatten(dim, (-1, 2)).sum(dim=dim)                            # dim counts from the end
