"""What the background of an attention layer consists of: plain tuples of tensors that the operations take."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

ACTS = ("softmax", "elu", "relu")


class Gate(NamedTuple):
    """Mixing by mass: g = sigmoid(c (tail - LSE) + b + x), 0 where a row drops nothing."""

    c: Tensor                               # (B, H)
    b: Tensor                               # (B, H)
    x: Tensor | None = None                 # (B, H, Lq): a term of each query's own


class FirstOrder(NamedTuple):
    """Background v_mean + (beta q) cov, exact to first order in the logits."""

    v_mean: Tensor                          # (B, H, D)
    cov: Tensor                             # (B, H, R, D): mean((k - mean k)^T v) over the dropped tokens' kind
    beta: Tensor                            # (B, H, R)
    features: Tensor | None = None          # (B, H, R) int64: the channels of q that take part; all when None


class FeatureMap(NamedTuple):
    """phi(x, p) = act(A x + E(p)), x taken back to where it was before RoPE. act: one of ACTS."""

    act: str
    a: Tensor | None = None                 # (H, r, D); None: the channels themselves are the logits, r = D
    cos: Tensor | None = None               # (L, D / 2) float32: RoPE's, interleaved pairs; None: x was not rotated
    sin: Tensor | None = None
    pe: Tensor | None = None                # (H, P, r) float32
    places: Tensor | None = None            # (L, 3) int32: E(p) is the sum of these rows of pe


class SiluMap(NamedTuple):
    """phi(x, p) = turn(silu(A x + E(p))), x taken back to where it was before RoPE; turn rotates pairs of features."""

    a: Tensor                               # (H, r, D)
    cos: Tensor                             # (L, D / 2) float32: RoPE's, interleaved pairs
    sin: Tensor
    pe: Tensor | None = None                # (H, P, r) float32
    places: Tensor | None = None            # (L, 3) int32: E(p) is the sum of these rows of pe
    turn_cos: Tensor | None = None          # (L, T): the first 2 T features are rotated; None = none
    turn_sin: Tensor | None = None


class LinearState(NamedTuple):
    """What a linear branch reads: phi_q S / (eps + phi_q z), with means over the tokens of v's side."""

    state: Tensor                           # (B, H, r, D): S = mean(phi_k^T v)
    norm: Tensor                            # (B, H, r): z = mean(phi_k)
    eps: float = 1e-5


class LowRank(NamedTuple):
    """A linear branch added to the background: background += eta (read - v_mean)."""

    map: FeatureMap                         # of the queries
    linear: LinearState
    eta: Tensor                             # (H,)
