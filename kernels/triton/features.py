"""Feature maps of the low-rank branch, in kernels: phi = act(A x + E), x taken back to where it was before RoPE."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import load_rows

SOFTMAX, ELU, RELU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
ACTS = {"softmax": 0, "elu": 1, "relu": 2}


@triton.jit
def feature_tile(
    x_ptr, rows, row, head, a_ptr, cos_ptr, sin_ptr, pe_ptr, places_ptr, pe_rows, rank,
    D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr,
):
    """phi `(BLOCK, RP)` float32 of rows of x `(L, D)`; 0 on empty slots and beyond the rank.

    a `(H, rank, D)`: without it the channels themselves are the logits (SLA). cos, sin `(L, D / 2)` float32: RoPE's,
    undone here. pe `(H, pe_rows, rank)` float32 and places `(L, 3)` int32: the learned position of a token is the sum
    of three rows of pe. x is read in pieces of 32 channels: a whole tile of pairs and angles fills the registers.
    """
    features = tl.arange(0, RP)
    there = rows >= 0
    if a_ptr is None:
        logits = load_rows(x_ptr, rows, row, D, DP).to(tl.float32)
    else:
        logits = tl.zeros((BLOCK, RP), tl.float32)
        PIECE: tl.constexpr = 32
        for first in tl.range(0, DP, PIECE, num_stages=1):
            channels = first + tl.arange(0, PIECE)
            inside = there[:, None] & (channels < D)[None, :]
            at = x_ptr + rows.to(tl.int64)[:, None] * (row * 8) + channels[None, :]
            x = tl.load(at, mask=inside, other=0.0)
            even, odd = tl.split(x.to(tl.float32).reshape(BLOCK, PIECE // 2, 2))
            halves = first // 2 + tl.arange(0, PIECE // 2)
            if cos_ptr is not None:
                at = rows[:, None] * (D // 2) + halves[None, :]
                inside = there[:, None] & (halves < D // 2)[None, :]
                cos = tl.load(cos_ptr + at, mask=inside, other=1.0)
                sin = tl.load(sin_ptr + at, mask=inside, other=0.0)
                even, odd = even * cos + odd * sin, odd * cos - even * sin
            weights = (a_ptr + head * rank * D) + (features[:, None] * D + 2 * halves[None, :])
            inside = (features < rank)[:, None] & (halves < D // 2)[None, :]
            a_even = tl.load(weights, mask=inside, other=0.0).to(x.dtype)
            logits = tl.dot(even.to(x.dtype), a_even.T, logits)
            a_odd = tl.load(weights + 1, mask=inside, other=0.0).to(x.dtype)
            logits = tl.dot(odd.to(x.dtype), a_odd.T, logits)
    used = (features < rank)[None, :] & there[:, None]
    if pe_ptr is not None:
        for axis in tl.static_range(3):
            place = tl.load(places_ptr + rows * 3 + axis, mask=there, other=0)
            at = place[:, None] * rank + features[None, :]
            logits += tl.load((pe_ptr + head * pe_rows * rank) + at, mask=used, other=0.0)
    if ACT == SOFTMAX:
        logits = tl.where((features < rank)[None, :], logits, -float("inf"))
        phi = tl.exp(logits - tl.max(logits, 1)[:, None])
        phi = phi / tl.sum(phi, 1)[:, None]
    elif ACT == ELU:
        phi = tl.where(logits > 0, logits + 1.0, tl.exp(tl.minimum(logits, 0.0)))
    else:
        phi = tl.maximum(logits, 0.0)
    return tl.where(used, phi, 0.0)


@triton.jit
def add_linear(
    acc, phi, share, head, state_ptr, scale_ptr, norm_ptr, eps_ptr, rank,
    D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr,
):
    """acc + share (phi S) / (eps + phi z): state S `(B*H, rank, D)` in scaled units, norm z `(B*H, rank)`.

    The quotient is taken into phi before the product, and the sum is made in S's units, so that acc is the only tile
    that the product needs. No weight that is rounded for it exceeds half precision.
    """
    features, channels = tl.arange(0, RP), tl.arange(0, DP)
    norm = tl.load(norm_ptr + head * rank + features, mask=features < rank, other=0.0)
    under = tl.load(eps_ptr + head) + tl.sum(phi * norm[None, :], 1)
    weights = tl.clamp(phi * (share / under)[:, None], -60000.0, 60000.0)
    inside = (features < rank)[:, None] & (channels < D)[None, :]
    at = features[:, None] * D + channels[None, :]
    state = tl.load((state_ptr + head * rank * D) + at, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + head)
    return tl.dot(weights.to(state.dtype), state, acc / scale) * scale
