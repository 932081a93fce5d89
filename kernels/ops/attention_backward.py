"""Gradients of block-sparse attention as a custom op, so that torch.compile takes them whole."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..pytorch.common import empty_nhd
from ..types import Forward, PooledKV
from .register import fake_sums, mask_of, mask_operands, operation


@operation("block_sparse_attention_backward")
def block_sparse_attention_backward_op(
    d_out: Tensor,
    d_lse: Tensor | None,
    saved: list[Tensor],
    mask: list[Tensor],
    kv_listed: int,
    pooled: list[Tensor],
    scale: float,
    backend: str,
) -> list[Tensor]:
    """saved: q, k, v, out, lse -> gradients of q, k, v, and of the pooled keys and values."""
    q, k, v, out, lse = saved
    found = mask_of(mask, kv_listed, q, k)
    pooled_kv = PooledKV(*pooled) if pooled else None
    forward = Forward(q, k, v, out, lse, found, pooled_kv, scale)
    return list(
        dispatch.run(
            "block_sparse_attention_backward",
            backend,
            mask_operands(q, found),
            d_out,
            d_lse,
            forward,
        )
    )


@block_sparse_attention_backward_op.register_fake
def _(d_out, d_lse, saved, mask, kv_listed, pooled, *_):
    found = [empty_nhd(x, x.shape[2]) for x in saved[:3]]
    return found + [fake_sums(x, *x.shape) for x in pooled]
