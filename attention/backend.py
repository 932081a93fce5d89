"""Which backend runs a plan's attention, and whether one can: asked before any tensor."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..kernels import ops, triton_support, tuning
from ..kernels.dispatch import Choice
from ..kernels.triton_support import Operands, TritonNotUsable
from .plan import BLOCK, ResolvedPlan

__all__ = [
    "Choice",
    "TritonNotUsable",
    "backend_of",
    "check_triton",
    "dense_is_faster",
    "shape_reason",
    "tuned",
    "use_tuning",
]


def shape_reason(head_dim: int, num_heads: int, num_kv_heads: int) -> str | None:
    """Why no backend can take such a call, in words; None where one can."""
    return ops.why_not(head_dim, num_heads, num_kv_heads)


def backend_of(plan: ResolvedPlan, q: Tensor) -> Choice:
    """Which backend attends for q `(B, H, L, D)`, and where it is not Triton, why."""
    return ops.backend_for(q, plan.backend, BLOCK)


# Sparsity below which a CPU whose matrix unit multiplies bfloat16 (AMX) attends faster densely:
# measured at 8,192 tokens, 0.48, 1.20 and 1.60 times as fast at 0.80, 0.90 and 0.95.
AMX_BREAK_EVEN = 0.88


def dense_is_faster(plan: ResolvedPlan, q: Tensor) -> str | None:
    """Why dense attention would be faster for q, in words; None where it is not known to be."""
    if plan.backend != "auto" or q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return None
    if plan.sparsity >= AMX_BREAK_EVEN or plan.error_target is not None or not _has_amx():
        return None
    if plan.adapter is not None:  # weights that were trained sparse are another function
        return None
    return (
        f"on this CPU (AMX) dense bfloat16 attention is faster than sparsity {plan.sparsity:.2f}; "
        f"set it to {AMX_BREAK_EVEN:.2f} or more"
    )


@cache
def _has_amx() -> bool:
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def use_tuning(path: Path, device: torch.device) -> str:
    """Go by what RoPeSLR Doctor measured on this machine: -> what that is, in words."""
    return tuning.use(path, device)


def tuned(device: torch.device) -> str:
    """Whether something was measured, in words; empty where there is nothing to measure."""
    return tuning.state(device)


def check_triton(
    plan: ResolvedPlan, device: torch.device, dtype: torch.dtype, head_dim: int
) -> None:
    """Raise TritonNotUsable where the plan demands Triton and it cannot run, before any work."""
    if plan.backend != "triton":
        return
    found = triton_support.obstacle(Operands(device, dtype, head_dim, (BLOCK,)))
    if found is not None:
        raise TritonNotUsable(triton_support.explain(found))
