"""The operations as torch.library custom ops: opaque to torch.compile, with fake kernels and, where marked, gradients.

Arguments are flat, because an op's schema knows only tensors and numbers; `ops` is the face for people. Every op picks
its body when it runs, by the device of its tensors: see `dispatch`. Outputs `(B, H, L, D)` have the heads of a token
side by side, everything else is contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from . import dispatch
from .background import FeatureMap, FirstOrder, Gate, LinearState, LowRank
from .pytorch.heads import like_host, wide


def _free_namespace() -> str:
    """A second copy of the pack (in another folder, or loaded anew) must not take over the first one's ops: PyTorch
    would free those while they are in use."""
    number = 1
    while hasattr(getattr(torch.ops, name := f"ropeslr_{number}" if number > 1 else "ropeslr"), "block_pool"):
        number += 1
    return name


NAMESPACE = _free_namespace()


def _op(name: str):
    return custom_op(f"{NAMESPACE}::{name}", mutates_args=())


def _wide(x: Tensor, *shape) -> Tensor:
    return x.new_empty(shape, dtype=wide(x.dtype))


def _lists_like(x: Tensor, *shape) -> Tensor:
    return x.new_empty(shape, dtype=torch.int32)


def _run(name: str, backend: str, x: Tensor, tables: tuple[Tensor, ...], *arguments):
    sizes = tuple(table.shape[1] for table in tables)
    return dispatch.run(
        name, backend, x.device, x.dtype, x.shape[-1], sizes, lambda module: getattr(module, name)(*arguments)
    )


def _run_on(name: str, backend: str, device: torch.device, *arguments):
    """An operation that takes float32 or integers of any width, so that only the device may stand against Triton."""
    dtype = torch.float64 if arguments[0].dtype == torch.float64 else torch.float16
    return dispatch.run(name, backend, device, dtype, 64, (), lambda module: getattr(module, name)(*arguments))


@_op("block_pool")
def block_pool(x: Tensor, blocks: Tensor, backend: str) -> Tensor:
    """See `reference.block_pool`."""
    return _run("block_pool", backend, x, (blocks,), x, blocks)


@block_pool.register_fake
def _(x, blocks, backend):
    return _wide(x, *x.shape[:2], blocks.shape[0], x.shape[3])


@_op("block_pool_state")
def block_pool_state(
    k: Tensor, v: Tensor, blocks: Tensor, inner: int, features: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.block_pool_state`."""
    return _run("block_pool_state", backend, k, (blocks,), k, v, blocks, inner, features)


@block_pool_state.register_fake
def _(k, v, blocks, inner, features, backend):
    batch, heads, _, width = k.shape
    channels = width if features is None else features.shape[2]
    return (
        _wide(k, batch, heads, blocks.shape[0], width), _wide(k, batch, heads, width),
        _wide(k, batch, heads, channels, width),
    )


@_op("low_rank_state")
def low_rank_state(
    k: Tensor, v: Tensor, act: str, a: Tensor | None, cos: Tensor | None, sin: Tensor | None, pe: Tensor | None,
    places: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor]:
    """See `reference.low_rank_state`."""
    return _run("low_rank_state", backend, k, (), k, v, FeatureMap(act, a, cos, sin, pe, places))


@low_rank_state.register_fake
def _(k, v, act, a, cos, sin, pe, places, backend):
    rank = k.shape[3] if a is None else a.shape[1]
    return _wide(k, *k.shape[:2], rank, k.shape[3]), _wide(k, *k.shape[:2], rank)


@_op("block_select")
def block_select(
    pooled_q: Tensor, pooled_k: Tensor, k_sizes: Tensor, keep: int, forced: Tensor | None, scale: float,
    most_forced: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.block_select`."""
    return _run_on(
        "block_select", backend, pooled_q.device, pooled_q, pooled_k, k_sizes, keep, forced, scale, most_forced
    )


@block_select.register_fake
def _(pooled_q, pooled_k, k_sizes, keep, forced, scale, most_forced, backend):
    rows = pooled_q.shape[:3]
    longest = min(pooled_k.shape[2], keep + most_forced)
    return _lists_like(pooled_q, *rows, longest), _lists_like(pooled_q, *rows), _wide(pooled_q, *rows)


@_op("block_mass")
def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, q_blocks: Tensor, k_blocks: Tensor, keeps: Sequence[int],
    forced: Tensor | None, scale: float, backend: str,
) -> tuple[Tensor, Tensor]:
    """See `reference.block_mass`."""
    return _run(
        "block_mass", backend, q, (q_blocks, k_blocks), q, k, lse, q_blocks, k_blocks, list(keeps), forced, scale
    )


@block_mass.register_fake
def _(q, k, lse, q_blocks, k_blocks, keeps, forced, scale, backend):
    words = (k_blocks.shape[0] + 31) // 32
    rows = (*q.shape[:2], len(keeps))
    return _lists_like(q, *rows, q_blocks.shape[0], words), _wide(q, *rows)


@_op("lists_from_bits")
def lists_from_bits(bits: Tensor, blocks: int, longest: int, backend: str) -> tuple[Tensor, Tensor]:
    """See `reference.lists_from_bits`."""
    return _run_on("lists_from_bits", backend, bits.device, bits, blocks, longest)


@lists_from_bits.register_fake
def _(bits, blocks, longest, backend):
    return _lists_like(bits, *bits.shape[:-1], longest), _lists_like(bits, *bits.shape[:-1])


@_op("dense_attention")
def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """See `reference.dense_attention`."""
    return _run("dense_attention", backend, q, (), q, k, v, scale)


@dense_attention.register_fake
def _(q, k, v, scale, backend):
    return like_host(q, q.shape[2]), _wide(q, *q.shape[:3])


@_op("block_sparse_attention")
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, q_blocks: Tensor, k_blocks: Tensor, indices: Tensor, counts: Tensor,
    tail_k: Tensor | None, tail_v: Tensor | None, scale: float, backend: str,
) -> tuple[Tensor, Tensor]:
    """See `reference.block_sparse_attention`."""
    return _run(
        "block_sparse_attention", backend, q, (q_blocks, k_blocks),
        q, k, v, q_blocks, k_blocks, indices, counts, tail_k, tail_v, scale,
    )


@block_sparse_attention.register_fake
def _(q, k, v, q_blocks, k_blocks, indices, counts, tail_k, tail_v, scale, backend):
    return like_host(q, q.shape[2]), _wide(q, *q.shape[:3])


@_op("block_sparse_attention_backward")
def block_sparse_attention_backward(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    q_blocks: Tensor, k_blocks: Tensor, indices: Tensor, counts: Tensor, tail_k: Tensor | None,
    tail_v: Tensor | None, scale: float, backend: str,
) -> list[Tensor]:
    """Gradients of q, k, v, and with a tail of tail_k and tail_v."""
    return list(_run(
        "block_sparse_attention_backward", backend, q, (q_blocks, k_blocks), d_out, d_lse, q, k, v, out, lse,
        q_blocks, k_blocks, indices, counts, tail_k, tail_v, scale,
    ))


@block_sparse_attention_backward.register_fake
def _(d_out, d_lse, q, k, v, out, lse, q_blocks, k_blocks, indices, counts, tail_k, tail_v, scale, backend):
    tail = [] if tail_k is None else [_wide(x, *x.shape) for x in (tail_k, tail_v)]
    return [like_host(x, x.shape[2]) for x in (q, k, v)] + tail


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out, d_lse):
    q, k, v, q_blocks, k_blocks, indices, counts, tail_k, tail_v, out, lse = ctx.saved_tensors
    if d_out is None and d_lse is None:
        return (None,) * 11
    d_out = torch.zeros_like(out) if d_out is None else d_out
    d_q, d_k, d_v, *d_tail = block_sparse_attention_backward(
        d_out, d_lse, q, k, v, out, lse, q_blocks, k_blocks, indices, counts, tail_k, tail_v, ctx.scale, ctx.backend
    )
    d_tail = [d.to(x.dtype) for d, x in zip(d_tail, (tail_k, tail_v))] or [None, None]
    return d_q, d_k, d_v, None, None, None, None, *d_tail, None, None


block_sparse_attention.register_autograd(_backward, setup_context=_save)


@_op("block_sparse_mixed")
def block_sparse_mixed(
    q: Tensor, k: Tensor, v: Tensor, q_blocks: Tensor, k_blocks: Tensor, indices: Tensor, counts: Tensor,
    tail: Tensor, gate_c: Tensor, gate_b: Tensor, gate_x: Tensor | None,
    v_mean: Tensor, cov: Tensor, beta: Tensor, features: Tensor | None,
    state: Tensor | None, norm: Tensor | None, eps: float, eta: Tensor | None, act: str, a: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, pe: Tensor | None, places: Tensor | None, scale: float, backend: str,
) -> Tensor:
    """See `reference.block_sparse_mixed`."""
    low_rank = None
    if state is not None:
        low_rank = LowRank(FeatureMap(act, a, cos, sin, pe, places), LinearState(state, norm, eps), eta)
    return _run(
        "block_sparse_mixed", backend, q, (q_blocks, k_blocks), q, k, v, q_blocks, k_blocks, indices, counts, tail,
        Gate(gate_c, gate_b, gate_x), FirstOrder(v_mean, cov, beta, features), low_rank, scale,
    )


@block_sparse_mixed.register_fake
def _(q, *_):
    return like_host(q, q.shape[2])


@_op("block_sparse_linear")
def block_sparse_linear(
    q: Tensor, k: Tensor, v: Tensor, q_blocks: Tensor, k_blocks: Tensor, indices: Tensor, counts: Tensor,
    state: Tensor, norm: Tensor, eps: float, act: str, a: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    pe: Tensor | None, places: Tensor | None, bias: Tensor, scale: float, backend: str,
) -> Tensor:
    """See `reference.block_sparse_linear`."""
    return _run(
        "block_sparse_linear", backend, q, (q_blocks, k_blocks), q, k, v, q_blocks, k_blocks, indices, counts,
        FeatureMap(act, a, cos, sin, pe, places), LinearState(state, norm, eps), bias, scale,
    )


@block_sparse_linear.register_fake
def _(q, *_):
    return like_host(q, q.shape[2])

