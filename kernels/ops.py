"""One public function per operation: the arguments are checked here, before anything is launched.

Every function has the contract of the function of the same name in `reference`; the shapes are told there. backend is
"auto" (Triton where it can run, else plain PyTorch), "triton" (an error where it cannot) or "pytorch".
Errors are ValueErrors that name the argument, what was found and what was expected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch, pytorch, registered
from .background import ACTS, FeatureMap, FirstOrder, Gate, LinearState, LowRank, SiluMap
from .checks import (
    check_attention,
    check_backend,
    check_background,
    check_devices,
    check_heads,
    check_linear,
    check_lists,
    check_map,
    check_shape,
    check_silu_map,
    check_table,
    whole_number,
)
from .dispatch import TritonNotUsable

__all__ = [
    "TritonNotUsable", "add_rms_low_rank", "backend_for", "block_mass", "block_pool", "block_pool_state",
    "block_select", "block_sparse_attention", "block_sparse_linear", "block_sparse_mixed", "dense_attention",
    "feature_energy", "linear_read", "lists_from_bits", "low_rank_state", "marginal_linear", "mix_background",
    "rms_low_rank", "why_not",
]

MAX_HEAD_WIDTH = 512


def why_not(head_width: int, heads: int, kv_heads: int) -> str | None:
    """Why no backend can take such a call, in words; None where one can."""
    if head_width % 2 or head_width > MAX_HEAD_WIDTH:
        return f"head width {head_width} (an even width up to {MAX_HEAD_WIDTH} is needed)"
    if heads != kv_heads:
        return f"{heads} query heads on {kv_heads} key heads (equal numbers are needed)"
    return None


def backend_for(q: Tensor, backend: str, block: int) -> tuple[str, str | None]:
    """Which backend attends for q `(B, H, L, D)` in blocks of so many tokens: "triton", or "pytorch" and why."""
    return dispatch.choice(backend, q.device, q.dtype, q.shape[-1], (block,))


def block_pool(x: Tensor, blocks: Tensor, backend: str = "auto") -> Tensor:
    """x `(B, H, L, D)`, table `(N, S)` -> block means `(B, H, N, D)`, float32 or wider."""
    check_backend(backend)
    check_heads(x=x)
    check_table("blocks", blocks, x.shape[2])
    if _wants_gradients(x):
        return pytorch.block_pool(x, blocks)
    return registered.block_pool(x, blocks, backend)


def block_pool_state(
    k: Tensor, v: Tensor, blocks: Tensor, inner: int, features: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """-> block means of k `(B, H, N, D)`, mean value `(B, H, D)`, key-value covariance `(B, H, R, D)`, float32."""
    check_backend(backend)
    check_heads(k=k, v=v)
    check_shape("v", v, k.shape)
    check_table("blocks", blocks, k.shape[2])
    inner = whole_number("inner", inner, 1, blocks.shape[0])
    if _wants_gradients(k, v):
        return pytorch.block_pool_state(k, v, blocks, inner, features)
    return registered.block_pool_state(k, v, blocks, inner, features, backend)


def low_rank_state(k: Tensor, v: Tensor, map: FeatureMap, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """k, v `(B, H, L, D)` -> mean(phi^T v) `(B, H, r, D)`, mean(phi) `(B, H, r)`, float32 or wider."""
    check_backend(backend)
    check_heads(k=k, v=v)
    check_shape("v", v, k.shape)
    check_map(map, k)
    if _wants_gradients(k, v, *map[1:]):
        return pytorch.low_rank_state(k, v, map)
    return registered.low_rank_state(k, v, *map, backend)


def block_select(
    pooled_q: Tensor, pooled_k: Tensor, k_sizes: Tensor, keep: int, forced: Tensor | None = None,
    scale: float | None = None, most_forced: int | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """-> indices `(B, H, Nq, K)` int32 ascending, counts `(B, H, Nq)` int32, tail log-mass `(B, H, Nq)`.

    most_forced: forced blocks of the fullest row; callers who know it spare the host a question to the device.
    """
    check_backend(backend)
    check_heads(pooled_q=pooled_q, pooled_k=pooled_k)
    n_q, n_k = pooled_q.shape[2], pooled_k.shape[2]
    keep = min(whole_number("keep", keep, 1), n_k)
    check_shape("k_sizes", k_sizes, (n_k,))
    if forced is None:
        most_forced = 0
    else:
        check_shape("forced", forced, (n_q, n_k))
        most_forced = int(forced.sum(dim=-1).max()) if most_forced is None else most_forced
    with torch.no_grad():                   # which blocks are kept has no gradient
        scale = _scale(pooled_q, scale)
        return registered.block_select(
            pooled_q.detach(), pooled_k.detach(), k_sizes, keep, forced, scale, most_forced, backend
        )


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, q_blocks: Tensor, k_blocks: Tensor, keeps: Sequence[int],
    forced: Tensor | None = None, scale: float | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """-> bits `(B, H, len(keeps), Nq, words)` int32 of the blocks of largest mass, recall `(B, H, len(keeps))`."""
    check_backend(backend)
    check_attention(q, k, k)
    check_table("q_blocks", q_blocks, q.shape[2])
    check_table("k_blocks", k_blocks, k.shape[2])
    check_shape("lse", lse, q.shape[:3])
    keeps = [min(whole_number("keeps", keep, 1), k_blocks.shape[0]) for keep in keeps]
    if forced is not None:
        check_shape("forced", forced, (q_blocks.shape[0], k_blocks.shape[0]))
    with torch.no_grad():
        q, k, lse = (x.detach() for x in (q, k, lse))
        return registered.block_mass(q, k, lse, q_blocks, k_blocks, keeps, forced, _scale(q, scale), backend)


def lists_from_bits(bits: Tensor, blocks: int, longest: int, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """bits `(..., words)` int32 -> indices `(..., longest)` int32 ascending, counts `(...)` int32."""
    check_backend(backend)
    words = -(-blocks // 32)
    if bits.dtype != torch.int32 or bits.shape[-1] != words:
        raise ValueError(f"bits must be int32 with {words} words a row; found {bits.dtype} {tuple(bits.shape)}")
    return registered.lists_from_bits(bits, blocks, whole_number("longest", longest, 1, blocks), backend)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Exact attention of the given query rows: -> out `(B, H, Lq, D)`, LSE `(B, H, Lq)`."""
    check_backend(backend)
    check_attention(q, k, v)
    if _wants_gradients(q, k, v):
        return pytorch.dense_attention(q, k, v, _scale(q, scale))
    return registered.dense_attention(q, k, v, _scale(q, scale), backend)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, q_blocks: Tensor, k_blocks: Tensor, indices: Tensor, counts: Tensor,
    tail_k: Tensor | None = None, tail_v: Tensor | None = None, scale: float | None = None,
    backend: str = "auto", trusted: bool = False,
) -> tuple[Tensor, Tensor]:
    """-> out `(B, H, Lq, D)` in q's token order and dtype, LSE `(B, H, Lq)` in float32 or wider. Differentiable.

    trusted: the lists come from `block_select` or `lists_from_bits`; others are checked, for which a GPU has to wait.
    """
    check_backend(backend)
    _check_sparse(q, k, v, q_blocks, k_blocks, indices, counts, trusted)
    if (tail_k is None) != (tail_v is None):
        raise ValueError("tail_k and tail_v go together: give both for the pooled tail, or neither")
    if tail_k is not None:
        for name, x in (("tail_k", tail_k), ("tail_v", tail_v)):
            check_shape(name, x, (*q.shape[:2], k_blocks.shape[0], q.shape[3]))
    return registered.block_sparse_attention(
        q, k, v, q_blocks, k_blocks, indices, counts, tail_k, tail_v, _scale(q, scale), backend
    )


def block_sparse_mixed(
    q: Tensor, k: Tensor, v: Tensor, q_blocks: Tensor, k_blocks: Tensor, indices: Tensor, counts: Tensor, tail: Tensor,
    gate: Gate, first: FirstOrder, low_rank: LowRank | None = None, scale: float | None = None,
    backend: str = "auto", trusted: bool = False,
) -> Tensor:
    """Kept blocks and background in one: -> `(B, H, Lq, D)`. Where gradients are wanted, its parts one by one."""
    check_backend(backend)
    _check_sparse(q, k, v, q_blocks, k_blocks, indices, counts, trusted)
    check_background(q, q_blocks, tail, gate, first, low_rank)
    scale = _scale(q, scale)
    linear = (None, None, 0.0, None, ACTS[0], *(None,) * 5)
    if low_rank is not None:
        linear = (*low_rank.linear, low_rank.eta, *low_rank.map)
    if _wants_gradients(q, k, v, tail, *gate, *first, *linear):
        out, lse = registered.block_sparse_attention(
            q, k, v, q_blocks, k_blocks, indices, counts, None, None, scale, backend
        )
        return pytorch.mix_background(q, out, lse, tail, q_blocks, gate, first, low_rank)
    return registered.block_sparse_mixed(
        q, k, v, q_blocks, k_blocks, indices, counts, tail, *gate, *first, *linear, scale, backend
    )


def mix_background(
    q: Tensor, out: Tensor, lse: Tensor, tail: Tensor, q_blocks: Tensor, gate: Gate, first: FirstOrder,
    low_rank: LowRank | None = None,
) -> Tensor:
    """The mixing alone, for who has the sparse output at hand: -> `(B, H, Lq, D)`. Plain PyTorch everywhere."""
    check_heads(q=q, out=out)
    check_background(q, q_blocks, tail, gate, first, low_rank)
    return pytorch.mix_background(q, out, lse, tail, q_blocks, gate, first, low_rank)


def linear_read(q: Tensor, map: FeatureMap, linear: LinearState) -> Tensor:
    """What a linear branch alone reads: -> `(B, H, Lq, D)`, float32 or wider. Plain PyTorch everywhere."""
    check_heads(q=q)
    check_map(map, q)
    check_linear("linear", map, linear.state, linear.norm, q)
    return pytorch.linear_read(q, map, linear)


def add_rms_low_rank(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, gate: Tensor, q_map: SiluMap, k_map: SiluMap, eps: float
) -> Tensor:
    """Sparse output plus RoLA's branch, gate `(B, H, Lq)`: -> `(B, H, Lq, D)`. Plain PyTorch everywhere."""
    check_shape("out", out, q.shape)
    check_shape("gate", gate, q.shape[:3])
    _check_silu(q, k, v, q_map, k_map)
    return pytorch.add_rms_low_rank(q, k, v, out, gate, q_map, k_map, eps)


def rms_low_rank(q: Tensor, k: Tensor, v: Tensor, q_map: SiluMap, k_map: SiluMap, eps: float) -> Tensor:
    """RoLA's branch alone: -> `(B, H, Lq, D)`, float32 or wider. Plain PyTorch everywhere."""
    _check_silu(q, k, v, q_map, k_map)
    return pytorch.rms_low_rank(q, k, v, q_map, k_map, eps)


def feature_energy(q: Tensor, k: Tensor, v: Tensor, q_map: SiluMap, k_map: SiluMap) -> Tensor:
    """How much each feature of RoLA's branch adds, mean square over q's rows: -> `(B, H, r)`, float32 or wider."""
    check_silu_map("q_map", q_map, q)
    check_silu_map("k_map", k_map, k)
    return pytorch.feature_energy(q, k, v, q_map, k_map)


def marginal_linear(
    q: Tensor, k: Tensor, v: Tensor, q_blocks: Tensor, k_blocks: Tensor, marginal: Tensor, eps: float = 1e-5
) -> Tensor:
    """Linear attention over the blocks that marginal `(B, H, Nq, Nk)` marks: -> `(B, H, Lq, D)`, float32 or wider."""
    check_attention(q, k, v)
    check_table("q_blocks", q_blocks, q.shape[2])
    check_table("k_blocks", k_blocks, k.shape[2])
    check_shape("marginal", marginal, (*q.shape[:2], q_blocks.shape[0], k_blocks.shape[0]))
    return pytorch.marginal_linear(q, k, v, q_blocks, k_blocks, marginal, eps)


def block_sparse_linear(
    q: Tensor, k: Tensor, v: Tensor, q_blocks: Tensor, k_blocks: Tensor, indices: Tensor, counts: Tensor,
    map: FeatureMap, linear: LinearState, bias: Tensor, scale: float | None = None,
    backend: str = "auto", trusted: bool = False,
) -> Tensor:
    """Kept blocks plus a linear branch (SLA), bias `(D,)`: -> `(B, H, Lq, D)`."""
    check_backend(backend)
    _check_sparse(q, k, v, q_blocks, k_blocks, indices, counts, trusted)
    check_map(map, q)
    check_shape("bias", bias, q.shape[3:])
    check_linear("linear", map, linear.state, linear.norm, q)
    check_devices(q, map, linear, bias)
    if _wants_gradients(q, k, v, bias, linear.state, linear.norm, *map):
        out, _ = registered.block_sparse_attention(
            q, k, v, q_blocks, k_blocks, indices, counts, None, None, _scale(q, scale), backend
        )
        return pytorch.add_linear(q, out, map, linear, bias)
    return registered.block_sparse_linear(
        q, k, v, q_blocks, k_blocks, indices, counts, *linear, *map, bias, _scale(q, scale), backend
    )


def _check_sparse(q, k, v, q_blocks, k_blocks, indices, counts, trusted: bool) -> None:
    check_attention(q, k, v)
    check_devices(q, q_blocks, k_blocks, indices, counts)
    check_table("q_blocks", q_blocks, q.shape[2])
    check_table("k_blocks", k_blocks, k.shape[2])
    check_lists(indices, counts, (*q.shape[:2], q_blocks.shape[0]), k_blocks.shape[0], values=not trusted)


def _check_silu(q, k, v, q_map: SiluMap, k_map: SiluMap) -> None:
    check_attention(q, k, v)
    check_silu_map("q_map", q_map, q)
    check_silu_map("k_map", k_map, k)
    check_devices(q, q_map, k_map)


def _scale(q: Tensor, scale: float | None) -> float:
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not scale > 0:
        raise ValueError(f"scale must be a positive number, found {scale}")
    return scale


def _wants_gradients(*values: object) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in values)
