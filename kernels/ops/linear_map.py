"""A linear map of every head, added to what it maps."""

from __future__ import annotations

from torch import Tensor
from torch.compiler import is_compiling

from .. import dispatch
from .register import operands, wants_gradients, write
from .validate import check_backend, check_heads, check_out, check_shape


def add_mapped(
    x: Tensor, matrix: Tensor, *, backend: str = "auto", out: Tensor | None = None
) -> Tensor:
    """x + x matrix: x `(B, H, L, D)`, matrix `(B, H, D, D)`, rounded to x's dtype -> as x.

    out: where to write, x itself among others; without one, a new tensor.
    """
    check_backend(backend)
    check_heads(x=x)
    check_shape("matrix", matrix, (*x.shape[:2], x.shape[3], x.shape[3]))
    gradients = wants_gradients(x, matrix)
    check_out(out, x, gradients)
    if gradients or is_compiling():
        return write(x + x @ matrix.to(x.dtype), out)
    return dispatch.run("add_mapped", backend, operands(x), x, matrix, out)
