"""Block-sparse attention with an epilogue: mixing with the background, or SLA's linear branch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pytorch.common import empty_nhd
from ..types import Background, BlockMask, EightBit, FirstOrder, LinearBranch, TokenBlocks
from .attention import Epilogue, Linear, Mixing, Tables, launch, normalised
from .launch import aligned, table


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
    epilogue = _epilogue(background, q.dtype)
    launch(q, k, v, Tables.of(mask), scale, out, epilogue=epilogue, eight_bit=eight_bit)
    return out


def mix_background(
    q: Tensor,
    sparse: Tensor,
    lse: Tensor,
    q_blocks: TokenBlocks,
    background: Background,
    out: Tensor | None = None,
) -> Tensor:
    """See `reference.mix_background`: the same epilogue, on attention that is there already.

    Written in place of `sparse` where nobody says where to.
    """
    found = sparse if aligned(sparse) is sparse else sparse.contiguous()
    tables = Tables(q_table=table(q_blocks), block_q=q_blocks.block_size)
    epilogue = _epilogue(background, q.dtype)
    done = found, lse.float().contiguous()
    launch(q, q, q, tables, 1.0, found, epilogue=epilogue, done=done)
    return found if out is None or out is found else out.copy_(found)


def _epilogue(background: Background, dtype: torch.dtype) -> Epilogue:
    gate, first, low_rank = background
    matrix, size = normalised(_whole_matrix(first).float(), dtype)
    mixing = Mixing(*gate, matrix, size, first.v_mean)
    if low_rank is None:
        return Epilogue("mixed", mixing)
    return Epilogue("low_rank", mixing, Linear(*low_rank))


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
