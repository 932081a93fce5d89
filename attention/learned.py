"""What a run has learned, as an adapter that starts the next one: calibrations and allocation.

A lesson is what one layer knew at one step. Lessons become noise bins, at most MOST_LEVELS of them:
at each level every layer's lessons of the nearest noise, a mean over conditionings and batch rows.
Kept blocks become shares of their mean over layers and heads, so that they can start a run at
another size or sparsity.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .adapters import Adapter, AdapterInfo, layer_name
from .methods.adapter_terms import at_noise
from .methods.calibration import Lesson
from .plan import MAX_SPARSITY

__all__ = ["Lesson", "learned_adapter", "mean_adapter"]

MOST_LEVELS = 16
# Tensors that may have a bin for each noise level, and their dimensions without.
BINNED = {"channel_scale": 2, "gate_slope": 1, "gate_bias": 1, "allocation": 1}


Lessons = Mapping[Hashable, Sequence[Lesson]]  # by layer


def learned_adapter(
    lessons: Lessons, layers: Sequence[Hashable], facts: AdapterInfo, start: Adapter | None = None
) -> Adapter | None:
    """An adapter of what was learned; None where nothing was.

    layers: all of the model, in order; one without lessons gets initial values. facts: grid and
    noise levels are filled in, and with an allocation the sparsity that it had. start: the adapter
    that the run began with, whose other tensors stay.
    """
    known = {layer: list(lessons.get(layer, ())) for layer in layers}
    if not any(known.values()):
        return None
    if any(each.kept is not None for found in known.values() for each in found):
        # Calibrations of a first step, when all heads still kept as many, would not fit the table.
        known = {
            layer: [each for each in found if each.kept is not None]
            for layer, found in known.items()
        }
    levels = _levels([each.sigma for found in known.values() for each in found])
    tensors = {
        layer: _layer(found, levels, facts) if found else {} for layer, found in known.items()
    }
    kept = [each["allocation"] for each in tensors.values() if "allocation" in each]
    if kept:
        # Of each level: what the layers kept together is the mean that shares are relative to.
        mean = torch.stack(kept).mean(dim=(0, -1))[..., None]
        even = torch.ones_like(kept[0])
        for each in tensors.values():
            own = each.get("allocation")
            # An error target may be met without any block; that is no measure of who needs them.
            each["allocation"] = even if own is None else torch.where(mean > 0, own / mean, even)
        facts = replace(facts, sparsity=min(MAX_SPARSITY, round(1.0 - float(mean.mean()), 4)))
    before = {} if start is None else start.layers
    named = {}
    for layer, found in tensors.items():
        name = layer_name(layer)
        own = {key: value.detach().cpu() for key, value in before.get(name, {}).items()}
        if start is not None:
            own = {key: _at_levels(key, x, start.info, levels) for key, x in own.items()}
        named[name] = own | found or _initial(facts, levels)
    grid = next(each.grid for found in known.values() for each in found)
    return Adapter(replace(facts, noise_levels=levels, grid=grid), named, "learned")


def mean_adapter(adapters: Sequence[Adapter]) -> Adapter | None:
    """The mean of what some runs with the same noise levels have learned; None of none.

    Runs that differ, since one ended early or learned of other layers, leave the first as it is.
    """
    if not adapters:
        return None
    first, alike = adapters[0], []
    for each in adapters:
        same = {key: x.shape for key, x in each.tensors().items()} == {
            key: x.shape for key, x in first.tensors().items()
        }
        if same and each.info.noise_levels == first.info.noise_levels:
            alike.append(each)
    layers = {
        layer: {
            name: torch.stack([each.layers[layer][name] for each in alike]).mean(dim=0)
            for name in weights
        }
        for layer, weights in first.layers.items()
    }
    return replace(first, layers=layers)


def _levels(sigmas: Sequence[float | None]) -> tuple[float, ...]:
    """Rising noise levels; none where a sampler did not tell them."""
    found = sorted({round(min(1.0, max(0.0, x)), 4) for x in sigmas if x is not None})
    if len(found) > MOST_LEVELS:
        step = (len(found) - 1) / (MOST_LEVELS - 1)
        found = [found[round(step * i)] for i in range(MOST_LEVELS)]
    return tuple(found)


def _layer(found: Sequence[Lesson], levels: Sequence[float], facts: AdapterInfo) -> dict:
    """One layer's tensors, with a bin for each level where there are any."""
    bins = [_mean(_nearest(found, level), facts) for level in levels] or [_mean(found, facts)]
    return {
        name: torch.stack([each[name] for each in bins]) if levels else bins[0][name]
        for name in bins[0]
    }


def _nearest(found: Sequence[Lesson], level: float) -> list[Lesson]:
    """The lessons of the noise that is nearest to a level."""
    gaps = [abs((1.0 if each.sigma is None else each.sigma) - level) for each in found]
    return [each for each, gap in zip(found, gaps) if gap <= min(gaps) + 1e-4]


def _mean(found: Sequence[Lesson], facts: AdapterInfo) -> dict[str, Tensor]:
    """What lessons say on average, of all channels."""
    rows = {
        "channel_scale": [_all_channels(each, facts.head_dim)[..., ::2] for each in found],
        "gate_slope": [each.values.gate_slope for each in found],
        "gate_bias": [each.values.gate_bias for each in found],
    }
    shares = [each.kept / each.blocks for each in found if each.kept is not None]
    if shares:
        rows["allocation"] = shares
    # A lesson of a head that kept nothing does not say how to weigh what others keep.
    teaches = torch.cat(
        [
            torch.ones(each.values.gate_slope.shape) if each.kept is None else each.kept.cpu() > 0
            for each in found
        ]
    )
    weights = torch.where(teaches.sum(dim=0) > 0, teaches.double(), 1.0)
    means = {}
    for name, each in rows.items():
        # Each device of a run has lessons of its own.
        x = torch.cat([part.cpu().double() for part in each])
        own = torch.ones_like(weights) if name == "allocation" else weights
        own = own[..., None] if x.ndim > own.ndim else own
        means[name] = ((x * own).sum(dim=0) / own.sum(dim=0)).float()
    return means


def _all_channels(lesson: Lesson, head_dim: int) -> Tensor:
    """channel_scale of all channels `(B, H, D)`: what was not chosen is as it begins."""
    scale, ids = lesson.values.channel_scale, lesson.values.channel_ids
    if ids is None:
        return scale
    return scale.new_full((*scale.shape[:2], head_dim), lesson.scale).scatter(-1, ids, scale)


def _at_levels(name: str, tensor: Tensor, info: AdapterInfo, levels: Sequence[float]) -> Tensor:
    """What an adapter said, at the noise levels of the new one."""
    dims = BINNED.get(name)
    if dims is None or tensor.ndim == dims:
        return tensor
    found = [at_noise(tensor, dims, info.noise_levels, level) for level in levels or [None]]
    return torch.stack(found) if levels else found[0]


def _initial(facts: AdapterInfo, levels: Sequence[float]) -> dict[str, Tensor]:
    """A layer of which nothing is known: the slope that every head begins with."""
    return {"gate_slope": torch.ones(*([len(levels)] if levels else []), facts.num_heads)}
