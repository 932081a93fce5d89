"""Block tables, random tensors and block lists for tests of the operations."""

from __future__ import annotations

import torch
from pack_loader import load
from torch import Tensor

reference = load(".kernels.reference")
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def table(tokens: int, block: int = 64, shuffled: bool = False, seed: int = 0) -> Tensor:
    """A block table `(N, block)` int32 over `tokens` tokens in order, or in a random one."""
    order = torch.arange(tokens)
    if shuffled:
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    blocks = torch.full((-(-tokens // block), block), -1, dtype=torch.int32)
    blocks.view(-1)[:tokens] = order
    return blocks


def tensors(*shapes, dtype: torch.dtype = torch.float64, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    """Random normal tensors, the same for every dtype up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for shape in shapes]


def selected(q: Tensor, k: Tensor, q_blocks: Tensor, k_blocks: Tensor, keep: int, forced: Tensor | None = None):
    """Lists, counts and tail of the definition."""
    pooled_q, pooled_k = (reference.block_pool(x.double(), b) for x, b in ((q, q_blocks), (k, k_blocks)))
    return reference.block_select(pooled_q, pooled_k, reference.block_sizes(k_blocks), keep, forced)


def ragged(heads: int, n_q: int, n_k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Lists whose counts differ by row and head, from nothing to everything: indices, counts."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(1, heads, n_q, n_k, generator=generator) < torch.rand(1, heads, n_q, 1, generator=generator)
    kept[:, :, 0] = False
    kept[:, :, -1] = True
    column = torch.arange(n_k).expand_as(kept)
    return torch.where(kept, column, n_k).sort(dim=-1).values.int(), kept.sum(dim=-1).int()


def wide(values):
    """Floating-point tensors as float64, in whatever tuples they come; everything else as it is."""
    if isinstance(values, Tensor):
        return values.double() if values.is_floating_point() else values
    if hasattr(values, "_fields"):
        return type(values)(*map(wide, values))
    return [wide(x) for x in values] if isinstance(values, (list, tuple)) else values
