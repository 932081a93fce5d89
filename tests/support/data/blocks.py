"""Block tables, random tensors and block lists for tests of the operations."""

from __future__ import annotations

import torch
from torch import Tensor

from pack_loader import load

reference, background = load(".kernels.reference"), load(".kernels.background")
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


def sparse_case(tokens, dtype, width=64, batch=1, heads=2, scale=1.0, keep=None):
    """Arguments of the sparse operation, and the tail: lists of the definition over shuffled blocks."""
    q, k, v = tensors(*[(batch, heads, tokens, width)] * 3, dtype=dtype, scale=scale)
    blocks = table(tokens, shuffled=True)
    indices, counts, tail = selected(q, k, blocks, blocks, keep or max(1, blocks.shape[0] // 3))
    return (q, k, v, blocks, blocks, indices, counts), tail


def feature_map(act, heads, tokens, width, rank, dtype, full=True):
    """A feature map with everything that it may have; full=False: the projection alone."""
    a, pe = tensors((heads, rank, width), (heads, 9, rank), dtype=dtype, seed=5)
    angles = tensors((tokens, width // 2), dtype=dtype, seed=6)[0]
    number = torch.arange(tokens)
    places = torch.stack((number % 3, 3 + number % 4, 7 + number % 2), dim=1).int()
    extra = (angles.cos(), angles.sin(), 0.3 * pe, places) if full else (None,) * 4
    return background.FeatureMap(act, a / width**0.5, *extra)


def mixing_case(dtype, tokens=170, width=48, heads=2, scale=1.0, rank=None, low_rank=None, x=False, sharpness=1.0):
    """Arguments of the mixed operation; rank: channels of the first order; low_rank: the act of a branch."""
    case, tail = sparse_case(tokens, dtype, width, heads=heads, scale=scale, keep=1)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    c, b, beta = tensors((1, heads), (1, heads), (1, heads, width), dtype=sums, seed=7)
    tail, k, v = (x.to(sums) for x in (tail, *case[1:3]))
    if tail.shape[2] > 1:
        tail[0, 0, 1] = -torch.inf              # a row block that dropped nothing
    features = torch.stack([torch.randperm(width)[:rank] for _ in range(heads)])[None] if rank else None
    _, v_mean, cov = reference.block_pool_state(k, v, case[4], tail.shape[2], features)
    gate_x = tensors((1, heads, tokens), dtype=sums, seed=8)[0] if x else None
    first = background.FirstOrder(v_mean, cov, beta[..., :rank] / width**0.5, features)
    branch = None
    if low_rank:
        fmap = feature_map(low_rank, heads, tokens, width, 24, sums)
        fmap = fmap._replace(a=sharpness * fmap.a)
        state = background.LinearState(*reference.low_rank_state(k, v, fmap), 1e-5)
        branch = background.LowRank(fmap, state, torch.linspace(0.5, 1, heads, dtype=sums))
    return (*case, tail, background.Gate(c, b, gate_x), first, branch)
