"""Branches added to the sparse output: RoLA's; SLA's paper form and VSA's, in PyTorch only."""

from __future__ import annotations

from torch import Tensor
from torch.compiler import is_compiling

from .. import dispatch, pytorch
from ..types import BlockLayout, RmsLowRank, TokenBlocks
from .register import operands, wants_gradients
from .validate import (
    check_attention,
    check_backend,
    check_blocks,
    check_out,
    check_rms_low_rank,
    check_shape,
    softmax_scale,
)


def add_rms_low_rank(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sparse: Tensor,
    gate: Tensor,
    branch: RmsLowRank,
    *,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """Sparse output plus RoLA's branch, gate `(B, H, Lq)`: -> `(B, H, Lq, D)`.

    For who needs the sparse output no more: a kernel adds in its place.
    """
    check_backend(backend)
    check_shape("sparse", sparse, q.shape)
    check_shape("gate", gate, q.shape[:3])
    check_attention(q, k, v)
    check_rms_low_rank(branch, q, k)
    gradients = wants_gradients(q, k, v, sparse, gate, branch)
    check_out(out, q, gradients)
    if gradients or is_compiling():
        return pytorch.add_rms_low_rank(q, k, v, sparse, gate, branch, out)
    rest = k, v, sparse, gate, branch, out
    return dispatch.run("add_rms_low_rank", backend, operands(q), q, *rest)


def rms_low_rank(q: Tensor, k: Tensor, v: Tensor, branch: RmsLowRank) -> Tensor:
    """RoLA's branch alone: -> `(B, H, Lq, D)`, float32 or wider."""
    check_attention(q, k, v)
    check_rms_low_rank(branch, q, k)
    return pytorch.rms_low_rank(q, k, v, branch)


def feature_energy(q: Tensor, k: Tensor, v: Tensor, branch: RmsLowRank) -> Tensor:
    """How much each feature of RoLA's branch adds, mean square over q's rows: -> `(B, H, r)`."""
    check_rms_low_rank(branch, q, k)
    return pytorch.feature_energy(q, k, v, branch)


def add_coarse(
    out: Tensor,
    gate: Tensor,
    pooled: tuple[Tensor, Tensor, Tensor],
    blocks: TokenBlocks,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention between the means of blocks, added by a gate: -> `(B, H, L, D)`.

    out, gate `(B, H, L, D)`; pooled q, k, v `(B, H, N, D)`. out is overwritten where no gradients
    are required.
    """
    check_shape("gate", gate, out.shape)
    check_blocks("blocks", blocks, out)
    for name, each in zip(("q", "k", "v"), pooled):
        check_shape(f"pooled {name}", each, (*out.shape[:2], blocks.num_blocks, out.shape[3]))
    return pytorch.add_coarse(out, gate, pooled, blocks, softmax_scale(out, scale))


def marginal_linear(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, marginal: Tensor, *, eps: float = 1e-5
) -> Tensor:
    """Linear attention over the blocks that marginal `(B, H, Nq, Nk)` marks: -> `(B, H, Lq, D)`."""
    check_attention(q, k, v)
    check_blocks("layout.q_blocks", layout.q_blocks, q)
    check_blocks("layout.kv_blocks", layout.kv_blocks, k)
    shape = (*q.shape[:2], layout.q_blocks.num_blocks, layout.kv_blocks.num_blocks)
    check_shape("marginal", marginal, shape)
    return pytorch.marginal_linear(q, k, v, layout, marginal, eps)
