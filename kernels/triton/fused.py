"""Block-sparse attention with an epilogue: mixing with the background, or SLA's linear branch."""

from __future__ import annotations

from torch import Tensor

from ..pytorch.common import empty_nhd
from ..types import Background, BlockMask, EightBit, FirstOrder, LinearBranch
from .attention import Epilogue, Linear, Mixing, Tables, launch, normalised


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
    """See `reference.block_sparse_mixed`: mixed before anything is written."""
    out = empty_nhd(q, q.shape[2]) if out is None else out
    gate, first, low_rank = background
    matrix, size = normalised(_whole_matrix(first).float(), q.dtype)
    mixing = Mixing(*gate, matrix, size, first.v_mean)
    if low_rank is None:
        epilogue = Epilogue("mixed", mixing)
    else:
        epilogue = Epilogue("low_rank", mixing, Linear(*low_rank))
    launch(q, k, v, Tables.of(mask), scale, out, epilogue=epilogue, eight_bit=eight_bit)
    return out


def _whole_matrix(first: FirstOrder) -> Tensor:
    """channel_scale * cov `(B, H, D, D)`; channels that are not used are rows of 0.

    A product of D x D costs no more than one key block.
    """
    matrix = first.cov * first.channel_scale[..., None]
    if first.channel_ids is None:
        return matrix
    head_dim = matrix.shape[-1]
    whole = matrix.new_zeros(*matrix.shape[:2], head_dim, head_dim)
    return whole.scatter_(2, first.channel_ids[..., None].expand_as(matrix), matrix)


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
    out = empty_nhd(q, q.shape[2]) if out is None else out
    linear = Linear(branch.feature_map, branch.state)
    epilogue = Epilogue("linear", linear=linear, bias=branch.bias)
    launch(q, k, v, Tables.of(mask), scale, out, epilogue=epilogue, eight_bit=eight_bit)
    return out
