"""Pooling and states: block means, first-order state of keys and values, low-rank state."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import dispatch, pytorch
from ..types import BlockLayout, FeatureMap, TokenBlocks
from .register import fake_sums, operands, operation, wants_gradients
from .validate import check_backend, check_blocks, check_heads, check_map, check_shape


def block_pool(x: Tensor, blocks: TokenBlocks, *, backend: str = "auto") -> Tensor:
    """x `(B, H, L, D)` -> block means `(B, H, N, D)`, float32 or wider.

    Example: `block_pool(torch.randn(1, 2, 100, 64), TokenBlocks.cut(torch.arange(100), 64))`.
    """
    check_backend(backend)
    check_heads(x=x)
    check_blocks("blocks", blocks, x)
    if wants_gradients(x):
        return pytorch.block_pool(x, blocks)
    if is_compiling():
        return block_pool_op(x, blocks.tokens, blocks.num_listed, backend)
    return dispatch.run("block_pool", backend, operands(x, blocks), x, blocks)


@operation("block_pool")
def block_pool_op(x: Tensor, tokens: Tensor, num_listed: int, backend: str) -> Tensor:
    return block_pool(x, TokenBlocks(tokens, x.shape[2], num_listed), backend=backend)


@block_pool_op.register_fake
def _(x, tokens, num_listed, backend):
    return fake_sums(x, *x.shape[:2], tokens.shape[0], x.shape[3])


def block_pool_state(
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    channel_ids: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Block means of k `(B, H, Nk, D)`, v_mean `(B, H, D)`, cov `(B, H, r, D)`; float32 or wider.

    The last two are of the keys that stand at a query's place, and of the channels of k that
    channel_ids `(B, H, r)` names.
    """
    check_backend(backend)
    check_heads(k=k, v=v)
    check_shape("v", v, k.shape)
    check_blocks("layout.kv_blocks", layout.kv_blocks, k)
    if wants_gradients(k, v):
        return pytorch.block_pool_state(k, v, layout, channel_ids)
    if is_compiling():
        blocks = layout.kv_blocks
        listed = [blocks.num_listed, layout.q_blocks.num_listed]
        return block_pool_state_op(k, v, blocks.tokens, listed, channel_ids, backend)
    found = operands(k, layout.kv_blocks)
    return dispatch.run("block_pool_state", backend, found, k, v, layout, channel_ids)


@operation("block_pool_state")
def block_pool_state_op(
    k: Tensor,
    v: Tensor,
    tokens: Tensor,
    listed: list[int],
    channel_ids: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kv_listed, queries = listed
    # Of the queries only the number counts here.
    q_blocks = TokenBlocks.cut(torch.arange(queries, device=tokens.device), tokens.shape[1])
    layout = BlockLayout(q_blocks, TokenBlocks(tokens, k.shape[2], kv_listed))
    return block_pool_state(k, v, layout, channel_ids, backend=backend)


@block_pool_state_op.register_fake
def _(k, v, tokens, listed, channel_ids, backend):
    batch, heads, _, head_dim = k.shape
    rank = head_dim if channel_ids is None else channel_ids.shape[2]
    return (
        fake_sums(k, batch, heads, tokens.shape[0], head_dim),
        fake_sums(k, batch, heads, head_dim),
        fake_sums(k, batch, heads, rank, head_dim),
    )


def low_rank_state(
    k: Tensor, v: Tensor, feature_map: FeatureMap, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """k, v `(B, H, L, D)` -> mean(phi^T v) `(B, H, r, D)`, mean(phi) `(B, H, r)`."""
    check_backend(backend)
    check_heads(k=k, v=v)
    check_shape("v", v, k.shape)
    check_map(feature_map, k)
    if wants_gradients(k, v, feature_map):
        return pytorch.low_rank_state(k, v, feature_map)
    if is_compiling():
        return low_rank_state_op(k, v, feature_map.act, list(feature_map[1:]), backend)
    return dispatch.run("low_rank_state", backend, operands(k), k, v, feature_map)


@operation("low_rank_state")
def low_rank_state_op(
    k: Tensor, v: Tensor, act: str, feature_map: list[Tensor | None], backend: str
) -> tuple[Tensor, Tensor]:
    return low_rank_state(k, v, FeatureMap(act, *feature_map), backend=backend)


@low_rank_state_op.register_fake
def _(k, v, act, feature_map, backend):
    rank = FeatureMap(act, *feature_map).rank(k.shape[3])
    return fake_sums(k, *k.shape[:2], rank, k.shape[3]), fake_sums(k, *k.shape[:2], rank)
