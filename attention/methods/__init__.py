"""The methods by name: `create(plan)` makes the one that a plan asks for, ready for one run."""

from __future__ import annotations

from ..plan import NEED_WEIGHTS, ResolvedPlan
from .adaspa import AdaSpa
from .base import Method, MethodOutput
from .rola import RmsRoPeSLR, RoLA
from .ropeslr import RoPeSLR
from .sla import SLA
from .top_k import PooledTopK, TopK
from .vsa import VSA

__all__ = ["Method", "MethodOutput", "create"]

METHODS: dict[str, type[Method]] = {
    "ropeslr": RoPeSLR,
    "rola": RoLA,
    "sla": SLA,
    "adaspa": AdaSpa,
    "top-k": PooledTopK,
    "top-k plain": TopK,
    "vsa": VSA,
}


def create(plan: ResolvedPlan) -> Method:
    """A fresh instance of the plan's method; one without its weights runs kept blocks only."""
    adapter = plan.adapter
    if plan.method in NEED_WEIGHTS and (adapter is None or adapter.sparse_only):
        return TopK(plan)
    if adapter is not None and plan.method == "ropeslr" and adapter.info.fusion == "rms":
        return RmsRoPeSLR(plan)
    return METHODS[plan.method](plan)
