"""The backend a process of kernel tests tries: plain PyTorch, or interpreted Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from support.data.blocks import LIMITS
from support.data.fields import relative_error
from support.needs import INTERPRET

BACKEND = {"backend": "triton" if INTERPRET else "pytorch"}
HALF = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALF] + ([] if INTERPRET else [torch.float64])


def same(found: Tensor, expected: Tensor, dtype: torch.dtype, limit: float | None = None) -> None:
    """Finite, and within what a dtype's rounding explains."""
    assert torch.isfinite(found).all()
    assert relative_error(found, expected) < (limit or LIMITS[dtype])
