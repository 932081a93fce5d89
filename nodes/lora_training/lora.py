"""The LoRA in training: which layers get one, its weights, and how ComfyUI applies them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from comfy.weight_adapter.base import WeightAdapterTrainBase
from comfy.weight_adapter.bypass import BypassInjectionManager
from torch import Tensor

from ..patching.model_info import ModelInfo, self_attentions, unwrap

UP, DOWN, ALPHA = "lora_up.weight", "lora_down.weight", "alpha"
NO_LAYERS = "{model} has no linear layers in its self-attention that a LoRA could be trained for."
OTHER_LORA = (
    "existing_lora has no {key} of the shape {shape}: it is of another model, of another rank than "
    "{rank}, or of other layers. Choose a LoRA of this node, or set rank to its rank."
)


class Factors(WeightAdapterTrainBase):
    """One layer's LoRA in float32, whatever the model computes in: W x + up(down(x))."""

    def __init__(self, linear: torch.nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        wide, out = linear.in_features, linear.out_features
        down = torch.randn(rank, wide, generator=generator) / math.sqrt(wide)
        self.down = torch.nn.Parameter(down)
        self.up = torch.nn.Parameter(torch.zeros(out, rank))

    def h(self, x: Tensor, base_out: Tensor) -> Tensor:
        """What is added to the layer's output; see ComfyUI's bypass mode."""
        linear = torch.nn.functional.linear
        return linear(linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


class TrainedLora:
    """The LoRA of a model's self-attention.

    layers, factors: by their names in the model. parameters: by that name and `up` or `down`.
    """

    def __init__(self, base_model: Any, info: ModelInfo, rank: int, seed: int) -> None:
        self.layers = layers = attention_layers(base_model, info)
        if not layers:
            raise ValueError(NO_LAYERS.format(model=info.name))
        generator = torch.Generator().manual_seed(seed % 2**63)
        self.rank = rank
        self.factors = {name: Factors(each, rank, generator) for name, each in layers.items()}
        self.parameters: dict[str, torch.nn.Parameter] = {
            f"{name}.{which}": parameter
            for name, factors in self.factors.items()
            for which, parameter in factors.named_parameters()
        }
        manager = BypassInjectionManager()
        for name, factors in self.factors.items():
            manager.add_adapter(name, factors)
        self._injections = manager.create_injections(base_model)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Begin with a LoRA of this node; raises ValueError where it is of another model or rank.

        The strength that its alpha gives goes into `up`.
        """
        for name, factors in self.factors.items():
            alpha = float(weights.get(f"{name}.{ALPHA}", torch.tensor(float(self.rank))))
            for key, own, scale in (
                (UP, factors.up, alpha / self.rank),
                (DOWN, factors.down, 1.0),
            ):
                found = weights.get(f"{name}.{key}")
                if found is None or found.shape != own.shape:
                    shape = tuple(own.shape)
                    raise ValueError(
                        OTHER_LORA.format(key=f"{name}.{key}", shape=shape, rank=self.rank)
                    )
                own.data.copy_(found.float() * scale)

    def to(self, device: torch.device) -> None:
        """Move the weights, in place."""
        for factors in self.factors.values():
            factors.to(device)

    @contextlib.contextmanager
    def applied(self, patcher: Any) -> Iterator[None]:
        """Let the model's layers add it, for the length of a `with` block."""
        had = [(layer, vars(layer).get("forward")) for layer in self.layers.values()]
        for each in self._injections:
            each.inject(patcher)
        try:
            yield
        finally:
            for each in self._injections:
                each.eject(patcher)
            for layer, before in had:  # ComfyUI leaves the layer's own method there as a value
                if before is None:
                    vars(layer).pop("forward", None)

    @contextlib.contextmanager
    def removed(self, patcher: Any) -> Iterator[None]:
        """Leave it away again, inside of `applied`."""
        for each in self._injections:
            each.eject(patcher)
        try:
            yield
        finally:
            for each in self._injections:
                each.inject(patcher)

    @property
    def bytes(self) -> int:
        """Of the weights."""
        return sum(each.numel() * each.element_size() for each in self.parameters.values())


def as_file(parameters: Mapping[str, Tensor], rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a LoRA file, as ComfyUI's own training names them; parameters as above."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in parameters.items():
        layer, _, which = name.rpartition(".")
        tensors[f"{layer}.{UP if which == 'up' else DOWN}"] = tensor.detach().cpu().to(dtype)
        tensors[f"{layer}.{ALPHA}"] = torch.tensor(float(rank))
    return tensors


def attention_layers(base_model: Any, info: ModelInfo) -> dict[str, torch.nn.Linear]:
    """The linear layers of a model's self-attention, by their names in it.

    Where a whole block is the self-attention: those whose name says attention; or all but the
    modulation.
    """
    names = {module: name for name, module in base_model.named_modules()}
    found: dict[str, torch.nn.Linear] = {}
    for module in self_attentions(base_model.diffusion_model, info):
        inner = {
            name: each
            for name, each in module.named_modules()
            if isinstance(each, torch.nn.Linear) and "mod" not in name
        }
        own = {name: each for name, each in inner.items() if "attn" in name}
        found |= {f"{names[unwrap(module)]}.{name}": each for name, each in (own or inner).items()}
    return found
