"""An adapter in memory: a few tensors per attention layer, and their names in a file.

A key in a file is the layer's name (Wan `blocks.{i}.self_attn`, HunyuanVideo `double_blocks.{i}`
and `single_blocks.{i}`) and one of these endings. H heads of head_dim D, rank r, N noise bins:

    ropeslr   ropeslr.channel_scale         (H, D/2) or (N, H, D/2)
              ropeslr.gate_slope, .gate_bias (H) or (N, H)
              ropeslr.gate_weight           (D)
              ropeslr.proj_q, .proj_k       (H, r, D)     a lower rank uses the first rows
              ropeslr.pe_q, .pe_k           (H, r, D) fourier, or (H, T + height + width, r) table
              ropeslr.low_rank_scale        (H)
              ropeslr.allocation            (H) or (N, H)   kept blocks as shares of their mean
              each may be absent: the method then uses its initial value
    rola      proj_q.weight, proj_k.weight (r, D)   gate_proj.weight (1, D)   gate_bias (1, H, 1, 1)
    sla       attn_op.local_attn.proj_l.weight (D, D)   attn_op.local_attn.proj_l.bias (D)

Source: RoLA's and SLA's released checkpoints; the rest is ours.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from torch import Tensor

from .info import AdapterError, AdapterInfo
from .text import quoted

T = TypeVar("T")

# Ending in a file -> name in `Adapter.layers`, by method.
SUFFIXES: Mapping[str, Mapping[str, str]] = {
    "ropeslr": {
        "ropeslr.channel_scale": "channel_scale",
        "ropeslr.gate_slope": "gate_slope",
        "ropeslr.gate_bias": "gate_bias",
        "ropeslr.gate_weight": "gate_weight",
        "ropeslr.proj_q": "proj_q",
        "ropeslr.proj_k": "proj_k",
        "ropeslr.pe_q": "pe_q",
        "ropeslr.pe_k": "pe_k",
        "ropeslr.low_rank_scale": "low_rank_scale",
        "ropeslr.allocation": "allocation",
    },
    "rola": {
        "proj_q.weight": "proj_q",
        "proj_k.weight": "proj_k",
        "gate_proj.weight": "gate_weight",
        "gate_bias": "gate_bias",
    },
    "sla": {"attn_op.local_attn.proj_l.weight": "weight", "attn_op.local_attn.proj_l.bias": "bias"},
}

# At most four digits: a file cannot make us count to a number of a thousand digits.
_INDEX = r"(?:0|[1-9]\d{0,3})"
_KEY = re.compile(
    rf"(blocks\.{_INDEX}\.self_attn|(?:double|single)_blocks\.{_INDEX})\.(.+)", re.ASCII
)
_WAN_LAYER = re.compile(rf"blocks\.({_INDEX})\.self_attn", re.ASCII)
_HUNYUAN_LAYER = re.compile(rf"(double|single)_blocks\.({_INDEX})", re.ASCII)


@dataclass(frozen=True)
class Adapter:
    """The weights of a sparse-attention method, by layer and name.

    layers: for example `layers["blocks.0.self_attn"]["proj_q"]`.
    name: the file's, for messages.
    use_rank: the rank to use where the plan does not say; 0 = all of it.

    >>> adapter = read_adapter("file.safetensors")
    >>> adapter.layer(0) is adapter.layers["blocks.0.self_attn"]
    True
    """

    info: AdapterInfo
    layers: Mapping[str, Mapping[str, Tensor]]
    name: str = "adapter"
    use_rank: int = 0

    def layer(self, layer: Hashable) -> Mapping[str, Tensor]:
        """The weights of one layer, by identity or name; KeyError where there are none."""
        return self._by_identity[layer]

    def knows(self, layer: Hashable) -> bool:
        """Whether there are weights for a layer."""
        return layer in self._by_identity

    def has(self, name: str) -> bool:
        """Whether any layer has a tensor of this name."""
        return any(name in weights for weights in self.layers.values())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by their keys in a file."""
        suffixes = {name: suffix for suffix, name in SUFFIXES[self.info.method].items()}
        return {
            f"{layer}.{suffixes[name]}": tensor
            for layer, weights in self.layers.items()
            for name, tensor in weights.items()
        }

    @cached_property
    def sparse_only(self) -> bool:
        """Whether this is SLA whose projection is zero: it adds nothing to the kept blocks."""
        if self.info.method != "sla":
            return False
        tensors = (tensor for weights in self.layers.values() for tensor in weights.values())
        return not any(bool(tensor.any()) for tensor in tensors)

    @cached_property
    def _by_identity(self) -> Mapping[Hashable, Mapping[str, Tensor]]:
        # Every attention call asks for its layer: names are parsed once, not made anew per call.
        by_identity: dict[Hashable, Mapping[str, Tensor]] = {}
        for name, weights in self.layers.items():
            by_identity[name] = weights
            by_identity[layer_identity(name)] = weights
        return by_identity


def layer_name(layer: Hashable) -> str:
    """The name of a layer in a file.

    >>> layer_name(3), layer_name(("double", 3))
    ('blocks.3.self_attn', 'double_blocks.3')
    """
    if isinstance(layer, int):
        return f"blocks.{layer}.self_attn"
    if isinstance(layer, tuple):
        return f"{layer[0]}_blocks.{layer[1]}"
    return str(layer)


def layer_identity(name: str) -> Hashable:
    """The identity that the model has for a layer of this name: the inverse of `layer_name`.

    >>> layer_identity("blocks.3.self_attn"), layer_identity("double_blocks.3")
    (3, ('double', 3))
    """
    if match := _WAN_LAYER.fullmatch(name):
        return int(match.group(1))
    if match := _HUNYUAN_LAYER.fullmatch(name):
        return match.group(1), int(match.group(2))
    return name


def group_by_layer(method: str, entries: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Sort entries by file key into layers and names. An unexpected key raises AdapterError."""
    names = SUFFIXES[method]
    layers: dict[str, dict[str, T]] = {}
    for key, entry in entries.items():
        match = _KEY.fullmatch(key)
        if match is None or match.group(2) not in names:
            raise AdapterError(
                f"unexpected key {quoted(key)} in this {method} adapter; expected in each layer "
                f"one of: {', '.join(names)}"
            )
        layer, suffix = match.groups()
        layers.setdefault(layer, {})[names[suffix]] = entry
    return dict(sorted(layers.items(), key=lambda item: _in_order(item[0])))


def _in_order(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in name.split(".")]
