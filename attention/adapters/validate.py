"""Whether weights are complete, of the right shape and finite, and whether they fit a model."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .adapter import SUFFIXES, Adapter, layer_name
from .info import AdapterError, AdapterInfo
from .text import shown

Shape = tuple[int, ...]

FLOATING_POINT = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def validate(info: AdapterInfo, layers: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise AdapterError unless every tensor is there, of the right shape, and finite."""
    shapes = {
        layer: {name: tuple(tensor.shape) for name, tensor in weights.items()}
        for layer, weights in layers.items()
    }
    validate_shapes(info, shapes)
    for layer, weights in layers.items():
        for name, tensor in weights.items():
            validate_numbers(f"{layer} {name}", tensor)


def validate_shapes(info: AdapterInfo, layers: Mapping[str, Mapping[str, Shape]]) -> None:
    """Raise AdapterError unless every tensor is there and of the right shape. Reads no tensor."""
    _check_layers(info, layers)
    expected = _expected_shapes(info)
    for layer, shapes in layers.items():
        for name in sorted(_required(info, shapes)):
            if name not in shapes:
                found = ", ".join(sorted(shapes)) or "nothing"
                raise AdapterError(f"layer {layer} has no {name}; it has {found}")
        for name, shape in shapes.items():
            if name.startswith("pe_") and info.pe == "none":
                raise AdapterError(f"layer {layer} has {name}, but the header says pe 'none'")
            if shape not in expected[name]:
                options = " or ".join(map(str, expected[name]))
                raise AdapterError(
                    f"{layer} {name} has the shape {shown(shape)}; expected {options}"
                )


def validate_numbers(name: str, tensor: Tensor) -> None:
    """Raise AdapterError unless a tensor is floating point and finite in float32."""
    if tensor.dtype not in FLOATING_POINT:
        raise AdapterError(f"{name} is {tensor.dtype}; expected floating point")
    wrong = count_not_finite(tensor)
    if wrong:
        raise AdapterError(
            f"{name} has {wrong} of {tensor.numel()} values that are NaN, infinite or too large "
            "for float32"
        )


def count_not_finite(tensor: Tensor) -> int:
    """How many values are not finite in float32, which the weights are computed in."""
    return int((~torch.isfinite(tensor.float())).sum())


def check_model(
    adapter: Adapter, layers: Sequence[Hashable], num_heads: int, head_dim: int, model: str
) -> None:
    """Raise AdapterError unless the adapter fits a model of these layers (see `layer_name`)."""
    info, names = adapter.info, [layer_name(layer) for layer in layers]
    same_heads = (info.num_heads, info.head_dim) == (num_heads, head_dim)
    if same_heads and set(adapter.layers) == set(names):
        return
    raise AdapterError(
        f"Adapter '{shown(adapter.name)}' was trained for {shown(info.base_model)} "
        f"({info.num_layers} layers, {info.num_heads} heads of {info.head_dim}, from "
        f"{next(iter(adapter.layers))}); {model} has {len(names)} layers, {num_heads} heads of "
        f"{head_dim}, from {names[0]}. Load an adapter for this model, or disconnect it to run "
        "training-free."
    )


def _check_layers(info: AdapterInfo, layers: Iterable[str]) -> None:
    indices: dict[str, set[int]] = {}
    count = 0
    for layer in layers:
        kind, index = layer.split(".")[:2]
        indices.setdefault(kind, set()).add(int(index))
        count += 1
    if count != info.num_layers:
        raise AdapterError(
            f"it has weights for {count} layers; the header says num_layers {info.num_layers}"
        )
    for kind, found in indices.items():
        missing = set(range(len(found))) - found
        if missing:
            raise AdapterError(
                f"it has no weights for layer {kind}.{min(missing)}, but some for "
                f"{kind}.{max(found)}"
            )


def _required(info: AdapterInfo, shapes: Iterable[str]) -> set[str]:
    if info.method != "ropeslr":
        return set(SUFFIXES[info.method].values())
    positions = {"pe_q", "pe_k"} if info.pe != "none" else set()
    if info.fusion == "rms":
        return {"proj_q", "proj_k", "gate_bias", "gate_weight"} | positions
    # Absent altogether, the low-rank branch has its initial value; half of it means nothing.
    branch = {"proj_q", "proj_k", "low_rank_scale"} | positions
    return branch if branch & set(shapes) else set()


def _expected_shapes(info: AdapterInfo) -> Mapping[str, Sequence[Shape]]:
    heads, dim, rank = info.num_heads, info.head_dim, info.rank
    if info.method == "rola":
        return {
            "proj_q": [(rank, dim)],
            "proj_k": [(rank, dim)],
            "gate_weight": [(1, dim)],
            "gate_bias": [(1, heads, 1, 1)],
        }
    if info.method == "sla":
        return {"weight": [(dim, dim)], "bias": [(dim,)]}
    features = (heads, rank, dim)
    positions = (heads, sum(info.pe_grid), rank) if info.pe == "table" else features
    return {
        "channel_scale": _with_bins(info, (heads, dim // 2)),
        "gate_slope": _with_bins(info, (heads,)),
        "gate_bias": _with_bins(info, (heads,)),
        "gate_weight": [(dim,)],
        "proj_q": [features],
        "proj_k": [features],
        "pe_q": [positions],
        "pe_k": [positions],
        "low_rank_scale": [(heads,)],
        "allocation": _with_bins(info, (heads,)),
    }


def _with_bins(info: AdapterInfo, shape: Shape) -> list[Shape]:
    bins = len(info.noise_levels)
    return [shape, (bins, *shape)] if bins else [shape]
