"""Has an adapter's tensors loaded, offloaded and freed with the model, as ComfyUI's own weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.model_patcher
import torch

from ...attention.adapters import Adapter


class AdapterWeights(torch.nn.Module):
    """An adapter's tensors as parameters, one group per layer, which ComfyUI moves one by one."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.names = list(adapter.layers)
        self.groups = torch.nn.ModuleList(
            torch.nn.ParameterDict(
                {name: torch.nn.Parameter(tensor, False) for name, tensor in weights.items()}
            )
            for weights in adapter.layers.values()
        )


def as_comfy_weights(adapter: Adapter, like: Any) -> tuple[Any, Adapter]:
    """A model patcher that holds the adapter's weights, and the adapter that reads them from it.

    like: the MODEL that they run with; they live on its devices.
    """
    patcher = make_patcher(adapter, like.load_device, like.offload_device)
    weights = patcher.model
    layers = dict(zip(weights.names, weights.groups))
    return patcher, replace(adapter, layers=layers)


def make_patcher(
    adapter: Adapter,
    load_device: torch.device,
    offload_device: torch.device,
    disable_dynamic: bool = False,
) -> Any:
    """A fresh patcher around an adapter's weights."""
    # Looked up late: ComfyUI puts its dynamic patcher there when it starts.
    module = comfy.model_patcher
    kind = module.ModelPatcher if disable_dynamic else module.CoreModelPatcher
    weights = AdapterWeights(adapter)
    patcher = kind(weights, load_device=load_device, offload_device=offload_device)
    # How ComfyUI makes a second, untouched copy, for another GPU for example.
    patcher.cached_patcher_init = (make_patcher, (adapter, load_device, offload_device))
    return patcher
