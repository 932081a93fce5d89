"""The methods by name: `create(plan)` makes the one that a plan asks for, ready for one sampling run."""

from __future__ import annotations

from ..plan import SparsePlan
from .base import LayerCall, Method, VideoOutput
from .ropeslr import RoPeSLR
from .top_k import TopK

__all__ = ["LayerCall", "Method", "VideoOutput", "create"]


def create(plan: SparsePlan) -> Method:
    """A fresh instance of the plan's method."""
    if plan.resolved_method == "ropeslr":
        return RoPeSLR(plan)
    return TopK(plan, tail=plan.resolved_method == "top-k")
