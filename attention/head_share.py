"""Which of a model's heads a process attends for, and how it asks the others that share them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .adapters import Adapter

# Which dimension of an adapter's tensors counts heads, by name; the others are shared by them.
HEAD_DIM = {
    "channel_scale": -2,
    "gate_slope": -1,
    "low_rank_scale": -1,
    "proj_q": 0,
    "proj_k": 0,
    "pe_q": 0,
    "pe_k": 0,
}


@dataclass(frozen=True)
class HeadShare:
    """Process `rank` of `size`, each with as many heads, in order.

    gather: every process's tensor of one shape, in the order of ranks; all have to call it.
    """

    rank: int
    size: int
    gather: Callable[[Tensor], list[Tensor]]

    def own(self, heads: int) -> slice:
        """The process's own of so many heads; ValueError where they do not divide."""
        if heads % self.size:
            raise ValueError(f"{heads} heads cannot be shared by {self.size} processes")
        each = heads // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def total(self, x: Tensor) -> Tensor:
        """The sum of every process's tensor."""
        return torch.stack(self.gather(x)).sum(dim=0)

    def whole(self, x: Tensor, layers: int) -> Tensor:
        """Rows of one's own heads `(B, layers * h, ...)`, layer by layer, to those of all heads."""
        each = [part.unflatten(1, (layers, -1)) for part in self.gather(x.contiguous())]
        return torch.cat(each, dim=2).flatten(1, 2)

    def adapter(self, adapter: Adapter) -> Adapter:
        """An adapter with the weights of one's own heads; its table stays that of all."""
        heads = adapter.info.num_heads
        own = self.own(heads)

        def part(name: str, weight: Tensor) -> Tensor:
            if name == "gate_bias":  # (.., H), or RoLA's (1, H, 1, 1)
                dim = 1 if weight.ndim == 4 else weight.ndim - 1
            elif name in HEAD_DIM and (weight.ndim > 2 or not name.startswith("proj")):
                dim = HEAD_DIM[name] % weight.ndim
            else:
                return weight
            return weight.narrow(dim, own.start, own.stop - own.start).clone()

        layers = {
            layer: {name: part(name, weight) for name, weight in weights.items()}
            for layer, weights in adapter.layers.items()
        }
        return replace(adapter, layers=layers)
