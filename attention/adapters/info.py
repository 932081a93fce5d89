"""What an adapter is: a few tensors per attention layer, and facts about the model and the training they belong to.

Keys in a file, behind the layer's name (Wan `blocks.{i}.self_attn`, HunyuanVideo `double_blocks.{i}` and
`single_blocks.{i}`); H heads of width D, rank r, and N noise bins where a tensor may have them:

    ropeslr   ropeslr.beta (H, D/2) or (N, H, D/2)      ropeslr.gate_c, .gate_b (H) or (N, H)     ropeslr.gate_w (D)
              ropeslr.a_q, .a_k (H, r, D)   ropeslr.pe_q, .pe_k (H, r, D) fourier or (H, T+Hh+Ww, r) table
              ropeslr.eta (H)               each may be absent, which means its initial value
    rola      proj_q.weight, proj_k.weight (r, D)   gate_proj.weight (1, D)   gate_bias (1, H, 1, 1)
    sla       attn_op.local_attn.proj_l.weight (D, D), .bias (D)

Source: RoLA's and SLA's released checkpoints; the rest is ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TypeVar

import torch
from torch import Tensor

from ..plan import BLOCK, TRAINED_METHODS
from ..positions import rope_axes

T = TypeVar("T")
FORMAT, VERSION = "ropeslr-adapter", "1"
ACTS = ("softmax", "elu")
PES = ("fourier", "table", "none")
FUSIONS = ("mass", "rms")
LIMIT = 4096                                # of layers, heads, widths: what no real file comes near
LAYER = re.compile(r"^(blocks\.\d+\.self_attn|(?:double|single)_blocks\.\d+)\.(.+)$")

SUFFIXES = {
    "ropeslr": {f"ropeslr.{name}": name for name in (
        "beta", "gate_c", "gate_b", "gate_w", "a_q", "a_k", "pe_q", "pe_k", "eta")},
    "rola": {"proj_q.weight": "a_q", "proj_k.weight": "a_k", "gate_proj.weight": "gate_w", "gate_bias": "gate_b"},
    "sla": {"attn_op.local_attn.proj_l.weight": "weight", "attn_op.local_attn.proj_l.bias": "bias"},
}


class AdapterError(ValueError):
    """A file that cannot be used; the message names the file, what was found, what was expected, what to do."""


@dataclass(frozen=True)
class AdapterInfo:
    """The facts in an adapter's header. Checked on construction; an AdapterError names the field.

    sparsity: what it was trained at. noise_levels: the flow-matching noise (1 = noise) of each noise bin, ascending.
    pe_grid: the (T, rows, columns) of `table` positions. fusion "rms": RoLA's additive form with SiLU features.
    """

    method: str
    num_layers: int
    num_heads: int
    head_dim: int
    rank: int
    base_model: str = "unknown"
    block_q: int = BLOCK
    block_k: int = BLOCK
    block_order: str = "cube"
    sparsity: float = 0.9
    act: str = "softmax"
    pe: str = "none"
    pe_grid: tuple[int, ...] = ()
    noise_levels: tuple[float, ...] = ()
    fusion: str = "mass"
    created_by: str = "ComfyUI-RoPeSLR"
    source: str = ""

    def __post_init__(self) -> None:
        for name, options in (
            ("method", TRAINED_METHODS), ("block_order", ("raster", "cube")), ("act", ACTS), ("pe", PES),
            ("fusion", FUSIONS),
        ):
            if getattr(self, name) not in options:
                raise AdapterError(f"{name} is {getattr(self, name)!r}; it must be one of: {', '.join(options)}")
        for name in ("num_layers", "num_heads", "head_dim"):
            self._whole(name, 1)
        self._whole("rank", 0)
        if self.fusion != {"rola": "rms", "sla": "mass"}.get(self.method, self.fusion):
            raise AdapterError(f"fusion is {self.fusion!r}, which {self.method} does not have")
        if self.method == "rola" and (self.rank < 2 or self.rank % 2):
            raise AdapterError(f"rank is {self.rank}; rola turns pairs of features, so it must be even and at least 2")
        for name in ("block_q", "block_k"):
            if getattr(self, name) != BLOCK:
                raise AdapterError(f"{name} is {getattr(self, name)}; this version runs blocks of {BLOCK}")
        if self.head_dim % 2:
            raise AdapterError(f"head_dim is {self.head_dim}; RoPE needs an even width")
        if not 0.0 <= self.sparsity < 1.0:
            raise AdapterError(f"sparsity is {self.sparsity}; it must be from 0 to below 1")
        if self.pe == "table" and (len(self.pe_grid) != 3 or not all(1 <= n <= LIMIT for n in self.pe_grid)):
            raise AdapterError(f"pe_grid is {self.pe_grid}; pe 'table' needs three sides (T, rows, columns)")
        levels = self.noise_levels
        if any(not 0.0 <= a <= 1.0 for a in levels) or any(a >= b for a, b in zip(levels, levels[1:])):
            raise AdapterError(f"noise_levels are {levels}; they must rise within 0 to 1")

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or not least <= value <= LIMIT:
            raise AdapterError(f"{name} is {value!r}; it must be a whole number from {least} to {LIMIT}")

    def header(self) -> dict[str, str]:
        """As a safetensors `__metadata__`: text only."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        written = {name: _write(value) for name, value in values.items()}
        return {"format": FORMAT, "format_version": VERSION, "rope_axes": _write(self.rope_axes), **written}

    @property
    def rope_axes(self) -> tuple[int, ...]:
        """Channels of a head that RoPE gives to time, rows and columns."""
        return tuple(2 * pairs for pairs in rope_axes(self.head_dim))

    @classmethod
    def from_header(cls, header: Mapping[str, str]) -> AdapterInfo:
        """Read a `__metadata__`. Unknown entries are left alone; wrong or missing ones raise AdapterError."""
        if header.get("format") != FORMAT:
            raise AdapterError(f"its header has format {header.get('format')!r}; expected {FORMAT!r}")
        if header.get("format_version") != VERSION:
            found = header.get("format_version")
            raise AdapterError(f"its format_version is {found!r}; this version reads {VERSION!r}. Update the pack")
        values = {}
        for each in fields(cls):
            if each.name in header:
                values[each.name] = _read(each.name, header[each.name])
            elif each.name in ("method", "num_layers", "num_heads", "head_dim", "rank"):
                raise AdapterError(f"its header has no {each.name}")
        info = cls(**values)
        if "rope_axes" in header and _read("pe_grid", header["rope_axes"]) != info.rope_axes:
            own = _write(info.rope_axes)
            raise AdapterError(f"rope_axes are {header['rope_axes']}; a head of {info.head_dim} has {own}")
        return info


_INTS = ("num_layers", "num_heads", "head_dim", "rank", "block_q", "block_k")


def _write(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _read(name: str, text: str):
    try:
        if name in _INTS:
            return int(text)
        if name == "sparsity":
            return float(text)
        if name in ("pe_grid", "noise_levels"):
            return tuple(map(int if name == "pe_grid" else float, filter(None, text.split(","))))
    except ValueError:
        raise AdapterError(f"{name} is {text!r} in its header, which is not a number") from None
    return text


@dataclass(frozen=True)
class Adapter:
    """Weights by layer and field, e.g. `layers["blocks.0.self_attn"]["a_q"]`, with their facts and the file's name.

    use_rank: features to use where the plan does not say, 0 = all.
    """

    info: AdapterInfo
    layers: Mapping[str, Mapping[str, Tensor]]
    name: str = "adapter"
    use_rank: int = 0
    sparse_only: bool = field(init=False)   # SLA whose projection is all zero: nothing is added to the kept blocks

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparse_only", self.info.method == "sla" and not any(
            bool(tensor.any()) for weights in self.layers.values() for tensor in weights.values()
        ))

    def layer(self, layer: Hashable) -> Mapping[str, Tensor]:
        """The weights of one layer, by its number or name; KeyError where there are none."""
        return self.layers[layer_name(layer)]

    def knows(self, layer: Hashable) -> bool:
        """Whether there are weights for a layer."""
        return layer_name(layer) in self.layers

    def has(self, name: str) -> bool:
        """Whether any layer has such a tensor."""
        return any(name in weights for weights in self.layers.values())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors under their keys in a file."""
        suffixes = {short: suffix for suffix, short in SUFFIXES[self.info.method].items()}
        return {
            f"{layer}.{suffixes[name]}": tensor
            for layer, weights in self.layers.items() for name, tensor in weights.items()
        }


def layer_name(layer: Hashable) -> str:
    """The name of a layer in a file: an int is a Wan block; ("double", 3) one of HunyuanVideo's."""
    if isinstance(layer, int):
        return f"blocks.{layer}.self_attn"
    return f"{layer[0]}_blocks.{layer[1]}" if isinstance(layer, tuple) else str(layer)


def group(method: str, tensors: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Sort what stands under file keys into layers; a key that the method does not know raises AdapterError."""
    layers: dict[str, dict[str, T]] = {}
    for key, tensor in tensors.items():
        match = LAYER.match(key)
        short = SUFFIXES[method].get(match.group(2)) if match else None
        if short is None:
            known = ", ".join(SUFFIXES[method])
            raise AdapterError(f"key {key!r} does not belong into a {method} adapter; a layer has: {known}")
        layers.setdefault(match.group(1), {})[short] = tensor
    return dict(sorted(layers.items(), key=lambda item: [int(n) if n.isdigit() else n for n in item[0].split(".")]))


def validate(info: AdapterInfo, layers: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Every layer there, every tensor of the right shape, floating point and finite; else an AdapterError."""
    validate_shapes(info, {
        layer: {name: tuple(tensor.shape) for name, tensor in weights.items()} for layer, weights in layers.items()
    })
    for layer, weights in layers.items():
        for name, tensor in weights.items():
            _check_numbers(f"{layer} {name}", tensor)


def validate_shapes(info: AdapterInfo, layers: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    """Every layer there, every tensor there and of the right shape; else an AdapterError. Reads no tensor."""
    if len(layers) != info.num_layers:
        raise AdapterError(f"it has weights for {len(layers)} layers; its header says num_layers {info.num_layers}")
    numbers: dict[str, list[int]] = {}
    for layer in layers:
        kind, number = layer.split(".")[:2]
        numbers.setdefault(kind, []).append(int(number))
    for kind, found in numbers.items():
        if sorted(found) != list(range(len(found))):
            missing = next(number for number in range(len(found)) if number not in found)
            raise AdapterError(f"it has no weights for layer {kind}.{missing}, though for {kind}.{max(found)}")
    shapes = _shapes(info)
    for layer, weights in layers.items():
        for name in _needed(info, weights):
            if name not in weights:
                raise AdapterError(f"layer {layer} has no {name}; it has {', '.join(sorted(weights)) or 'nothing'}")
        for name, found in weights.items():
            if name.startswith("pe_") and info.pe == "none":
                raise AdapterError(f"layer {layer} has {name}, though its header says pe 'none'")
            if found not in shapes[name]:
                expected = " or ".join(map(str, shapes[name]))
                raise AdapterError(f"{layer} {name} has the shape {found}; expected {expected}")


def _needed(info: AdapterInfo, weights: Mapping[str, object]) -> set[str]:
    if info.method != "ropeslr":
        return set(SUFFIXES[info.method].values())
    if info.fusion == "rms":
        return {"a_q", "a_k", "gate_b", "gate_w"} | ({"pe_q", "pe_k"} if info.pe != "none" else set())
    part = {"a_q", "a_k", "eta"} | ({"pe_q", "pe_k"} if info.pe != "none" else set())
    return part if part & set(weights) else set()


def _shapes(info: AdapterInfo) -> dict[str, list[tuple[int, ...]]]:
    h, d, r, bins = info.num_heads, info.head_dim, info.rank, len(info.noise_levels)
    if info.method == "rola":
        shapes = {"a_q": (r, d), "a_k": (r, d), "gate_w": (1, d), "gate_b": (1, h, 1, 1)}
        return {name: [shape] for name, shape in shapes.items()}
    if info.method == "sla":
        return {"weight": [(d, d)], "bias": [(d,)]}
    pe = (h, sum(info.pe_grid), r) if info.pe == "table" else (h, r, d)
    binned = {"beta": (h, d // 2), "gate_c": (h,), "gate_b": (h,)}
    shapes = {name: [shape] + ([(bins, *shape)] if bins else []) for name, shape in binned.items()}
    fixed = {"gate_w": (d,), "a_q": (h, r, d), "a_k": (h, r, d), "pe_q": pe, "pe_k": pe, "eta": (h,)}
    return shapes | {name: [shape] for name, shape in fixed.items()}


def _check_numbers(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise AdapterError(f"{name} is {tensor.dtype}; expected floating point")
    if not torch.isfinite(tensor).all():
        wrong = int((~torch.isfinite(tensor)).sum())
        raise AdapterError(f"{name} has {wrong} of {math.prod(tensor.shape)} values that are NaN or infinite")


def check_model(adapter: Adapter, layers: Sequence[Hashable], heads: int, width: int, model: str) -> None:
    """Raise AdapterError unless the adapter fits a model of these layers (see `layer_name`), heads and head width."""
    info, names = adapter.info, [layer_name(layer) for layer in layers]
    if (info.num_heads, info.head_dim) != (heads, width) or set(adapter.layers) != set(names):
        raise AdapterError(
            f"Adapter '{adapter.name}' was trained for {info.base_model} ({info.num_layers} layers, {info.num_heads} "
            f"heads of {info.head_dim}, from {next(iter(adapter.layers))}); {model} has {len(names)} layers, {heads} "
            f"heads of {width}, from {names[0]}. Load an adapter for this model, or disconnect it to run training-free."
        )
