"""How operations become torch.library custom ops, and when those are used.

A custom op is opaque to torch.compile and carries gradients. Eager calls without gradients go
straight to the body that `dispatch` picks: nothing would be gained by the detour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..pytorch.common import acc_dtype
from ..triton_support import Operands
from ..types import BlockMask, EightBit, Packing, TokenBlocks


def _free_namespace() -> str:
    """A namespace that no other copy of the pack uses; PyTorch would free that copy's ops."""
    number = 1
    while hasattr(
        getattr(torch.ops, name := f"ropeslr_{number}" if number > 1 else "ropeslr"), "block_pool"
    ):
        number += 1
    return name


NAMESPACE = _free_namespace()


def operation(name: str) -> Callable[[Callable], Any]:
    """Decorator: a `CustomOpDef` of this copy's namespace that changes none of its arguments.

    An op's schema knows tensors, numbers and lists of them, so bundles travel in pieces.
    """
    return custom_op(f"{NAMESPACE}::{name}", mutates_args=())


def wants_gradients(*values: object) -> bool:
    """Whether gradients of any of these tensors are required, in whatever tuples they come."""
    return torch.is_grad_enabled() and _any_requires_grad(values)


def _any_requires_grad(values: Sequence[object]) -> bool:
    return any(
        value.requires_grad if isinstance(value, Tensor) else _any_requires_grad(value)
        for value in values
        if isinstance(value, (Tensor, tuple))
    )


def operands(x: Tensor, *blocks: TokenBlocks) -> Operands:
    """What `dispatch` looks at."""
    return Operands(x.device, x.dtype, x.shape[-1], tuple([each.block_size for each in blocks]))


def mask_operands(q: Tensor, mask: BlockMask) -> Operands:
    return operands(q, mask.q_blocks, mask.kv_blocks)


def mask_parts(mask: BlockMask) -> tuple[list[Tensor], int]:
    """A block mask as a schema knows it; `mask_of` puts it together again."""
    q_blocks, kv_blocks = mask.q_blocks, mask.kv_blocks
    tensors = [q_blocks.tokens, kv_blocks.tokens, mask.kv_indices, mask.kv_num_blocks]
    tensors += mask.packing or ()
    return tensors, kv_blocks.num_listed


def mask_of(tensors: Sequence[Tensor], kv_listed: int, q: Tensor, k: Tensor) -> BlockMask:
    q_tokens, kv_tokens, kv_indices, kv_num_blocks, *packing = tensors
    return BlockMask(
        TokenBlocks(q_tokens, q.shape[2], q.shape[2]),
        TokenBlocks(kv_tokens, k.shape[2], kv_listed),
        kv_indices,
        kv_num_blocks,
        Packing(*packing) if packing else None,
        trusted=True,
    )


def eight_bit_of(tensors: Sequence[Tensor]) -> EightBit | None:
    return EightBit(*tensors) if tensors else None


def write(found: Tensor, out: Tensor | None) -> Tensor:
    """A custom op's result where the caller wants it."""
    return found if out is None else out.copy_(found)


def fake_sums(x: Tensor, *shape: int) -> Tensor:
    """For fakes: a tensor in the dtype of sums."""
    return x.new_empty(shape, dtype=acc_dtype(x.dtype))


def fake_numbers(x: Tensor, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """For fakes: a tensor of whole numbers."""
    return x.new_empty(shape, dtype=dtype)
