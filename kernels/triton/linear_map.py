"""A linear map of every head, added to what it maps: values before they are attended to."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from ..pytorch.common import empty_nhd
from .launch import aligned, kernel, launch_options, padded, strides
from .tiles import block_tokens, head_ptr, load_rows, store_rows

BLOCK = 64  # tokens at a time
TOKENS_PER_PROGRAM = 512  # that the matrix is loaded once for


def add_mapped(x: Tensor, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """See `reference.add_mapped`; out may be x."""
    batch, heads, tokens, head_dim = x.shape
    source = aligned(x)
    found = empty_nhd(x, tokens) if out is None or aligned(out) is not out else out
    _add_mapped[(-(-tokens // TOKENS_PER_PROGRAM), batch * heads)](
        source,
        found,
        matrix.to(x.dtype).contiguous(),
        *strides(source),
        *strides(found),
        heads,
        tokens,
        TOKENS_PER_PROGRAM // BLOCK,
        D=head_dim,
        DP=padded(head_dim),
        BLOCK=BLOCK,
        **launch_options("features"),
    )
    return found if out is None or out is found else out.copy_(found)


@kernel
def _add_mapped(
    x_ptr, out_ptr, matrix_ptr,
    x_batch, x_head, x_row, out_batch, out_head, out_row,
    heads, tokens, per_program,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = x + x matrix; matrix `(B*H, D, D)`."""
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    x_ptr = head_ptr(x_ptr, b, h, x_batch, x_head)
    out_ptr = head_ptr(out_ptr, b, h, out_batch, out_head)
    channels = tl.arange(0, DP)
    mask = (channels < D)[:, None] & (channels < D)[None, :]
    offsets = channels[:, None] * D + channels[None, :]
    matrix = tl.load(matrix_ptr + head * D * D + offsets, mask=mask, other=0.0)
    first = tl.program_id(0) * per_program
    for block in range(first, tl.minimum(first + per_program, tl.cdiv(tokens, BLOCK))):
        rows = block_tokens(None, block, tokens, BLOCK)
        x = load_rows(x_ptr, rows, x_row, D, DP)
        found = x.to(tl.float32) + tl.dot(x, matrix)
        store_rows(out_ptr, rows, out_row, found, D, DP)
