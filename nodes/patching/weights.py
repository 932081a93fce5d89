"""Makes an adapter's tensors travel as ComfyUI's other weights do: loaded with the model, offloaded, freed."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_management
import comfy.model_patcher
import torch

from ...attention.adapters import Adapter


class AdapterWeights(torch.nn.Module):
    """An adapter's tensors as parameters, one group per layer, so that ComfyUI can move them piece by piece."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.names = list(adapter.layers)
        self.groups = torch.nn.ModuleList(
            torch.nn.ParameterDict({name: torch.nn.Parameter(tensor, False) for name, tensor in weights.items()})
            for weights in adapter.layers.values()
        )


def carried(adapter: Adapter) -> tuple[object, Adapter]:
    """A model patcher that holds the adapter's weights, and the adapter reading them wherever they are."""
    weights = AdapterWeights(adapter)
    # Looked up late: ComfyUI puts its dynamic patcher there when it starts.
    patcher = comfy.model_patcher.CoreModelPatcher(
        weights, load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    return patcher, replace(adapter, layers=dict(zip(weights.names, weights.groups)))
