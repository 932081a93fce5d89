"""Kept blocks and the background in one operation, so that neither goes through memory alone."""

from __future__ import annotations

from torch import Tensor
from torch.compiler import is_compiling

from .. import dispatch, pytorch
from ..pytorch.common import empty_nhd
from ..types import (
    Background,
    BlockMask,
    EightBit,
    FeatureMap,
    FirstOrder,
    Gate,
    LinearBranch,
    LinearState,
    LowRank,
    TokenBlocks,
)
from .attention import block_sparse_attention
from .register import (
    eight_bit_of,
    mask_of,
    mask_operands,
    mask_parts,
    operands,
    operation,
    wants_gradients,
    write,
)
from .validate import (
    check_attention,
    check_backend,
    check_background,
    check_blocks,
    check_devices,
    check_eight_bit,
    check_heads,
    check_map,
    check_mask,
    check_out,
    check_shape,
    check_state,
    softmax_scale,
)


def block_sparse_mixed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    background: Background,
    *,
    scale: float | None = None,
    backend: str = "auto",
    out: Tensor | None = None,
    eight_bit: EightBit | None = None,
) -> Tensor:
    """Kept blocks and background, mixed by their shares of the softmax mass: -> `(B, H, Lq, D)`.

    Where gradients are required, its parts one by one. out, eight_bit: as of
    `block_sparse_attention`.
    """
    check_backend(backend)
    check_attention(q, k, v)
    check_mask(mask, q, k)
    check_background(background, q, mask.q_blocks)
    gradients = wants_gradients(q, k, v, background)
    check_out(out, q, gradients)
    check_eight_bit(eight_bit, mask.kv_blocks, q)
    scale = softmax_scale(q, scale)
    if gradients:
        sparse, lse = block_sparse_attention(q, k, v, mask, scale=scale, backend=backend)
        return pytorch.mix_background(q, sparse, lse, mask.q_blocks, background)
    if is_compiling():
        pieces = (*mask_parts(mask), *_background_parts(background), list(eight_bit or ()))
        return write(block_sparse_mixed_op(q, k, v, *pieces, scale, backend), out)
    found, rest = mask_operands(q, mask), (mask, background, scale, out, eight_bit)
    return dispatch.run("block_sparse_mixed", backend, found, q, k, v, *rest)


@operation("block_sparse_mixed")
def block_sparse_mixed_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: list[Tensor],
    kv_listed: int,
    background: list[Tensor | None],
    low_rank: list[Tensor | None],
    eps: float,
    act: str,
    eight_bit: list[Tensor],
    scale: float,
    backend: str,
) -> Tensor:
    found = mask_of(mask, kv_listed, q, k)
    mixed = _background_of(background, low_rank, eps, act)
    rest = (found, mixed, scale, None, eight_bit_of(eight_bit))
    return dispatch.run("block_sparse_mixed", backend, mask_operands(q, found), q, k, v, *rest)


@block_sparse_mixed_op.register_fake
def _(q, *_):
    return empty_nhd(q, q.shape[2])


def _background_parts(
    background: Background,
) -> tuple[list[Tensor | None], list[Tensor | None], float, str]:
    """A background as a schema knows it; `_background_of` puts it together again."""
    gate, first, low_rank = background
    if low_rank is None:
        return [*gate, *first], [], 0.0, ""
    feature_map, state, scale = low_rank
    tensors = [*feature_map[1:], state.kv_state, state.normalizer, scale]
    return [*gate, *first], tensors, state.eps, feature_map.act


def _background_of(
    tensors: list[Tensor | None], low_rank: list[Tensor | None], eps: float, act: str
) -> Background:
    gate, first = Gate(*tensors[:4]), FirstOrder(*tensors[4:])  # type: ignore[arg-type]
    if not low_rank:
        return Background(gate, first)
    *feature_map, kv_state, normalizer, scale = low_rank
    state = LinearState(kv_state, normalizer, eps)  # type: ignore[arg-type]
    branch = LowRank(FeatureMap(act, *feature_map), state, scale)  # type: ignore[arg-type]
    return Background(gate, first, branch)


def mix_background(
    q: Tensor,
    sparse: Tensor,
    lse: Tensor,
    q_blocks: TokenBlocks,
    background: Background,
    *,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """The mixing alone, for who has the sparse output and needs it no more: -> `(B, H, Lq, D)`.

    A kernel mixes in place of `sparse`; what is compiled or needs gradients, plain PyTorch.
    """
    check_backend(backend)
    check_heads(q=q, sparse=sparse)
    check_blocks("q_blocks", q_blocks, q)
    check_background(background, q, q_blocks)
    gradients = wants_gradients(q, sparse, lse, background)
    check_out(out, q, gradients)
    if gradients or is_compiling():
        return pytorch.mix_background(q, sparse, lse, q_blocks, background, out)
    found, rest = operands(q, q_blocks), (sparse, lse, q_blocks, background, out)
    return dispatch.run("mix_background", backend, found, q, *rest)


def linear_read(q: Tensor, feature_map: FeatureMap, state: LinearState) -> Tensor:
    """What a linear branch alone reads: -> `(B, H, Lq, D)`, float32 or wider. Plain PyTorch."""
    check_heads(q=q)
    check_map(feature_map, q)
    check_state("state", feature_map, state, q)
    return pytorch.linear_read(q, feature_map, state)


def block_sparse_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    branch: LinearBranch,
    *,
    scale: float | None = None,
    backend: str = "auto",
    out: Tensor | None = None,
    eight_bit: EightBit | None = None,
) -> Tensor:
    """Kept blocks plus a linear branch (SLA): -> `(B, H, Lq, D)`.

    out: where to write; not allowed where gradients are required, which run the parts one by one.
    eight_bit: as of `block_sparse_attention`.
    """
    check_backend(backend)
    check_attention(q, k, v)
    check_mask(mask, q, k)
    check_map(branch.feature_map, q)
    check_shape("branch.bias", branch.bias, q.shape[3:])
    check_state("branch.state", branch.feature_map, branch.state, q)
    check_devices(q, branch)
    gradients = wants_gradients(q, k, v, branch)
    check_out(out, q, gradients)
    check_eight_bit(eight_bit, mask.kv_blocks, q)
    scale = softmax_scale(q, scale)
    if gradients:
        sparse, _ = block_sparse_attention(q, k, v, mask, scale=scale, backend=backend)
        return pytorch.add_linear(q, sparse, branch)
    if is_compiling():
        (act, *feature_map), state, bias = branch
        tensors = [*feature_map, state.kv_state, state.normalizer, bias]
        small = list(eight_bit or ())
        found = block_sparse_linear_op(
            q, k, v, *mask_parts(mask), tensors, state.eps, act, small, scale, backend
        )
        return write(found, out)
    found, rest = mask_operands(q, mask), (mask, branch, scale, out, eight_bit)
    return dispatch.run("block_sparse_linear", backend, found, q, k, v, *rest)


@operation("block_sparse_linear")
def block_sparse_linear_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: list[Tensor],
    kv_listed: int,
    branch: list[Tensor | None],
    eps: float,
    act: str,
    eight_bit: list[Tensor],
    scale: float,
    backend: str,
) -> Tensor:
    found = mask_of(mask, kv_listed, q, k)
    *feature_map, kv_state, normalizer, bias = branch
    state = LinearState(kv_state, normalizer, eps)  # type: ignore[arg-type]
    linear = LinearBranch(FeatureMap(act, *feature_map), state, bias)  # type: ignore[arg-type]
    rest = (found, linear, scale, None, eight_bit_of(eight_bit))
    return dispatch.run("block_sparse_linear", backend, mask_operands(q, found), q, k, v, *rest)


@block_sparse_linear_op.register_fake
def _(q, *_):
    return empty_nhd(q, q.shape[2])
