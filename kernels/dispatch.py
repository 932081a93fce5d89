"""Which body of an operation runs: Triton's kernels where they can, plain PyTorch elsewhere."""

from __future__ import annotations

import contextlib
import logging
import re
from types import ModuleType
from typing import Any, NamedTuple

import torch

from . import pytorch, triton_support, tuning
from .triton_support import LIMITS, ON_TOKENS, Cause, Obstacle, Operands, TritonNotUsable, explain

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "pytorch")

# Kernels that failed on this machine, by (operation, kind of operands).
_failed: dict[tuple, Obstacle] = {}


class Choice(NamedTuple):
    """A backend, and where it is not Triton, why."""

    backend: str
    obstacle: Obstacle | None = None


def choose(backend: str, operands: Operands) -> Choice:
    """Which of "triton" and "pytorch" attends in such a call."""
    if backend == "pytorch":
        return Choice("pytorch", Cause.NOT_ASKED_FOR.because())
    found = triton_support.obstacle(operands)
    if found is None and backend == "auto":
        found = next(
            (why for (_, kind), why in _failed.items() if kind[:2] == operands.kind[:2]), None
        )
    return Choice("triton") if found is None else Choice("pytorch", found)


def run(operation: str, backend: str, operands: Operands, *arguments: Any) -> Any:
    """Call an operation's body. Under "auto" a kernel that fails is not tried again.

    Raises TritonNotUsable where backend is "triton" and its kernels cannot run, or fail.
    """
    portable = getattr(pytorch, operation)
    if backend == "pytorch":
        return portable(*arguments)
    found = triton_support.obstacle(operands, LIMITS.get(operation, ON_TOKENS))
    if found is None and backend == "auto":
        found = _failed.get((operation, operands.kind))
        rows = operands.block_sizes[0] if operands.block_sizes else 0
        if operation in tuning.FORWARD and tuning.refuses(operands.device, rows):
            found = Cause.KERNEL_FAILED.because(operation=operation, error="it is wrong here")
    if found is not None:
        if backend == "triton":
            raise TritonNotUsable(explain(found))
        return portable(*arguments)
    try:
        # Triton launches on the current device and its stream, whatever the tensors are on.
        with _current(operands.device):
            return getattr(_triton(), operation)(*arguments)
    except Exception as error:  # a missing compiler, an old driver: many kinds, all of Triton's
        if isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error).lower():
            raise
        part = tuning.measured_part(operation, arguments, operands.device)
        if part is not None:  # the shipped parameters, and 16 bits, are a way out
            rest = tuning.without(part, arguments, operands.device)
            found = run(operation, backend, operands, *rest)
            tuning.withdraw(part, _last_words(error), operands.device)
            return found
        why = Cause.KERNEL_FAILED.because(operation=operation, error=_last_words(error))
        if backend == "triton":
            raise TritonNotUsable(explain(why)) from error
        _failed[operation, operands.kind] = why
        logger.warning("RoPeSLR: %s Continuing in plain PyTorch.", explain(why))
        return portable(*arguments)


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _last_words(error: BaseException) -> str:
    """What the innermost error says: its last line with a word, since compilers end in carets."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if re.search(r"[A-Za-z]{2}", line)]
    return f"{type(error).__name__}: {lines[-1][:200]}" if lines else type(error).__name__


def _triton() -> ModuleType:
    from .triton import backend

    return backend
