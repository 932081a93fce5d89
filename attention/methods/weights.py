"""From an adapter's tensors to what the operations take: noise bins, the gate's own term, learned positions."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from ..adapters import Adapter, AdapterInfo
from ..layout import TokenLayout
from ..plan import SparsePlan
from ..positions import fourier_tables, places, resampled_tables
from .base import LayerCall


def layer_weights(adapter: Adapter, layer: Hashable, device: torch.device) -> dict[str, Tensor]:
    """One layer's tensors on a device, without gradients; nothing is copied that is there already."""
    return {name: tensor.detach().to(device) for name, tensor in adapter.layer(layer).items()}


def used_rank(plan: SparsePlan, info: AdapterInfo) -> int:
    """How many of an adapter's features run: all, or as few as the plan asks for."""
    return plan.rank if 0 < plan.rank < info.rank else info.rank


def at_noise(tensor: Tensor, dims: int, levels: tuple[float, ...], noise: float | None) -> Tensor:
    """A tensor of `dims` dimensions, or one with noise bins in front, between the two bins nearest to the noise."""
    tensor = tensor.float()
    if tensor.ndim == dims:
        return tensor
    if noise is None:
        return tensor.mean(dim=0)
    above = next((i for i, level in enumerate(levels) if level >= noise), len(levels) - 1)
    below = max(0, above - 1)
    if levels[above] <= noise or above == below:
        return tensor[above]
    return torch.lerp(tensor[below], tensor[above], (noise - levels[below]) / (levels[above] - levels[below]))


def gate_term(x: Tensor, weight: Tensor, heads: int, call: LayerCall) -> Tensor:
    """w . x_h of every video token: x `(B, L, H*D)`, weight `(D,)` -> `(B, H, Lv)` float32."""
    by_head = x[:, call.video].unflatten(-1, (heads, -1))
    return (by_head @ weight.flatten().to(x.dtype)).float().transpose(1, 2)


class LearnedPositions:
    """E(p) of the layers of one run, as rows of axis tables; the rows' numbers are made once per grid."""

    def __init__(self, adapter: Adapter) -> None:
        self.info = adapter.info
        self._places: dict[tuple[TokenLayout, torch.device], Tensor] = {}

    def tables(self, weights: Mapping[str, Tensor], name: str, call: LayerCall, rank: int) -> tuple:
        """(pe, places) of a feature map, for its first `rank` features; (None, None) where nothing was learned."""
        weight = weights.get(name)
        if self.info.pe == "none" or weight is None:
            return None, None
        key = (call.layout, weight.device)
        if key not in self._places:
            self._places[key] = places(call.layout.grid, weight.device)
        if self.info.pe == "fourier":
            tables = fourier_tables(weight[:, :rank], call.inputs.positions, call.layout.grid)
        else:
            tables = resampled_tables(weight[..., :rank], self.info.pe_grid, call.layout.grid)
        return tables, self._places[key]
