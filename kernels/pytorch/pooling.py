"""Pooling and states in plain PyTorch: block means, first-order state, low-rank state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import BlockLayout, FeatureMap, SiluMap, TokenBlocks
from .common import acc_dtype, gather, per_head


def block_pool(x: Tensor, blocks: TokenBlocks) -> Tensor:
    """See `reference.block_pool`; float32 or wider."""
    dtype, sizes = acc_dtype(x.dtype), blocks.sizes[:, None]

    def pool(b: int, h: int) -> tuple[Tensor]:
        return (gather(x[b, h], blocks, dtype, zero_empty=True).sum(dim=1) / sizes,)

    return per_head(x, pool)[0]


def block_pool_state(
    k: Tensor, v: Tensor, layout: BlockLayout, channel_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.block_pool_state`."""
    dtype, blocks, own = acc_dtype(k.dtype), layout.kv_blocks, layout.kv_of_queries

    def state(b: int, h: int) -> tuple[Tensor, Tensor, Tensor]:
        keys = gather(k[b, h], blocks, dtype, zero_empty=True)
        values = gather(v[b, h], own, dtype, zero_empty=True).flatten(0, 1)
        means = keys.sum(dim=1) / blocks.sizes[:, None]
        keys = keys[: own.num_blocks].flatten(0, 1)
        if channel_ids is not None:
            keys = keys.index_select(1, channel_ids[b, h])
        count, empty = own.num_listed, own.tokens.numel() - own.num_listed
        k_mean, v_mean = keys.sum(dim=0) / count, values.sum(dim=0) / count
        # An empty slot's value is 0, so its key does not matter.
        centred = keys - k_mean
        # What rounding leaves of a sum that should be 0 would count v_mean times.
        rest = centred.sum(dim=0) + empty * k_mean
        cov = centred.T @ values - rest[:, None] * v_mean
        return means, v_mean, cov / count

    return per_head(k, state)


def low_rank_state(k: Tensor, v: Tensor, feature_map: FeatureMap) -> tuple[Tensor, Tensor]:
    """See `reference.low_rank_state`."""
    dtype = acc_dtype(k.dtype)

    def state(b: int, h: int) -> tuple[Tensor, Tensor]:
        phi = features(k[b, h].to(dtype), feature_map, h)
        return phi.T @ v[b, h].to(dtype) / phi.shape[0], phi.mean(dim=0)

    return per_head(k, state)


def features(x: Tensor, feature_map: FeatureMap, h: int) -> Tensor:
    """phi of one head: x `(L, D)` -> `(L, r)`."""
    logits = project(x, feature_map, h)
    return logits.softmax(dim=-1) if feature_map.act == "softmax" else F.elu(logits) + 1


def project(x: Tensor, feature_map: FeatureMap | SiluMap, h: int) -> Tensor:
    """proj x + pe(p) of one head, x taken back to before RoPE: x `(L, D)` -> `(L, r)`."""
    cos, sin = feature_map.rope_cos, feature_map.rope_sin
    if cos is not None and sin is not None:
        even, odd = x[:, 0::2], x[:, 1::2]
        x = torch.stack((even * cos + odd * sin, odd * cos - even * sin), dim=-1).flatten(-2)
    if feature_map.proj is not None:
        x = x @ feature_map.proj[h].to(x.dtype).T
    if feature_map.pe is not None and feature_map.axis_ids is not None:
        for axis in range(3):
            x = x + feature_map.pe[h].index_select(0, feature_map.axis_ids[:, axis])
    return x
