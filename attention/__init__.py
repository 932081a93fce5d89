"""The methods, in pure PyTorch: no ComfyUI, no Triton; usable from any program.

plan = SparsePlan(sparsity=0.9).resolve()
layout = TokenLayout(grid=(21, 30, 52))
run = AttentionRun(plan)  # one per sampling run: it owns calibrations and blocks
out, cost = run.attend(q, k, v, AttentionCall(layout, layer=0, step=0))
"""

from .block_layout import TokenLayout
from .call import AttentionCall, LayerInputs
from .plan import ResolvedPlan, SparsePlan
from .rope import RopeTable
from .run import AttentionRun

__all__ = [
    "AttentionCall",
    "AttentionRun",
    "LayerInputs",
    "ResolvedPlan",
    "RopeTable",
    "SparsePlan",
    "TokenLayout",
]
