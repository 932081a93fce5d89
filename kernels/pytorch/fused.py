"""Sparse output and what is added to it in one call, in plain PyTorch.

Every part differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import (
    Background,
    BlockMask,
    EightBit,
    FeatureMap,
    LinearBranch,
    LinearState,
    TokenBlocks,
)
from .attention import block_sparse_attention
from .common import acc_dtype, channels, per_head
from .pooling import features


def block_sparse_mixed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    background: Background,
    scale: float,
    out: Tensor | None = None,
    eight_bit: EightBit | None = None,
) -> Tensor:
    """See `reference.block_sparse_mixed`."""
    sparse, lse = block_sparse_attention(q, k, v, mask, None, scale, None, eight_bit)
    return mix_background(q, sparse, lse, mask.q_blocks, background, out)


def mix_background(
    q: Tensor,
    sparse: Tensor,
    lse: Tensor,
    q_blocks: TokenBlocks,
    background: Background,
    out: Tensor | None = None,
) -> Tensor:
    """See `reference.mix_background`."""
    dtype = acc_dtype(q.dtype)
    gate, first, low_rank = background
    dropped = gate.dropped_lse.index_select(2, q_blocks.block_of_token)
    share = torch.sigmoid(gate.logit(lse, dropped)).masked_fill(lse == -torch.inf, 1.0)
    share = share.masked_fill(dropped == -torch.inf, 0.0)[..., None]

    def mix(b: int, h: int) -> tuple[Tensor]:
        queries = channels(q, first.channel_ids, b, h).to(dtype)
        matrix = first.cov[b, h] * first.channel_scale[b, h, :, None]
        mixed = torch.addmm(first.v_mean[b, h], queries, matrix)
        if low_rank is not None:
            read = _read(q[b, h].to(dtype), low_rank.feature_map, low_rank.state, b, h)
            mixed = mixed + low_rank.scale[h] * (read - first.v_mean[b, h])
        return (torch.lerp(sparse[b, h].to(dtype), mixed, share[b, h]).to(q.dtype),)

    return per_head(q, mix, nhd_outputs=1, out=out)[0]


def block_sparse_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    branch: LinearBranch,
    scale: float,
    out: Tensor | None = None,
    eight_bit: EightBit | None = None,
) -> Tensor:
    """See `reference.block_sparse_linear`."""
    sparse, _ = block_sparse_attention(q, k, v, mask, None, scale, None, eight_bit)
    return add_linear(q, sparse, branch, out)


def add_linear(
    q: Tensor, sparse: Tensor, branch: LinearBranch, out: Tensor | None = None
) -> Tensor:
    """Sparse output + linear branch + bias."""
    dtype = acc_dtype(q.dtype)

    def add(b: int, h: int) -> tuple[Tensor]:
        read = _read(q[b, h].to(dtype), branch.feature_map, branch.state, b, h)
        return ((sparse[b, h].to(dtype) + read + branch.bias.to(dtype)).to(q.dtype),)

    return per_head(q, add, nhd_outputs=1, out=out)[0]


def linear_read(q: Tensor, feature_map: FeatureMap, state: LinearState) -> Tensor:
    """See `reference.linear_read`; in q's dtype or wider."""
    dtype = acc_dtype(q.dtype)
    return per_head(q, lambda b, h: (_read(q[b, h].to(dtype), feature_map, state, b, h),))[0]


def _read(x: Tensor, feature_map: FeatureMap, state: LinearState, b: int, h: int) -> Tensor:
    phi = features(x, feature_map, h)
    under = state.eps + phi @ state.normalizer[b, h].to(x.dtype)
    return (phi @ state.kv_state[b, h].to(x.dtype)) / under[:, None]
