"""What self-calibration leaves over, as far as queries and kept blocks predict it linearly.

On the R queries of a calibration, whose exact outputs are known:

    e_i = out_i - mixed_i                          what gate and background leave over
    F_i = [g_i q_i / a, (1 - g_i) O_s,i / b]       a, b: root mean squares of the head's q and O_s
    W = (F^T F + lambda tau)^-1 F^T e              tau: mean over the queries of the sum of F_i^2
    [N; M] = [W_q / a; W_s / b]

and F_i W is added to the output of every query, which needs no kernel of its own: it is

    (1 - g_i) O_s,i (1 + M)                        attention over the values v (1 + M)
    g_i (mean(v) + q_i (beta C + N))               the background, read by another matrix

lambda is the one of LAMBDAS whose leave-one-out error is the smallest, for each head; and W = 0
where even that is hardly smaller than the error without. Source: our own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .calibration import Calibration, ExactQueries, State, gate_of, mixed

LAMBDAS = (0.01, 0.3)
LEAST_LEFT = 1e-3  # of a query's own weight in its prediction, from 1
WORTH = 0.99  # share of the error without, that a correction has to beat
TINY = 1e-12


class Corrected(NamedTuple):
    """known: with the correction. left_out `(B, H, R, D)`: the queries' outputs, each corrected by
    what the others say; gate and background have seen them all."""

    known: Calibration
    left_out: Tensor


def correct(exact: ExactQueries, state: State, known: Calibration) -> Corrected:
    """Add to a calibration what is linear in its rest; everything in float32 or wider."""
    dtype = state.cov.dtype
    before = mixed(exact, state, known)
    rest = exact.out.to(dtype) - before
    gate = gate_of(exact, known)[..., None].to(dtype)
    q, kept = known.channels(exact.q.to(dtype)), exact.sparse_out.to(dtype)
    per_query, per_kept = (_per_size(x) for x in (q, kept))
    features = torch.cat((gate * (q * per_query), (1.0 - gate) * (kept * per_kept)), dim=-1)

    found = _ridge(features, rest)
    of_query, of_kept = found.weights.split((q.shape[-1], kept.shape[-1]), dim=-2)
    corrected = known._replace(query_map=of_query * per_query, kept_map=of_kept * per_kept)
    return Corrected(corrected, exact.out.to(dtype) - found.left_out)


class _Fit(NamedTuple):
    weights: Tensor  # (B, H, p, D)
    left_out: Tensor  # (B, H, R, D): what each query's rest is missed by


def _ridge(features: Tensor, rest: Tensor) -> _Fit:
    """The best of some penalties, or no weights: features `(B, H, R, p)`, rest `(B, H, R, D)`."""
    normal = features.mT @ features
    tau = features.square().sum(dim=-1).mean(dim=-1).clamp(min=TINY)
    eye = torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
    best, weights = rest, rest.new_zeros(*features.shape[:2], features.shape[-1], rest.shape[-1])
    least = WORTH * rest.square().sum(dim=(-2, -1))
    for penalty in LAMBDAS:
        factor, failed = torch.linalg.cholesky_ex(normal + (penalty * tau)[..., None, None] * eye)
        half = torch.linalg.solve_triangular(factor, features.mT, upper=False)
        found = torch.linalg.solve_triangular(factor.mT, half @ rest, upper=True)
        own = half.square().sum(dim=-2)[..., None]
        missed = (rest - features @ found) / (1.0 - own).clamp(min=LEAST_LEFT)
        error = missed.square().sum(dim=(-2, -1))
        better = (failed == 0) & (error < least)  # false for what is not finite
        least, better = torch.where(better, error, least), better[..., None, None]
        best, weights = torch.where(better, missed, best), torch.where(better, found, weights)
    return _Fit(weights, best)


def _per_size(x: Tensor) -> Tensor:
    """1 / root mean square of every head; 0 where that is no number."""
    size = x.square().mean(dim=(-2, -1), keepdim=True).sqrt().clamp(min=TINY)
    return torch.nan_to_num(1.0 / size, nan=0.0)
