"""The background of what was dropped, in plain PyTorch: states, feature maps, mixing; every function differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..background import FeatureMap, FirstOrder, Gate, LinearState, LowRank, SiluMap
from .attention import block_sparse_attention
from .heads import block_sizes, channels, gather, per_head, token_slots, wide


def block_pool_state(
    k: Tensor, v: Tensor, blocks: Tensor, inner: int, features: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Block means of k and the first-order state of the first `inner` blocks: see `reference.block_pool_state`."""
    dtype, sizes = wide(k.dtype), block_sizes(blocks)
    tokens = sizes[:inner].sum()

    def state(b: int, h: int) -> tuple[Tensor, Tensor, Tensor]:
        keys = gather(k[b, h], blocks, dtype, zero_empty=True)
        values = gather(v[b, h], blocks[:inner], dtype, zero_empty=True).flatten(0, 1)
        means = keys.sum(dim=1) / sizes[:, None]
        keys = keys[:inner].flatten(0, 1)
        if features is not None:
            keys = keys.index_select(1, features[b, h])
        centred = keys - keys.sum(dim=0) / tokens           # an empty slot's value is 0, so its key does not matter
        return means, values.sum(dim=0) / tokens, centred.T @ values / tokens

    return per_head(k, state)


def low_rank_state(k: Tensor, v: Tensor, map: FeatureMap) -> tuple[Tensor, Tensor]:
    """mean(phi_k^T v) and mean(phi_k): see `reference.low_rank_state`."""
    dtype = wide(k.dtype)

    def state(b: int, h: int) -> tuple[Tensor, Tensor]:
        phi = _features(k[b, h].to(dtype), map, h)
        return phi.T @ v[b, h].to(dtype) / phi.shape[0], phi.mean(dim=0)

    return per_head(k, state)


def mix_background(
    q: Tensor, out: Tensor, lse: Tensor, tail: Tensor, q_blocks: Tensor, gate: Gate, first: FirstOrder,
    low_rank: LowRank | None = None,
) -> Tensor:
    """Mix sparse output and background by mass: see `reference.mix_background`."""
    dtype = wide(q.dtype)
    slots = token_slots(q_blocks, q.shape[2])
    tail = tail.index_select(2, slots // q_blocks.shape[1])
    odds = gate.c[..., None] * (tail - lse.clamp(min=-1e30)) + gate.b[..., None]
    g = torch.sigmoid(odds if gate.x is None else odds + gate.x).masked_fill(tail == -torch.inf, 0.0)[..., None]

    def mix(b: int, h: int) -> tuple[Tensor]:
        queries = channels(q, first.features, b, h).to(dtype)
        background = torch.addmm(first.v_mean[b, h], queries, first.cov[b, h] * first.beta[b, h, :, None])
        if low_rank is not None:
            read = _read(q[b, h].to(dtype), low_rank.map, low_rank.linear, b, h)
            background = background + low_rank.eta[h] * (read - first.v_mean[b, h])
        return (torch.lerp(out[b, h].to(dtype), background, g[b, h]).to(q.dtype),)

    return per_head(q, mix, host=1)[0]


def block_sparse_mixed(
    q: Tensor, k: Tensor, v: Tensor, q_blocks: Tensor, k_blocks: Tensor, indices: Tensor, counts: Tensor, tail: Tensor,
    gate: Gate, first: FirstOrder, low_rank: LowRank | None, scale: float,
) -> Tensor:
    """See `reference.block_sparse_mixed`."""
    out, lse = block_sparse_attention(q, k, v, q_blocks, k_blocks, indices, counts, None, None, scale)
    return mix_background(q, out, lse, tail, q_blocks, gate, first, low_rank)


def block_sparse_linear(
    q: Tensor, k: Tensor, v: Tensor, q_blocks: Tensor, k_blocks: Tensor, indices: Tensor, counts: Tensor,
    map: FeatureMap, linear: LinearState, bias: Tensor, scale: float,
) -> Tensor:
    """See `reference.block_sparse_linear`."""
    out, _ = block_sparse_attention(q, k, v, q_blocks, k_blocks, indices, counts, None, None, scale)
    return add_linear(q, out, map, linear, bias)


def add_linear(q: Tensor, out: Tensor, map: FeatureMap, linear: LinearState, bias: Tensor) -> Tensor:
    """Sparse output + linear branch + bias."""
    dtype = wide(q.dtype)

    def add(b: int, h: int) -> tuple[Tensor]:
        return ((out[b, h].to(dtype) + _read(q[b, h].to(dtype), map, linear, b, h) + bias.to(dtype)).to(q.dtype),)

    return per_head(q, add, host=1)[0]


def linear_read(q: Tensor, map: FeatureMap, linear: LinearState) -> Tensor:
    """What a linear branch reads, in q's dtype or wider: see `reference.linear_read`."""
    return per_head(q, lambda b, h: (_read(q[b, h].to(wide(q.dtype)), map, linear, b, h),))[0]


def _read(x: Tensor, map: FeatureMap, linear: LinearState, b: int, h: int) -> Tensor:
    phi = _features(x, map, h)
    return (phi @ linear.state[b, h].to(x.dtype)) / (linear.eps + phi @ linear.norm[b, h].to(x.dtype))[:, None]


def _features(x: Tensor, map: FeatureMap, h: int) -> Tensor:
    """phi of one head: x `(L, D)` -> `(L, r)`."""
    logits = project(x, map, h) if map.a is not None else x
    if map.pe is not None:
        logits = add_places(logits, map, h)
    if map.act == "softmax":
        return logits.softmax(dim=-1)
    return F.elu(logits) + 1 if map.act == "elu" else F.relu(logits)


def project(x: Tensor, map: FeatureMap | SiluMap, h: int) -> Tensor:
    """A x of one head, before RoPE: x `(L, D)` -> `(L, r)`."""
    if map.cos is not None:
        even, odd = x[:, 0::2], x[:, 1::2]
        x = torch.stack((even * map.cos + odd * map.sin, odd * map.cos - even * map.sin), dim=-1).flatten(-2)
    return x @ map.a[h].to(x.dtype).T


def add_places(logits: Tensor, map: FeatureMap | SiluMap, h: int) -> Tensor:
    """logits `(L, r)` + E(p) of one head."""
    for axis in range(3):
        logits = logits + map.pe[h].index_select(0, map.places[:, axis])
    return logits
