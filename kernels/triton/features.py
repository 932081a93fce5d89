"""Feature maps of the low-rank branch, in kernels: phi = act(proj x + pe), x before RoPE."""

from __future__ import annotations

# Kernel bodies are Triton's own language, which a type checker takes for Python.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

from .tiles import STRIDE_UNIT, load_rows

ACT_NUMBERS = {"softmax": 0, "elu": 1}
SOFTMAX = tl.constexpr(0)


@triton.jit
def feature_tile(
    x_ptr, rows, row, head, proj_ptr, cos_ptr, sin_ptr, pe_ptr, axis_ids_ptr, pe_rows, rank,
    D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """phi `(BLOCK, RP)` float32 of rows of x `(L, D)`; 0 on empty slots and beyond the rank."""
    features = tl.arange(0, RP)
    logits = feature_logits(
        x_ptr, rows, row, head, proj_ptr, cos_ptr, sin_ptr, pe_ptr, axis_ids_ptr, pe_rows, rank,
        D, DP, RP, BLOCK,
    )  # fmt: skip
    if ACT == SOFTMAX:
        logits = tl.where((features < rank)[None, :], logits, -float("inf"))
        phi = tl.exp(logits - tl.max(logits, 1)[:, None])
        phi = phi / tl.sum(phi, 1)[:, None]
    else:  # elu + 1
        phi = tl.where(logits > 0, logits + 1.0, tl.exp(tl.minimum(logits, 0.0)))
    return tl.where((features < rank)[None, :] & (rows >= 0)[:, None], phi, 0.0)


@triton.jit
def silu_tile(
    x_ptr, rows, row, head, proj_ptr, cos_ptr, sin_ptr, pe_ptr, axis_ids_ptr,
    turn_cos_ptr, turn_sin_ptr, turned, pe_rows, rank,
    D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same with SiLU; turn_cos, turn_sin `(L, turned)` rotate that many pairs of features."""
    features = tl.arange(0, RP)
    filled = rows >= 0
    logits = feature_logits(
        x_ptr, rows, row, head, proj_ptr, cos_ptr, sin_ptr, pe_ptr, axis_ids_ptr, pe_rows, rank,
        D, DP, RP, BLOCK,
    )  # fmt: skip
    phi = logits * tl.sigmoid(logits)
    phi = tl.where((features < rank)[None, :] & filled[:, None], phi, 0.0)
    if turn_cos_ptr is not None:
        pairs = tl.arange(0, RP // 2)
        mask = filled[:, None] & (pairs < turned)[None, :]
        offsets = rows.to(tl.int64)[:, None] * turned + pairs[None, :]
        cos = tl.load(turn_cos_ptr + offsets, mask=mask, other=1.0)
        sin = tl.load(turn_sin_ptr + offsets, mask=mask, other=0.0)
        even, odd = tl.split(phi.reshape(BLOCK, RP // 2, 2))
        phi = tl.join(even * cos - odd * sin, even * sin + odd * cos).reshape(BLOCK, RP)
    return phi


@triton.jit
def feature_logits(
    x_ptr, rows, row, head, proj_ptr, cos_ptr, sin_ptr, pe_ptr, axis_ids_ptr, pe_rows, rank,
    D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the activation is applied to, `(BLOCK, RP)` float32.

    proj `(H, rank, D)`: without it the channels themselves are the logits (SLA). cos, sin
    `(L, D / 2)` float32: RoPE's, undone here. pe `(H, pe_rows, rank)` float32 and axis_ids `(L, 3)`
    int32: the learned position of a token is the sum of three rows of pe. x is read in pieces of 32
    channels: a whole tile of pairs and angles fills the registers.
    """
    features = tl.arange(0, RP)
    filled = rows >= 0
    if proj_ptr is None:
        logits = load_rows(x_ptr, rows, row, D, DP).to(tl.float32)
    else:
        logits = tl.zeros((BLOCK, RP), tl.float32)
        PIECE: tl.constexpr = 32
        for first in tl.range(0, DP, PIECE, num_stages=1):
            channels = first + tl.arange(0, PIECE)
            mask = filled[:, None] & (channels < D)[None, :]
            offsets = (rows * row).to(tl.int64) * STRIDE_UNIT
            x = tl.load(x_ptr + offsets[:, None] + channels[None, :], mask=mask, other=0.0)
            even, odd = tl.split(x.to(tl.float32).reshape(BLOCK, PIECE // 2, 2))
            pairs = first // 2 + tl.arange(0, PIECE // 2)
            if cos_ptr is not None:
                offsets = rows[:, None] * (D // 2) + pairs[None, :]
                mask = filled[:, None] & (pairs < D // 2)[None, :]
                cos = tl.load(cos_ptr + offsets, mask=mask, other=1.0)
                sin = tl.load(sin_ptr + offsets, mask=mask, other=0.0)
                even, odd = even * cos + odd * sin, odd * cos - even * sin
            weights = (proj_ptr + head * rank * D) + (features[:, None] * D + 2 * pairs[None, :])
            mask = (features < rank)[:, None] & (pairs < D // 2)[None, :]
            by_even = tl.load(weights, mask=mask, other=0.0).to(x.dtype)
            logits = tl.dot(even.to(x.dtype), by_even.T, logits)
            by_odd = tl.load(weights + 1, mask=mask, other=0.0).to(x.dtype)
            logits = tl.dot(odd.to(x.dtype), by_odd.T, logits)
    mask = (features < rank)[None, :] & filled[:, None]
    if pe_ptr is not None:
        for axis in tl.static_range(3):
            axis_id = tl.load(axis_ids_ptr + rows * 3 + axis, mask=filled, other=0)
            offsets = axis_id[:, None] * rank + features[None, :]
            logits += tl.load((pe_ptr + head * pe_rows * rank) + offsets, mask=mask, other=0.0)
    return logits


@triton.jit
def linear_weights(phi, share, head, normalizer_ptr, eps_ptr, rank, RP: tl.constexpr):
    """share phi / (eps + phi z), z `(B*H, rank)`: what a linear branch reads its state with.

    The quotient is taken into phi before the product, so that acc is the only tile that it needs.
    No weight that is rounded for it exceeds half precision.
    """
    features = tl.arange(0, RP)
    normalizer = tl.load(normalizer_ptr + head * rank + features, mask=features < rank, other=0.0)
    under = tl.load(eps_ptr + head) + tl.sum(phi * normalizer[None, :], 1)
    return tl.clamp(phi * (share / under)[:, None], -60000.0, 60000.0)


@triton.jit
def add_linear(
    acc, weights, head, kv_state_ptr, scale_ptr, rank,
    D: tl.constexpr, WIDTH: tl.constexpr, RP: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """acc + weights S for WIDTH channels from FIRST on: S `(B*H, rank, D)` in units of `scale`.

    The sum is made in S's units.
    """
    features, channels = tl.arange(0, RP), FIRST + tl.arange(0, WIDTH)
    mask = (features < rank)[:, None] & (channels < D)[None, :]
    offsets = features[:, None] * D + channels[None, :]
    state = tl.load((kv_state_ptr + head * rank * D) + offsets, mask=mask, other=0.0)
    scale = tl.load(scale_ptr + head)
    return tl.dot(weights, state, acc / scale) * scale
