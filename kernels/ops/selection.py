"""Which key blocks each query block keeps: by scores of block means, or by exact mass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import dispatch, pytorch
from ..triton_support import Operands
from ..types import BlockLayout, BlockMask, Packing, RequiredBlocks, TokenBlocks, list_dtype
from .register import fake_numbers, fake_sums, operands, operation
from .validate import (
    check_attention,
    check_backend,
    check_blocks,
    check_heads,
    check_shape,
    softmax_scale,
    whole_number,
)


def block_select(
    pooled_q: Tensor,
    pooled_k: Tensor,
    layout: BlockLayout,
    topk: int | Sequence[int],
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[BlockMask, Tensor]:
    """Keep the `topk` best key blocks of each query block, and the layout's required ones.

    pooled_q `(B, H, Nq, D)`, pooled_k `(B, H, Nk, D)` -> the block mask, and dropped_lse
    `(B, H, Nq)`, the log of the dropped blocks' pooled mass. topk: at least 1; or a number for each
    of the B * H heads, 0 allowed, whose lists come packed where they differ. Which blocks are kept
    has no gradient.
    """
    check_backend(backend)
    check_heads(pooled_q=pooled_q, pooled_k=pooled_k)
    q_blocks, kv_blocks = layout.q_blocks, layout.kv_blocks
    check_shape("pooled_q", pooled_q, (*pooled_q.shape[:2], q_blocks.num_blocks, pooled_q.shape[3]))
    check_shape(
        "pooled_k", pooled_k, (*pooled_q.shape[:2], kv_blocks.num_blocks, pooled_q.shape[3])
    )
    scale = softmax_scale(pooled_q, scale)
    most, packing = kv_blocks.num_blocks, None
    if isinstance(topk, Sequence):
        if len(topk) != pooled_q.shape[0] * pooled_q.shape[1]:
            raise ValueError(
                f"topk must have a number for each of {pooled_q.shape[0]} x {pooled_q.shape[1]} "
                f"heads; found {len(topk)}"
            )
        topk = [min(whole_number("topk", each, 0), most) for each in topk]
        if len(set(topk)) == 1:
            topk = topk[0]
        else:
            packing = Packing.of(layout.widths(topk), q_blocks.num_blocks, pooled_q.device)
    else:
        topk = min(whole_number("topk", topk, 1), most)
    with torch.no_grad():
        pooled_q, pooled_k = pooled_q.detach(), pooled_k.detach()
        if is_compiling():
            counts = [topk] if isinstance(topk, int) else topk
            indices, kept, dropped_lse = block_select_op(
                pooled_q, pooled_k, *_pieces(layout), counts, layout.widths(counts), scale, backend
            )
        else:
            indices, kept, dropped_lse = _run_select(
                pooled_q, pooled_k, layout, topk, scale, backend
            )
    mask = BlockMask(q_blocks, kv_blocks, indices, kept, packing, trusted=True)
    return mask, dropped_lse


def dropped_mass(
    pooled_q: Tensor, pooled_k: Tensor, mask: BlockMask, *, scale: float | None = None
) -> Tensor:
    """The dropped_lse `(B, H, Nq)` of a mask, with gradients of the pooled q and k `(B, H, N, D)`.

    For who trains: `block_select` gives the same without. Plain PyTorch.
    """
    check_heads(pooled_q=pooled_q, pooled_k=pooled_k)
    for name, x, blocks in (("q", pooled_q, mask.q_blocks), ("k", pooled_k, mask.kv_blocks)):
        check_shape(
            f"pooled_{name}", x, (*pooled_q.shape[:2], blocks.num_blocks, pooled_q.shape[3])
        )
    return pytorch.dropped_mass(pooled_q, pooled_k, mask, softmax_scale(pooled_q, scale))


def _run_select(
    pooled_q: Tensor,
    pooled_k: Tensor,
    layout: BlockLayout,
    topk: int | Sequence[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    found = operands(pooled_q)
    return dispatch.run("block_select", backend, found, pooled_q, pooled_k, layout, topk, scale)


@operation("block_select")
def block_select_op(
    pooled_q: Tensor,
    pooled_k: Tensor,
    blocks: list[Tensor],
    listed: list[int],
    required: list[Tensor],
    topk: list[int],
    widths: list[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """topk, widths: one number, or one for each head."""
    layout = _layout_of(blocks, listed, required)
    counts = topk[0] if len(topk) == 1 else topk
    return _run_select(pooled_q, pooled_k, layout, counts, scale, backend)


@block_select_op.register_fake
def _(pooled_q, pooled_k, blocks, listed, required, topk, widths, *_):
    rows = pooled_q.shape[:3]
    shape = (*rows, widths[0]) if len(widths) == 1 else (rows[2] * sum(widths),)
    return (
        fake_numbers(pooled_q, *shape, dtype=list_dtype(pooled_k.shape[2])),
        fake_numbers(pooled_q, *rows),
        fake_sums(pooled_q, *rows),
    )


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    layout: BlockLayout,
    topks: Sequence[int],
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Exact search: the blocks of largest softmax mass of every row, for each topk.

    lse `(B, H, Lq)` of dense attention -> bits `(B, H, len(topks), Nq, words)` int32 (see
    `mask_from_bits`), and recall `(B, H, len(topks))`, the share of the mass that is kept.
    """
    check_backend(backend)
    check_attention(q, k, k)
    check_blocks("layout.q_blocks", layout.q_blocks, q)
    check_blocks("layout.kv_blocks", layout.kv_blocks, k)
    check_shape("lse", lse, q.shape[:3])
    most = layout.kv_blocks.num_blocks
    counts = [min(whole_number("topks", topk, 1), most) for topk in topks]
    scale = softmax_scale(q, scale)
    with torch.no_grad():
        q, k, lse = q.detach(), k.detach(), lse.detach()
        if is_compiling():
            return block_mass_op(q, k, lse, *_pieces(layout), counts, scale, backend)
        found = operands(q, layout.q_blocks, layout.kv_blocks)
        return dispatch.run("block_mass", backend, found, q, k, lse, layout, counts, scale)


@operation("block_mass")
def block_mass_op(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    blocks: list[Tensor],
    listed: list[int],
    required: list[Tensor],
    topks: list[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    layout = _layout_of(blocks, listed, required)
    return block_mass(q, k, lse, layout, topks, scale=scale, backend=backend)


@block_mass_op.register_fake
def _(q, k, lse, blocks, listed, required, topks, *_):
    q_tokens, kv_tokens = blocks
    words = (kv_tokens.shape[0] + 31) // 32
    rows = (*q.shape[:2], len(topks))
    return fake_numbers(q, *rows, q_tokens.shape[0], words), fake_sums(q, *rows)


def mask_from_bits(
    bits: Tensor, layout: BlockLayout, list_width: int, *, backend: str = "auto"
) -> BlockMask:
    """Bits `(B, H, Nq, words)` int32, bit j % 32 of word j / 32 for block j -> the block mask.

    list_width: at least the most blocks that a row keeps.
    """
    check_backend(backend)
    blocks = layout.kv_blocks.num_blocks
    words = -(-blocks // 32)
    if bits.dtype != torch.int32 or bits.shape[-1] != words:
        raise ValueError(
            f"bits must be int32 with {words} words a row; found {bits.dtype} {tuple(bits.shape)}"
        )
    list_width = whole_number("list_width", list_width, 1, blocks)
    if is_compiling():
        indices, kept = lists_from_bits_op(bits, blocks, list_width, backend)
    else:
        indices, kept = _run_bits(bits, blocks, list_width, backend)
    return BlockMask(layout.q_blocks, layout.kv_blocks, indices, kept, trusted=True)


def _run_bits(bits: Tensor, blocks: int, list_width: int, backend: str) -> tuple[Tensor, Tensor]:
    found = Operands(bits.device, bits.dtype, 0)
    return dispatch.run("lists_from_bits", backend, found, bits, blocks, list_width)


@operation("lists_from_bits")
def lists_from_bits_op(
    bits: Tensor, blocks: int, list_width: int, backend: str
) -> tuple[Tensor, Tensor]:
    return _run_bits(bits, blocks, list_width, backend)


@lists_from_bits_op.register_fake
def _(bits, blocks, list_width, backend):
    rows = bits.shape[:-1]
    return fake_numbers(bits, *rows, list_width, dtype=list_dtype(blocks)), fake_numbers(
        bits, *rows
    )


def _pieces(layout: BlockLayout) -> tuple[list[Tensor], list[int], list[Tensor]]:
    """A layout as a schema knows it; `_layout_of` puts it together again."""
    q_blocks, kv_blocks, required = layout.q_blocks, layout.kv_blocks, layout.required
    listed = [n for blocks in (q_blocks, kv_blocks) for n in (blocks.num_tokens, blocks.num_listed)]
    return [q_blocks.tokens, kv_blocks.tokens], listed, list(required or ())


def _layout_of(blocks: list[Tensor], listed: list[int], required: list[Tensor]) -> BlockLayout:
    q_tokens, kv_tokens = blocks
    return BlockLayout(
        TokenBlocks(q_tokens, *listed[:2]),
        TokenBlocks(kv_tokens, *listed[2:]),
        RequiredBlocks(*required) if required else None,
    )
