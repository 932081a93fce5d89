"""Keys and values in 8 bits, made in one pass; attention takes them as `eight_bit`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import dispatch
from ..types import GAINS, EightBit, TokenBlocks
from .register import operands, operation
from .validate import check_backend, check_blocks, check_heads, check_shape


def quantize_kv(
    k: Tensor,
    v: Tensor,
    blocks: TokenBlocks,
    k_mean: Tensor,
    v_mean: Tensor,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> EightBit:
    """k, v `(B, H, L, D)` rounded to 8 bits and put in block order.

    k_mean and v_mean `(B, H, D)` are taken off: any vectors leave attention as it is, the means
    lose least. dtype: of the values, int8 or float8_e4m3fn; None: what the device multiplies best.
    No gradients.
    """
    check_backend(backend)
    check_heads(k=k, v=v)
    check_shape("v", v, k.shape)
    for name, mean in (("k_mean", k_mean), ("v_mean", v_mean)):
        check_shape(name, mean, (*k.shape[:2], k.shape[3]))
    check_blocks("blocks", blocks, k)
    if blocks.block_size % 16:
        raise ValueError(f"blocks must hold a multiple of 16 tokens; found {blocks.block_size}")
    dtype = values_dtype(k.device) if dtype is None else dtype
    if dtype not in GAINS:
        raise ValueError(f"dtype must be one of {', '.join(map(str, GAINS))}; found {dtype}")
    with torch.no_grad():
        k, v, k_mean, v_mean = (x.detach() for x in (k, v, k_mean, v_mean))
        if is_compiling():
            pieces = blocks.tokens, blocks.num_listed
            keys, k_scale, values, v_scale = quantize_kv_op(
                k, v, *pieces, k_mean, v_mean, dtype, backend
            )
            return EightBit(keys, k_scale, k_mean.float(), values, v_scale, v_mean.float())
        return _run(k, v, blocks, k_mean, v_mean, dtype, backend)


def values_dtype(device: torch.device) -> torch.dtype:
    """FP8 where tensor cores multiply it with float32 sums (NVIDIA sm_89, 90, 120), else INT8."""
    if device.type != "cuda" or torch.version.hip:
        return torch.int8
    fp8 = torch.cuda.get_device_capability(device) in ((8, 9), (9, 0), (12, 0), (12, 1))
    return torch.float8_e4m3fn if fp8 else torch.int8


def _run(
    k: Tensor,
    v: Tensor,
    blocks: TokenBlocks,
    k_mean: Tensor,
    v_mean: Tensor,
    dtype: torch.dtype,
    backend: str,
) -> EightBit:
    found, rest = operands(k, blocks), (blocks, k_mean, v_mean, dtype)
    return dispatch.run("quantize_kv", backend, found, k, v, *rest)


@operation("quantize_kv")
def quantize_kv_op(
    k: Tensor,
    v: Tensor,
    tokens: Tensor,
    num_listed: int,
    k_mean: Tensor,
    v_mean: Tensor,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    blocks = TokenBlocks(tokens, k.shape[2], num_listed)
    keys, k_scale, _, values, v_scale, _ = _run(k, v, blocks, k_mean, v_mean, dtype, backend)
    return keys, k_scale, values, v_scale


@quantize_kv_op.register_fake
def _(k, v, tokens, num_listed, k_mean, v_mean, dtype, backend):
    (batch, heads, _, head_dim), (blocks, size) = k.shape, tokens.shape
    sums = dict(dtype=torch.float32)
    return (
        k.new_empty(batch, heads, blocks, size, head_dim, dtype=torch.int8),
        k.new_empty(batch, heads, blocks, **sums),
        k.new_empty(batch, heads, blocks, head_dim, size, dtype=dtype),
        k.new_empty(batch, heads, head_dim, **sums),
    )
