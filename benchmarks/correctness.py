"""Every operation on a device against its definition in float64 on the CPU.

What is allocated holds NaN beforehand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from . import load_pack

ops, reference, types = (load_pack(f".kernels.{name}") for name in ("ops", "reference", "types"))
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EIGHT_BIT_LIMIT = 6e-2
TOKENS, BLOCK, FINE_BLOCK = 1000, 64, 16


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory is filled with NaN, so that a row nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # what switches the filling on
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def kinds(device: torch.device) -> dict[str, tuple[torch.dtype, int, int]]:
    """Groups of comparisons by name: dtype, head_dim, tokens of a key block.

    float16 at one head_dim only: every pair of dtype and width is compiled anew.
    """
    first = torch.float16 if device.type == "cuda" else torch.float32
    found = {}
    for dtype, width, key_block in (
        (torch.bfloat16, 128, BLOCK),
        (torch.bfloat16, 128, FINE_BLOCK),
        (torch.bfloat16, 80, BLOCK),
        (first, 64, BLOCK),
    ):
        name = f"{str(dtype).removeprefix('torch.')} {width}"
        name += f", key blocks of {key_block}" if key_block != BLOCK else ""
        found[name] = dtype, width, key_block
    return found


def errors(device: torch.device, name: str) -> dict[str, dict]:
    """One of `kinds`: "operation kind" -> relative error and limit, or error text."""
    dtype, width, key_block = kinds(device)[name]
    found = {}
    with poisoned(), torch.inference_mode(False):
        for operation, compare in _comparisons(device, dtype, width, key_block).items():
            limit = EIGHT_BIT_LIMIT if "8-bit" in operation else LIMITS[dtype]
            row: dict = {"error": float("inf"), "limit": limit}
            try:  # one that fails says nothing about the next
                row["error"] = compare()
            except Exception as failure:
                row["error_text"] = f"{type(failure).__name__}: {str(failure)[:500]}"
            found[f"{operation} {name}"] = row
    return found


def _comparisons(
    device: torch.device, dtype: torch.dtype, width: int, key_block: int
) -> dict[str, Callable[[], float]]:
    """Operation -> a call that gives its error."""
    generator = torch.Generator().manual_seed(width)

    def random(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(of)

    q, k, v, d_out = (random(1, TOKENS, 2, width, of=dtype).transpose(1, 2) for _ in range(4))
    order = torch.randperm(TOKENS, generator=generator)
    blocks, keys = (types.TokenBlocks.cut(order, size) for size in (BLOCK, key_block))
    layout, topk = types.BlockLayout(blocks, keys), 4 * BLOCK // key_block - 1
    pooled_q, pooled_k, pooled_v = (
        reference.block_pool(x.double(), own).float()
        for x, own in ((q, blocks), (k, keys), (v, keys))
    )
    mask, dropped_lse = reference.block_select(pooled_q, pooled_k, layout, topk)
    far = types.PooledKV(pooled_k.to(dtype), pooled_v.to(dtype))
    angles = random(TOKENS, width // 2)
    axis_ids = torch.stack([torch.arange(TOKENS) % n for n in (3, 4, 5)], dim=1).int()
    fmap = types.FeatureMap(
        "softmax",
        random(2, 24, width) / width**0.5,
        angles.cos(),
        angles.sin(),
        random(2, 9, 24),
        axis_ids,
    )
    state = types.LinearState(*reference.low_rank_state(k.float(), v.float(), fmap))
    _, mean, cov = reference.block_pool_state(k.float(), v.float(), layout)
    gate = types.Gate(dropped_lse, random(1, 2), random(1, 2))
    first = types.FirstOrder(mean, cov, random(1, 2, width) / width**0.5)
    low_rank = types.LowRank(fmap, state, torch.tensor([0.5, 1.0]))
    plain = types.FeatureMap("softmax")
    folded = types.LinearState(*reference.low_rank_state(k.float(), v.float(), plain))
    branch = types.LinearBranch(plain, folded, random(width))
    sparse, lse = (q, k, v, mask), reference.dense_attention(*(x.double() for x in (q, k, v)))[1]
    some = types.TokenBlocks.cut(torch.arange(900), key_block, num_tokens=TOKENS)
    far_more = [random(1, 5 * TOKENS, 2, width, of=dtype).transpose(1, 2) for _ in range(2)]
    words = -(-keys.num_blocks // 32)
    bits = torch.full((1, 2, blocks.num_blocks, words), 0b1010101, dtype=torch.int32)
    calls = {
        "block_pool": ((q, blocks), 0),
        "block_pool_state": ((k, v, layout), 2),
        "low_rank_state": ((k, v, fmap), 0),
        "block_select": ((pooled_q, pooled_k, layout, topk), 1),
        "dense_attention": ((q, k, v), 0),
        "dense_attention some keys": ((q, k, v, some), 0),
        "dense_attention few queries": ((q[:, :, :100], *far_more), 0),
        "block_sparse_attention": (sparse, 0),
        "block_sparse_attention pooled": ((*sparse, far), 0),
        "block_sparse_mixed": ((*sparse, types.Background(gate, first)), None),
        "block_sparse_mixed low rank": ((*sparse, types.Background(gate, first, low_rank)), None),
        "block_sparse_linear": ((*sparse, branch), None),
        "block_mass": ((q, k, lse.float(), layout, [4, 8]), 1),
        "mask_from_bits": ((bits, layout, 4 * words), "kv_indices"),
    }
    # By name on a GPU: a kernel that fails must show, not be stood in for.
    backend = "triton" if device.type == "cuda" else "pytorch"

    def compared(name: str) -> float:
        arguments, output = calls[name]
        operation = name.split()[0]
        there = getattr(ops, operation)(*_to(arguments, device), backend=backend)
        exact = getattr(reference, operation)(*_to(arguments, torch.device("cpu"), torch.float64))
        return _error(*(_output(x, output) for x in (there, exact)))

    def eight_bit() -> float:
        means = k.float().mean(dim=2), v.float().mean(dim=2)
        own = _to((k, v, keys, *means), device)
        small = ops.quantize_kv(*own, backend=backend)
        there, _ = ops.block_sparse_attention(
            *_to(sparse, device), eight_bit=small, backend=backend
        )
        exact = reference.block_sparse_attention(*_to(sparse, torch.device("cpu"), torch.float64))
        return _error(there, exact[0])

    def gradient(number: int) -> float:
        leaves = [x.detach().to(device).requires_grad_() for x in (q, k, v)]
        out, _ = ops.block_sparse_attention(*leaves, *_to(sparse[3:], device), backend=backend)
        there = torch.autograd.grad(out, leaves, d_out.to(device))
        leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
        out, _ = reference.block_sparse_attention(*leaves, *sparse[3:])
        exact = torch.autograd.grad(out, leaves, d_out.double())
        return _error(there[number], exact[number])

    found: dict[str, Callable[[], float]] = {name: partial(compared, name) for name in calls}
    found["block_sparse_attention 8-bit"] = eight_bit
    for number, name in enumerate(("dq", "dk", "dv")):
        found[f"block_sparse_attention_backward {name}"] = partial(gradient, number)
    return found


def _output(found, which: int | str | None) -> Tensor:
    """One tensor of what an operation gives: all, one of several, or a mask's field."""
    if which is None:
        return found
    return getattr(found, which) if isinstance(which, str) else found[which]


def _to(values, device: torch.device, floats: torch.dtype | None = None):
    """Tensors and blocks in nested tuples moved to a device, floating-point ones to a dtype."""
    if isinstance(values, Tensor):
        return values.to(device, floats if floats and values.is_floating_point() else None)
    if isinstance(values, types.TokenBlocks):
        return values.to(device)
    if isinstance(values, types.BlockLayout):
        return types.BlockLayout(values.q_blocks.to(device), values.kv_blocks.to(device))
    if isinstance(values, types.BlockMask):
        lists = (x.to(device) for x in (values.kv_indices, values.kv_num_blocks))
        return types.BlockMask(values.q_blocks.to(device), values.kv_blocks.to(device), *lists)
    if isinstance(values, tuple):
        moved = [_to(x, device, floats) for x in values]
        return type(values)(*moved) if hasattr(values, "_fields") else tuple(moved)
    return values


def _error(found: Tensor, exact: Tensor) -> float:
    """Relative error; infinite where anything is NaN that should not be."""
    found, exact = found.detach().cpu().double(), exact.double()
    error = ((found - exact).norm() / exact.norm()).item()
    return error if error == error else float("inf")
