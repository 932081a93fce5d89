"""Every operation on a device against its definition in float64 on the CPU; what is allocated holds NaN beforehand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from . import load_pack

ops, reference, parts = (load_pack(f".kernels.{name}") for name in ("ops", "reference", "background"))
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
TOKENS, BLOCK = 1000, 64


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory is filled with NaN, so that a row nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)        # what switches the filling on
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def errors(device: torch.device) -> dict[str, dict]:
    """"operation dtype width" -> relative error and its limit; where an operation failed, what it said.

    Float16 at one width only: every pair of dtype and width is compiled anew.
    """
    found = {}
    first = torch.float16 if device.type == "cuda" else torch.float32
    for dtype, width in ((torch.bfloat16, 128), (torch.bfloat16, 80), (first, 64)):
        name = f"{str(dtype).removeprefix('torch.')} {width}"
        try:
            with poisoned(), torch.inference_mode(False):
                for operation, error in _one(device, dtype, width).items():
                    found[f"{operation} {name}"] = {"error": error, "limit": LIMITS[dtype]}
        except Exception as failure:
            found[f"failed {name}"] = {"error": float("inf"), "limit": LIMITS[dtype], "said": str(failure)[:500]}
    return found


def _one(device: torch.device, dtype: torch.dtype, width: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(width)

    def random(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(of)

    q, k, v, d_out = (random(1, TOKENS, 2, width, of=dtype).transpose(1, 2) for _ in range(4))
    count = -(-TOKENS // BLOCK)
    blocks = torch.full((count, BLOCK), -1, dtype=torch.int32)
    blocks.view(-1)[:TOKENS] = torch.randperm(TOKENS, generator=generator)
    pooled = [reference.block_pool(x.double(), blocks).float() for x in (q, k, v)]
    sizes = reference.block_sizes(blocks)
    indices, counts, tail = reference.block_select(*pooled[:2], sizes, 4)
    angles = random(TOKENS, width // 2)
    places = torch.stack([torch.arange(TOKENS) % n for n in (3, 4, 5)], dim=1).int()
    fmap = parts.FeatureMap(
        "softmax", random(2, 24, width) / width**0.5, angles.cos(), angles.sin(), random(2, 9, 24), places
    )
    state = parts.LinearState(*reference.low_rank_state(k.float(), v.float(), fmap))
    _, mean, cov = reference.block_pool_state(k.float(), v.float(), blocks, count)
    gate = parts.Gate(random(1, 2), random(1, 2))
    first = parts.FirstOrder(mean, cov, random(1, 2, width) / width**0.5)
    low_rank = parts.LowRank(fmap, state, torch.tensor([0.5, 1.0]))
    plain = parts.FeatureMap("softmax")
    folded = parts.LinearState(*reference.low_rank_state(k.float(), v.float(), plain))
    sparse, bias, lse = (q, k, v, blocks, blocks, indices, counts), random(width), reference.dense_attention(
        *(x.double() for x in (q, k, v))
    )[1]
    calls = {
        "block_pool": ((q, blocks), 0), "block_pool_state": ((k, v, blocks, count), 2),
        "low_rank_state": ((k, v, fmap), 0), "block_select": ((*pooled[:2], sizes, 4), 2),
        "dense_attention": ((q, k, v), 0), "block_sparse_attention": (sparse, 0),
        "block_sparse_attention tail": ((*sparse, *(x.to(dtype) for x in pooled[1:])), 0),
        "block_sparse_mixed": ((*sparse, tail, gate, first), None),
        "block_sparse_mixed low rank": ((*sparse, tail, gate, first, low_rank), None),
        "block_sparse_linear": ((*sparse, plain, folded, bias), None),
        "block_mass": ((q, k, lse.float(), blocks, blocks, [4, 8]), 1),
        "lists_from_bits": ((torch.full((1, 2, count, 1), 0b1010101, dtype=torch.int32), count, 8), 0),
    }
    # By name on a GPU: a kernel that fails must show, not be stood in for.
    backend = "triton" if device.type == "cuda" else "pytorch"
    found = {}
    for name, (arguments, output) in calls.items():
        operation = name.split()[0]
        there = getattr(ops, operation)(*_to(arguments, device), backend=backend)
        exact = getattr(reference, operation)(*_to(arguments, torch.device("cpu"), torch.float64))
        there, exact = (x if output is None else x[output] for x in (there, exact))
        found[name] = _error(there, exact)
    leaves = [x.detach().to(device).requires_grad_() for x in (q, k, v)]
    out, _ = ops.block_sparse_attention(*leaves, *_to(sparse[3:], device), backend=backend)
    there = torch.autograd.grad(out, leaves, d_out.to(device))
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = torch.autograd.grad(
        reference.block_sparse_attention(*leaves, *sparse[3:])[0], leaves, d_out.double()
    )
    for name, a, b in zip(("dq", "dk", "dv"), there, exact):
        found[f"block_sparse_attention_backward {name}"] = _error(a, b)
    return found


def _to(values, device: torch.device, floats: torch.dtype | None = None):
    """Tensors in nested tuples moved to a device, floating-point ones to a dtype."""
    if isinstance(values, Tensor):
        return values.to(device, floats if floats and values.is_floating_point() else None)
    if isinstance(values, tuple):
        moved = [_to(x, device, floats) for x in values]
        return type(values)(*moved) if hasattr(values, "_fields") else tuple(moved)
    return values


def _error(found: Tensor, exact: Tensor) -> float:
    """Relative error; infinite where anything is NaN that should not be."""
    found, exact = found.detach().cpu().double(), exact.double()
    error = ((found - exact).norm() / exact.norm()).item()
    return error if error == error else float("inf")
