"""A linear map of every head, added to what it maps, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from .common import per_head


def add_mapped(x: Tensor, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """See `reference.add_mapped`; out may be x."""
    matrix = matrix.to(x.dtype)
    return per_head(x, lambda b, h: (x[b, h] + x[b, h] @ matrix[b, h],), nhd_outputs=1, out=out)[0]
