"""Branches added to the sparse output (RoLA, SLA's paper form, VSA), in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import BlockLayout, RmsLowRank, SiluMap, TokenBlocks
from .common import acc_dtype, gather, per_head, scatter
from .pooling import project

SIZE_EPS = 1e-5  # under the root of the sparse output's mean square
BLOCKS_PER_STEP = 64  # query blocks whose D x D states stand in memory at once


def add_rms_low_rank(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sparse: Tensor,
    gate: Tensor,
    branch: RmsLowRank,
    out: Tensor | None = None,
) -> Tensor:
    """See `reference.add_rms_low_rank`."""
    dtype = acc_dtype(q.dtype)

    def add(b: int, h: int) -> tuple[Tensor]:
        near = sparse[b, h].to(dtype)
        size = (near.square().mean(dim=-1, keepdim=True) + SIZE_EPS).sqrt()
        far = gate[b, h, :, None].to(dtype) * _rms_low_rank(q, k, v, branch, b, h)
        return (((near / size + far) * size).to(q.dtype),)

    return per_head(q, add, nhd_outputs=1, out=out)[0]


def rms_low_rank(q: Tensor, k: Tensor, v: Tensor, branch: RmsLowRank) -> Tensor:
    """See `reference.rms_low_rank`; float32 or wider."""
    return per_head(q, lambda b, h: (_rms_low_rank(q, k, v, branch, b, h),))[0]


def _rms_low_rank(q: Tensor, k: Tensor, v: Tensor, branch: RmsLowRank, b: int, h: int) -> Tensor:
    phi = silu_features(q[b, h].to(acc_dtype(q.dtype)), branch.q_map, h)
    read = phi @ _state(k, v, branch.k_map, b, h)
    return read * (read.square().mean(dim=-1, keepdim=True) + branch.eps).rsqrt()


def feature_energy(q: Tensor, k: Tensor, v: Tensor, branch: RmsLowRank) -> Tensor:
    """See `reference.feature_energy`."""

    def energy(b: int, h: int) -> tuple[Tensor]:
        phi = silu_features(q[b, h].to(acc_dtype(q.dtype)), branch.q_map, h)
        state = _state(k, v, branch.k_map, b, h)
        return (phi.square().mean(dim=0) * state.square().sum(dim=-1),)

    return per_head(q, energy)[0]


def _state(k: Tensor, v: Tensor, silu_map: SiluMap, b: int, h: int) -> Tensor:
    """sum phi_k^T v of one head: -> `(r, D)`."""
    dtype = acc_dtype(k.dtype)
    return silu_features(k[b, h].to(dtype), silu_map, h).T @ v[b, h].to(dtype)


def silu_features(x: Tensor, silu_map: SiluMap, h: int) -> Tensor:
    """phi of one head: x `(L, D)` -> `(L, r)`."""
    phi = F.silu(project(x, silu_map, h))
    cos, sin = silu_map.feature_cos, silu_map.feature_sin
    if cos is None or sin is None:
        return phi
    rotated = 2 * cos.shape[1]
    even, odd = phi[:, :rotated:2], phi[:, 1:rotated:2]
    pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return torch.cat((pairs.flatten(-2), phi[:, rotated:]), dim=-1)


def add_coarse(
    out: Tensor,
    gate: Tensor,
    pooled: tuple[Tensor, Tensor, Tensor],
    blocks: TokenBlocks,
    scale: float,
) -> Tensor:
    """See `reference.add_coarse`; in place where no gradients are required."""
    dtype, (queries, keys, values) = acc_dtype(out.dtype), pooled
    block = blocks.block_of_token

    def add(b: int, h: int) -> tuple[Tensor]:
        coarse = (scale * queries[b, h] @ keys[b, h].mT).softmax(dim=-1) @ values[b, h]
        each = F.pad(coarse.to(dtype), (0, 0, 0, 1))[block]  # tokens in no block get nothing
        return (torch.addcmul(out[b, h].to(dtype), gate[b, h].to(dtype), each).to(out.dtype),)

    return per_head(out, add, nhd_outputs=1, out=out)[0]


def marginal_linear(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, marginal: Tensor, eps: float
) -> Tensor:
    """See `reference.marginal_linear`: a D x D state per key block, summed over the marked blocks.

    That sum costs 2 Nq Nk D^2 per head: at head_dim 128 1.6 % of dense attention in blocks of 64,
    6.3 % with key blocks of 16, whatever the length.
    """
    dtype, head_dim = acc_dtype(q.dtype), q.shape[-1]
    q_blocks, kv_blocks = layout.q_blocks, layout.kv_blocks

    def read(b: int, h: int) -> tuple[Tensor]:
        phi_k = gather(k[b, h].to(dtype).softmax(dim=-1), kv_blocks, dtype, zero_empty=True)
        values = gather(v[b, h], kv_blocks, dtype, zero_empty=True)
        states, norms = (phi_k.mT @ values).flatten(1), phi_k.sum(dim=1)
        phi_q = gather(q[b, h].to(dtype).softmax(dim=-1), q_blocks, dtype)
        partials = []
        for some in torch.arange(q_blocks.num_blocks, device=q.device).split(BLOCKS_PER_STEP):
            mask = marginal[b, h, some].to(dtype)
            state = (mask @ states).unflatten(1, (head_dim, -1))
            norm = (mask @ norms)[..., None]
            partials.append((phi_q[some] @ state) / (eps + phi_q[some] @ norm))
        return (scatter(torch.cat(partials), q_blocks),)

    return per_head(q, read)[0]
