"""The methods by name: `create(plan, adapter)` makes the one that a plan asks for, ready for one sampling run."""

from __future__ import annotations

from ..adapters import Adapter
from ..plan import SparsePlan
from .adaspa import AdaSpa
from .base import LayerCall, LayerInputs, Method, VideoOutput
from .rola import RoLA
from .ropeslr import RoPeSLR
from .sla import SLA
from .top_k import TopK

__all__ = ["LayerCall", "LayerInputs", "Method", "VideoOutput", "create"]


def create(plan: SparsePlan, adapter: Adapter | None = None) -> Method:
    """A fresh instance of a resolved plan's method; an adapter of another method takes no part."""
    if adapter is not None and adapter.info.method != plan.method:
        adapter = None
    if plan.method == "adaspa":
        return AdaSpa(plan)
    if plan.method == "rola" or (adapter is not None and adapter.info.fusion == "rms"):
        return RoLA(plan, adapter) if adapter is not None else TopK(plan, tail=False)
    if plan.method == "sla":
        return SLA(plan, adapter) if adapter is not None and not adapter.sparse_only else TopK(plan, tail=False)
    if plan.method == "ropeslr":
        return RoPeSLR(plan, adapter)
    return TopK(plan, tail=plan.method == "top-k")
