"""Layers that never called the attention override in a model call, and why if that is known."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

from .dense_reason import (
    CACHED,
    NOT_SELF_ATTENTION,
    OVERWRITTEN,
    REPLACED,
    SKIPPED,
    SPREAD_OTHERWISE,
    UNSEEN,
    DenseReason,
)
from .model_info import ModelInfo, inside, unwrap

if TYPE_CHECKING:
    from .call import ModelCall


def unseen_layers(call: ModelCall, base: Any, options: Mapping[str, Any]) -> dict[DenseReason, int]:
    """Reasons with the number of layers that each explains; empty where every layer was seen."""
    missing = call.missing_layers()
    causes = [_cause(call, base, options, layer) for layer in missing]
    total = len(call.run.info.expected_layers())
    found: dict[DenseReason, int] = {}
    for text in sorted(set(causes)):
        count = causes.count(text)
        layers = f"{count} of {total} layers"
        # What another node leaves out on purpose is no fallback.
        chosen = text in (SKIPPED, CACHED)
        found[DenseReason(text.format(layers=layers), chosen)] = count
    return found


def _cause(call: ModelCall, base: Any, options: Mapping[str, Any], layer: Hashable) -> str:
    if _is_skipped(options, layer):
        return SKIPPED
    if call.run.peers is not None and layer not in call.run.layers_seen:
        return SPREAD_OTHERWISE
    if _is_replaced(call.run.info, base, layer):
        return REPLACED
    if call.overwritten:
        return OVERWRITTEN
    if layer in call.run.layers_seen:
        return CACHED
    if call.stray_calls:
        return NOT_SELF_ATTENTION
    return UNSEEN


def _is_skipped(options: Mapping[str, Any], layer: Hashable) -> bool:
    """Another node's patch stands for the whole block, as those that skip layers make it."""
    patches = options.get("patches_replace", {}).get("dit", {})
    kind, number = layer[:2] if isinstance(layer, tuple) else ("double", layer)
    return (f"{'double' if kind == 'control' else kind}_block", number) in patches


def _is_replaced(info: ModelInfo, base: Any, layer: Hashable) -> bool:
    """Another node put something of its own in place of the layer's block or attention."""
    block, attention = _block(info, base.diffusion_model, layer)
    if block is None:
        return False
    module = inside(block, attention)
    return module is None or any("forward" in vars(each) for each in (block, module))


def _block(info: ModelInfo, diffusion_model: Any, layer: Hashable) -> tuple[Any, str]:
    """The block of a layer, None where there is none; and the name of its attention."""
    model, place = unwrap(diffusion_model), 0
    if isinstance(layer, tuple):
        kind, number = layer[:2]
        if kind == "control":
            return None, ""
        place = int(kind == "single")
    else:
        number = layer
    name, attention = info.arrangement.layers[place]
    found = getattr(model, name, ())
    if not isinstance(number, int) or number >= len(found):
        return None, attention
    return unwrap(found[number]), attention
