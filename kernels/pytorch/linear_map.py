"""A linear map of every head, added to what it maps, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import acc_dtype, per_head


def add_mapped(x: Tensor, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """See `reference.add_mapped`; out may be x."""
    # Not in half precision: without a matrix unit a CPU multiplies that some 20 times slower.
    matrix = matrix.to(acc_dtype(x.dtype))

    def added(b: int, h: int) -> tuple[Tensor]:
        head = x[b, h].to(matrix.dtype)
        return (torch.addmm(head, head, matrix[b, h]).to(x.dtype),)

    return per_head(x, added, nhd_outputs=1, out=out)[0]
