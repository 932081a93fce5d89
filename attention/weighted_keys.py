"""Keys beside the video whose scores have a constant added, as guides of a strength other than 1.

They are in no block of a method's: each span is attended to by itself, and merged by softmax mass,

    O = sum_p exp(M_p - M) O_p,   M = log sum_p exp(M_p)

p: what the method found, whose mass M_p it tells, and each span, M_p = LSE_p + its constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import ops
from .call import AttentionCall
from .plan import ResolvedPlan


def merge_weighted(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    found: tuple[Tensor, Tensor],
    call: AttentionCall,
    plan: ResolvedPlan,
) -> Tensor:
    """Add the layout's weighted spans to what was found without them: -> out `(B, H, Lq, D)`.

    q: of `found`'s queries; k, v `(B, H, L, D)`; found: out `(B, H, Lq, D)`, which is overwritten
    where no gradients are required, and the log of its softmax mass `(B, H, Lq)`.
    """
    out, mass = found
    for start, stop, weight in call.layout.weighted:
        own = slice(start, stop)
        more, lse = ops.dense_attention(
            q, k[:, :, own], v[:, :, own], scale=call.scale, backend=plan.backend
        )
        lse = lse + weight
        share = torch.sigmoid(lse - mass).to(out.dtype)[..., None]
        gradients = torch.is_grad_enabled() and (out.requires_grad or more.requires_grad)
        out = torch.lerp(out, more, share) if gradients else out.lerp_(more, share)
        mass = torch.logaddexp(mass, lse)
    return out
