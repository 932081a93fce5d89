"""The methods, in pure PyTorch: no ComfyUI, no Triton; usable from any program.

    plan = SparsePlan(sparsity=0.9)
    layout = TokenLayout(grid=(21, 30, 52))
    run = AttentionRun(plan)                       # one per sampling run: it owns calibrations and block tables
    out, cost = run.attend(q, k, v, layout, layer=0, step=0)
"""

from .layout import TokenLayout
from .methods import LayerInputs
from .plan import SparsePlan
from .positions import Positions
from .run import AttentionRun

__all__ = ["AttentionRun", "LayerInputs", "Positions", "SparsePlan", "TokenLayout"]
