"""Dense and block-sparse attention; the sparse one has gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import dispatch, pytorch
from ..pytorch.common import empty_nhd
from ..types import BlockMask, EightBit, PooledKV, TokenBlocks
from .attention_backward import block_sparse_attention_backward_op
from .register import (
    eight_bit_of,
    fake_sums,
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
    check_blocks,
    check_eight_bit,
    check_mask,
    check_out,
    check_shape,
    softmax_scale,
)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_blocks: TokenBlocks | None = None,
    *,
    scale: float | None = None,
    backend: str = "auto",
    out: Tensor | None = None,
    eight_bit: EightBit | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact attention of the given queries: -> out `(B, H, Lq, D)`, LSE `(B, H, Lq)`.

    kv_blocks: only the keys in these blocks. out: where to write, where no gradients are required.
    eight_bit: k and v as `quantize_kv` makes them of kv_blocks, to be read instead.
    """
    check_backend(backend)
    check_attention(q, k, v)
    gradients = wants_gradients(q, k, v)
    check_out(out, q, gradients)
    scale = softmax_scale(q, scale)
    if kv_blocks is not None:
        check_blocks("kv_blocks", kv_blocks, k)
    check_eight_bit(eight_bit, kv_blocks, q)
    if gradients:
        return pytorch.dense_attention(q, k, v, kv_blocks, scale)
    if is_compiling():
        tokens = None if kv_blocks is None else kv_blocks.tokens
        listed = k.shape[2] if kv_blocks is None else kv_blocks.num_listed
        small = list(eight_bit or ())
        found, lse = dense_attention_op(q, k, v, tokens, listed, small, scale, backend)
        return write(found, out), lse
    return _run_dense(q, k, v, kv_blocks, scale, backend, out, eight_bit)


def _run_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_blocks: TokenBlocks | None,
    scale: float,
    backend: str,
    out: Tensor | None = None,
    eight_bit: EightBit | None = None,
) -> tuple[Tensor, Tensor]:
    found = operands(q) if kv_blocks is None else operands(q, kv_blocks)
    return dispatch.run(
        "dense_attention", backend, found, q, k, v, kv_blocks, scale, out, eight_bit
    )


@operation("dense_attention")
def dense_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tensor | None,
    kv_listed: int,
    eight_bit: list[Tensor],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kv_blocks = None if tokens is None else TokenBlocks(tokens, k.shape[2], kv_listed)
    small = eight_bit_of(eight_bit)
    return _run_dense(q, k, v, kv_blocks, scale, backend, eight_bit=small)


@dense_attention_op.register_fake
def _(q, *_):
    return empty_nhd(q, q.shape[2]), fake_sums(q, *q.shape[:3])


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    pooled: PooledKV | None = None,
    *,
    scale: float | None = None,
    backend: str = "auto",
    out: Tensor | None = None,
    eight_bit: EightBit | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the kept blocks: -> out `(B, H, Lq, D)` in q's dtype, LSE `(B, H, Lq)`.

    pooled: one pseudo-key for every dropped block. Differentiable in q, k, v and pooled.
    out: where to write, where no gradients are required. eight_bit: k and v as `quantize_kv` makes
    them of the mask's key blocks, to be read instead where no gradients are required.
    """
    check_backend(backend)
    check_attention(q, k, v)
    check_mask(mask, q, k)
    gradients = wants_gradients(q, k, v, pooled)
    check_out(out, q, gradients)
    scale = softmax_scale(q, scale)
    if pooled is not None:
        shape = (*q.shape[:2], mask.kv_blocks.num_blocks, q.shape[3])
        check_shape("pooled.k", pooled.k, shape)
        check_shape("pooled.v", pooled.v, shape)
    check_eight_bit(eight_bit, mask.kv_blocks, q)
    if gradients or is_compiling():
        small = [] if gradients else list(eight_bit or ())
        found, lse = block_sparse_attention_op(
            q, k, v, *mask_parts(mask), list(pooled or ()), small, scale, backend
        )
        return write(found, out), lse
    found, rest = mask_operands(q, mask), (mask, pooled, scale, out, eight_bit)
    return dispatch.run("block_sparse_attention", backend, found, q, k, v, *rest)


@operation("block_sparse_attention")
def block_sparse_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: list[Tensor],
    kv_listed: int,
    pooled: list[Tensor],
    eight_bit: list[Tensor],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    found = mask_of(mask, kv_listed, q, k)
    pooled_kv = PooledKV(*pooled) if pooled else None
    rest = (found, pooled_kv, scale, None, eight_bit_of(eight_bit))
    return dispatch.run("block_sparse_attention", backend, mask_operands(q, found), q, k, v, *rest)


@block_sparse_attention_op.register_fake
def _(q, *_):
    return empty_nhd(q, q.shape[2]), fake_sums(q, *q.shape[:3])


def _save(ctx, inputs, output) -> None:
    q, k, v, mask, ctx.kv_listed, pooled, eight_bit, ctx.scale, ctx.backend = inputs
    ctx.num_eight_bit = len(eight_bit)
    ctx.num_mask = len(mask)
    ctx.save_for_backward(q, k, v, *output, *mask, *pooled)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out: Tensor | None, d_lse: Tensor | None) -> tuple:
    everything = list(ctx.saved_tensors)  # read once: a checkpoint gives it out once
    saved, rest = everything[:5], everything[5:]
    mask, pooled = rest[: ctx.num_mask], rest[ctx.num_mask :]
    nothing, small = [None] * len(mask), [None] * ctx.num_eight_bit
    if d_out is None and d_lse is None:
        return None, None, None, nothing, None, [None] * len(pooled), small, None, None
    d_out = torch.zeros_like(saved[3]) if d_out is None else d_out
    d_q, d_k, d_v, *d_pooled = block_sparse_attention_backward_op(
        d_out, d_lse, saved, mask, ctx.kv_listed, pooled, ctx.scale, ctx.backend
    )
    d_pooled = [d.to(x.dtype) for d, x in zip(d_pooled, pooled)]
    return d_q, d_k, d_v, nothing, None, d_pooled, small, None, None


block_sparse_attention_op.register_autograd(_backward, setup_context=_save)
