"""From an adapter's tensors to what operations take: noise bins, gate logits, learned positions."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from ..adapters import Adapter, AdapterInfo
from ..block_layout import TokenLayout
from ..call import AttentionCall
from ..plan import ResolvedPlan
from ..rope import axis_ids, fourier_tables, resampled_tables


def layer_weights(adapter: Adapter, layer: Hashable, device: torch.device) -> dict[str, Tensor]:
    """One layer's tensors on a device, without gradients; no copy of what is there already."""
    return {name: tensor.detach().to(device) for name, tensor in adapter.layer(layer).items()}


def used_rank(plan: ResolvedPlan, info: AdapterInfo) -> int:
    """How many of an adapter's features run: all, or as few as the plan asks for."""
    return plan.rank if 0 < plan.rank < info.rank else info.rank


def at_noise(tensor: Tensor, dims: int, levels: tuple[float, ...], sigma: float | None) -> Tensor:
    """A tensor of `dims` dimensions; noise bins in front of them are interpolated."""
    tensor = tensor.float()
    if tensor.ndim == dims:
        return tensor
    if sigma is None:
        return tensor.mean(dim=0)
    last = len(levels) - 1
    above = next((i for i, level in enumerate(levels) if level >= sigma), last)
    below = max(0, above - 1)
    if levels[above] <= sigma or above == below:
        return tensor[above]
    share = (sigma - levels[below]) / (levels[above] - levels[below])
    return torch.lerp(tensor[below], tensor[above], share)


def gate_logits(call: AttentionCall, weight: Tensor, heads: int) -> Tensor:
    """w . x_h of every video token, weight `(D,)` -> `(B, H, Lv)` float32."""
    x = call.inputs.x
    assert x is not None  # `needs_x` keeps calls without it away
    by_head = x[:, call.video].unflatten(-1, (heads, -1))
    return (by_head @ weight.flatten().to(x.dtype)).float().transpose(1, 2)


class LearnedPositions:
    """pe(p) of the layers of one run, as axis tables.

    The ids of their rows are made once per grid.
    """

    def __init__(self, info: AdapterInfo) -> None:
        self.info = info
        self._ids: dict[tuple[TokenLayout, torch.device], Tensor] = {}

    def tables(
        self, weight: Tensor | None, call: AttentionCall, rank: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """(pe, axis_ids) of a feature map's first `rank` features; None if nothing was learned."""
        if self.info.pe == "none" or weight is None:
            return None, None
        grid, key = call.layout.grid, (call.layout, weight.device)
        if key not in self._ids:
            self._ids[key] = axis_ids(grid, weight.device)
        if self.info.pe == "table":
            frames, height, width = self.info.pe_grid
            tables = resampled_tables(weight[..., :rank], (frames, height, width), grid)
            return tables, self._ids[key]
        assert call.inputs.rope is not None
        return fourier_tables(weight[:, :rank], call.inputs.rope, grid), self._ids[key]
