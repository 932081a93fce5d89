"""Triton's CPU interpreter made fit for tests: right in bfloat16, and strict about memory.

The stock interpreter (3.4 to 3.9) computes on the raw bits of bfloat16, truncates where a GPU
rounds, and with recent NumPy cannot loop up to a loaded bound (up to 3.6). `repair` mends that.
`watch` makes it refuse what a GPU would silently do: lanes outside of every tensor of the launch,
two programs that store to one address, a program that loads what another stored, integer overflow,
a failed device_assert.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

Handle, Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
FLOATS = (tl.bfloat16, tl.float16, tl.float32, tl.float64)
COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


LARGE = 1 << 28  # elements: of a larger tensor only the bounds are watched


class MemoryFault(Exception):
    """A kernel touched memory that it must not touch."""


def repair() -> None:
    """Mend bfloat16 and loop bounds; once is enough."""
    if getattr(Builder, "repaired", False):
        return
    Builder.repaired = True
    _repair_bounds()
    _repair_casts()
    _repair_arithmetic()


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _round(values: np.ndarray) -> np.ndarray:
    """float32 -> bf16 bits, to nearest even, NaN kept."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _to_fp8(values: np.ndarray) -> np.ndarray:
    """float32 -> e4m3 bits, to nearest even; stock rounds ties up, and small numbers to 0."""
    small = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(torch.float8_e4m3fn)
    return small.view(torch.uint8).numpy()


def _from_fp8(bits: np.ndarray) -> np.ndarray:
    small = torch.from_numpy(np.ascontiguousarray(bits, np.uint8)).view(torch.float8_e4m3fn)
    return small.float().numpy()


def _as(handle: Any, dtype: Any) -> Any:
    kind = {np.float64: tl.float64, np.int32: tl.int32}[dtype]
    return Handle(handle.data.astype(dtype), kind)


def _repair_bounds() -> None:
    stock = interpreter._patch_lang_tensor

    def index(tensor: Any) -> int:
        return int(tensor.handle.data.reshape(-1)[0])

    def patch(tensor: Any, *scope: Any) -> None:
        stock(tensor, *scope)
        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    interpreter._patch_lang_tensor = patch


def _repair_casts() -> None:
    stock_cast, stock_fp = Builder.cast_impl, Builder.create_fp_to_fp

    def cast(self, source, wanted):
        have, want = source.dtype.scalar, wanted.scalar
        if have == want:
            return Handle(source.data, want)
        if have == tl.bfloat16:
            values = _widen(source.data)
            return Handle(
                values if want == tl.float32 else values.astype(interpreter._get_np_dtype(want)),
                want,
            )
        if want == tl.bfloat16:
            return Handle(_round(source.data.astype(np.float32)), want)
        return stock_cast(self, source, wanted)

    def fp_to_fp(self, source, wanted, rounding):
        if wanted.scalar == tl.float8e4nv and source.dtype.scalar == tl.float32:
            return Handle(_to_fp8(source.data), tl.float8e4nv)
        if source.dtype.scalar in FLOATS and wanted.scalar in FLOATS:
            return cast(self, source, wanted)
        return stock_fp(self, source, wanted, rounding)

    Builder.cast_impl, Builder.create_fp_to_fp = cast, fp_to_fp
    Builder.get_bf16 = lambda self, value: Handle(
        _round(np.array([value], np.float32)), tl.bfloat16
    )


def _repair_arithmetic() -> None:
    stock_binary, stock_unary, stock_dot = Builder.binary_op, Builder.unary_op, Builder.create_dot

    def binary(self, left, right, operation):
        if not (_is_bf16(left) and _is_bf16(right)):
            return stock_binary(self, left, right, operation)
        found = operation(_widen(left.data), _widen(right.data))
        return (
            Handle(found, tl.int1)
            if operation in COMPARISONS
            else Handle(_round(found), tl.bfloat16)
        )

    def unary(self, value, operation):
        if not _is_bf16(value):
            return stock_unary(self, value, operation)
        return Handle(_round(operation(_widen(value.data))), tl.bfloat16)

    def operand(x):
        if _is_bf16(x):
            return Handle(_widen(x.data), tl.float32)
        if x.dtype.scalar == tl.float8e4nv:
            return Handle(_from_fp8(x.data), tl.float32)
        if x.dtype.scalar == tl.int8:  # exact in float64, and many times as fast
            return Handle(x.data.astype(np.float64), tl.float64)
        return x

    def dot(self, left, right, start, *rest):
        own, whole = (operand(left), operand(right)), left.dtype.scalar == tl.int8
        found = stock_dot(self, *own, _as(start, np.float64) if whole else start, *rest)
        return _as(found, np.int32) if whole else found

    Builder.binary_op, Builder.unary_op, Builder.create_dot = binary, unary, dot


class _Buffer:
    """One tensor of a launch, and which program stored each of its elements."""

    def __init__(self, tensor: torch.Tensor) -> None:
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        elements = reach + 1 if tensor.numel() else 0
        self.shape, self.item = tuple(tensor.shape), tensor.element_size()
        self.start = tensor.data_ptr()
        self.end = self.start + elements * self.item
        self.stored_by = np.full(elements if elements < LARGE else 0, -1, np.int64)


_buffers: list[_Buffer] = []
_program = 0


class Traffic:
    """Elements loaded from and stored to each tensor, by where it lies."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, int], int] = {}

    def loaded(self, tensor: torch.Tensor) -> int:
        return self.counts.get(("load", tensor.data_ptr()), 0)

    def stored(self, tensor: torch.Tensor) -> int:
        return self.counts.get(("store", tensor.data_ptr()), 0)


_traffic: list[Traffic] = []


@contextlib.contextmanager
def traffic() -> Iterator[Traffic]:
    """Counts what the launches inside load and store."""
    _traffic.append(Traffic())
    try:
        yield _traffic[-1]
    finally:
        _traffic.pop()


def _find_buffers(value: Any) -> None:
    if isinstance(value, torch.Tensor):
        found = _Buffer(value)
        if not any((known.start, known.end) == (found.start, found.end) for known in _buffers):
            _buffers.append(found)


def _touch(what: str, pointers: Any, mask: Any) -> None:
    mask = mask if isinstance(mask, np.ndarray) else getattr(mask, "data", mask)
    addresses, mask = np.broadcast_arrays(pointers.data, True if mask is None else mask)
    addresses = addresses[mask.astype(bool)]
    outside = np.ones(addresses.shape, bool)
    size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
    for buffer in _buffers:
        here = outside & (addresses >= buffer.start) & (addresses + size <= buffer.end)
        if not here.any():
            continue
        outside &= ~here
        for seen in _traffic:
            key = (what, buffer.start)
            seen.counts[key] = seen.counts.get(key, 0) + int(here.sum())
        if not buffer.stored_by.size:
            continue
        elements = ((addresses[here] - np.uint64(buffer.start)) // np.uint64(buffer.item)).astype(
            np.int64
        )
        owners = buffer.stored_by[elements]
        others = owners[(owners >= 0) & (owners != _program)]
        if what == "load" and others.size:
            raise MemoryFault(
                f"program {_program} loads what program {others[0]} stored in {buffer.shape}"
            )
        if what == "store":
            if others.size:
                raise MemoryFault(
                    f"programs {others[0]} and {_program} store to one address of {buffer.shape}"
                )
            if np.unique(elements).size != elements.size:
                raise MemoryFault(f"two lanes of one store hit one address of {buffer.shape}")
            buffer.stored_by[elements] = _program
    if outside.any():
        raise MemoryFault(
            f"{what}: {int(outside.sum())} of {addresses.size} lanes outside of every tensor"
        )


def watch() -> None:
    """Check every load and store of every launch from now on; once is enough."""
    grid = interpreter.GridExecutor
    if getattr(Builder, "watched", False):
        return
    Builder.watched = True
    stock_args, stock_grid = grid._init_args_hst, Builder.set_grid_idx
    stock_load, stock_store = Builder.create_masked_load, Builder.create_masked_store

    def arguments(self, args, kwargs):
        on_host = stock_args(self, args, kwargs)  # what the kernel will really touch
        _buffers.clear()
        for value in (*on_host[0], *on_host[1].values()):
            _find_buffers(
                value if isinstance(value, torch.Tensor) else getattr(value, "base", None)
            )
        return on_host

    def grid_index(self, x, y, z):
        global _program
        _program = (x * self.grid_dim[1] + y) * self.grid_dim[2] + z
        return stock_grid(self, x, y, z)

    def load(self, pointers, mask, *rest, **options):
        _touch("load", pointers, mask)
        return stock_load(self, pointers, mask, *rest, **options)

    def store(self, pointers, value, mask, *rest, **options):
        _touch("store", pointers, mask)
        return stock_store(self, pointers, value, mask, *rest, **options)

    grid._init_args_hst, Builder.set_grid_idx = arguments, grid_index
    Builder.create_masked_load, Builder.create_masked_store = load, store
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, debug=True
    )
